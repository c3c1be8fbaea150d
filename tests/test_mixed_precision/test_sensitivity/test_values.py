"""Groups of activations whose bits are chosen together, and what they lose, against the switches themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from small_models import calibrate, classifier, conv, images, net, prepare
from torch import Tensor

from mmbrecq.mixed_precision.sensitivity.measure import OutputLoss
from mmbrecq.mixed_precision.sensitivity.values import value_groups


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
