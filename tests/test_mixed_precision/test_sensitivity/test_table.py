"""``sensitivity.json`` there and back, and files that are none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import calibrate, classifier, conv, images, net, prepare
from torch import Tensor

from mmbrecq.errors import TableError
from mmbrecq.mixed_precision.costs.models import Call, LayerShape
from mmbrecq.mixed_precision.sensitivity.measure import OutputLoss
from mmbrecq.mixed_precision.sensitivity.table import SensitivityTable, value_groups
from mmbrecq.schema import save_json


def layer(name: str) -> LayerShape:
    return LayerShape(
        name, 'Conv2d', (4, 3, 3, 3), (Call((3, 8, 8), (4, 8, 8), 2),), (2, None), 4, False,
        (('stride', (1, 1)), ('groups', 1)),
    )  # fmt: skip


def table() -> SensitivityTable:
    return SensitivityTable(
        'divergence', [2, 4], [layer('stem'), layer('a'), layer('b')], ['a', 'b'],
        {'stem': 'stem', 'a': 'block', 'b': 'block'}, 128, {'seed': 0},
        {'a': {2: 1.5, 4: 0.5}, 'b': {2: 2.5, 4: -0.25}}, {('a', 'b'): {2: 0.75}},
    )  # fmt: skip


def test_there_and_back(tmp_path: Path) -> None:
    save_json(table(), tmp_path / 'sensitivity.json')
    again = SensitivityTable.load(tmp_path / 'sensitivity.json')
    assert again.loss == table().loss
    assert again.pairs == table().pairs
    assert again.losses().tolist() == [[1.5, 0.5], [2.5, -0.25]]
    assert [shape.macs for shape in again.layers] == [shape.macs for shape in table().layers]
    save_json(again, tmp_path / 'again.json')
    assert (tmp_path / 'again.json').read_text() == (tmp_path / 'sensitivity.json').read_text()
    again.check_complete(tmp_path / 'again.json')


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (lambda content: content.pop('layers'), 'expected what tools/analyze.py writes, but it is not'),
        (lambda content: content.update(kind_of_loss='x'), 'expected what tools/analyze.py writes, but it is not'),
        (lambda content: content['pairs'].update(a={'2': 1}), 'expected what tools/analyze.py writes, but it is not'),
        (lambda content: content['loss']['a'].update({'2': float('nan')}), "finite loss of 'a' at 2 bits, but got nan"),
        (lambda content: content['pairs'].update({'a b': {'2': float('inf')}}), "finite loss of 'a b' at 2 bits"),
    ],
)
def test_bad_files(tmp_path: Path, edit: Callable[[dict[str, Any]], Any], message: str) -> None:
    path = tmp_path / 'sensitivity.json'
    save_json(table(), path)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(TableError, match=re.escape(message)) as raised:
        SensitivityTable.load(path)
    assert str(raised.value).startswith(str(path))


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    path = tmp_path / 'sensitivity.json'
    incomplete = table()
    del incomplete.loss['b'][4]
    with pytest.raises(
        TableError, match=re.escape(f"{path}: expected the loss of layer 'b' at 4 bits, but it has none")
    ):
        incomplete.check_complete(path)


@pytest.mark.parametrize('content', ['', '[]', '{"loss": 3'])
def test_a_file_that_is_no_table(tmp_path: Path, content: str) -> None:
    path = tmp_path / 'sensitivity.json'
    path.write_text(content)
    with pytest.raises(TableError, match='expected what tools/analyze.py writes, but it is not'):
        SensitivityTable.load(path)


def test_what_shares_a_reader_or_a_quantizer_is_one_group() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        left, right = torch.relu(self.left(x)), torch.relu(self.right(x))
        # one layer reads both, as heads of pyramid levels do
        both = torch.relu(self.shared(left)), torch.relu(self.shared(right))
        return self.last(both[0]) + self.other(both[1])

    layers = {name: conv(4, 4) for name in ('left', 'right', 'shared', 'last', 'other')}
    model = prepare(net(forward, stem=conv(), **layers), 'academic', 4, 4, first_last_8bit=False)
    names = [f'backbone.{name}' for name in ('stem', *layers)]
    groups = {group.layers: group.quantizers for group in value_groups(model.image_graph, names)}
    assert set(groups) == {
        ('backbone.stem',), ('backbone.left', 'backbone.right'), ('backbone.shared',), ('backbone.last',),
        ('backbone.other',),
    }  # fmt: skip
    assert len(groups['backbone.shared',]) == 2
    assert sum(len(quantizers) for quantizers in groups.values()) == len(model.image_graph.quantizers)


def test_a_value_that_a_fixed_layer_reads_is_not_chosen() -> None:
    model = prepare(classifier('resnet'), 'academic', 4, 4)
    searched = [layer.name for layer in model.layers if layer.weight_bits == 4]
    groups = value_groups(model.image_graph, searched)
    read = {layer for group in groups for layer in group.layers}
    assert read <= set(searched)
    # the shortcut's convolution reads what the first one of its block reads
    assert ('backbone.layer2.0.conv1', 'backbone.layer2.0.downsample.0') in {group.layers for group in groups}
    fewer = value_groups(model.image_graph, [name for name in searched if name != 'backbone.layer2.0.downsample.0'])
    assert 'backbone.layer2.0.conv1' not in {layer for group in fewer for layer in group.layers}


def test_the_loss_of_activations_is_that_of_their_quantizers_alone() -> None:
    model, batch = calibrate(prepare(classifier('resnet'), 'academic', 4, 4)), images(8)
    (group,) = (g for g in value_groups(model.image_graph, ['backbone.layer3.0.conv2']) if g.layers)
    loss = OutputLoss(model.image_graph, batch)
    with model.quantization(weights=False, activations=False):
        wanted = torch.log_softmax(model(batch).double(), 1)
        model.image_graph.quantizers[group.quantizers[0]].enabled = True
        found = torch.log_softmax(model(batch).double(), 1)
    expected = float((wanted.exp() * (wanted - found)).sum(1).mean())
    assert expected > 0
    np.testing.assert_allclose(loss.of((), group.quantizers), expected, rtol=1e-6)
    assert not any(quantizer.enabled for quantizer in model.image_graph.quantizers.values())
