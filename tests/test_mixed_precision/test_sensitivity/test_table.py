"""``sensitivity.json`` there and back, and files that are none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmbrecq.errors import TableError
from mmbrecq.mixed_precision.costs import Call, LayerShape
from mmbrecq.mixed_precision.sensitivity import SensitivityTable


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
    table().save(tmp_path / 'sensitivity.json')
    again = SensitivityTable.load(tmp_path / 'sensitivity.json')
    assert again.loss == table().loss
    assert again.pairs == table().pairs
    assert again.losses().tolist() == [[1.5, 0.5], [2.5, -0.25]]
    assert [shape.macs for shape in again.layers] == [shape.macs for shape in table().layers]
    again.save(tmp_path / 'again.json')
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
    table().save(path)
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
