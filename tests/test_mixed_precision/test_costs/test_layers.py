"""Shapes of layers against torch's own count of operations and the size that a report gives."""

from __future__ import annotations

import pytest
from small_models import classifier, images, prepare
from torch.utils.flop_counter import FlopCounterMode

from mmbrecq.mixed_precision.costs.models import ModelSize, layer_shapes, other_bytes
from mmbrecq.runs.run_files import model_size


@pytest.mark.parametrize('name', ['resnet', 'mobilenetv2', 'regnet', 'vgg'])
def test_multiplications_are_what_torch_counts(name: str) -> None:
    model = classifier(name)
    example = images()
    with FlopCounterMode(display=False) as counter:
        model(example)
    layers = layer_shapes(prepare(classifier(name), 'academic'))
    assert 2 * len(example) * sum(layer.macs for layer in layers) == counter.get_total_flops()
    assert all(len(layer.calls) == 1 for layer in layers)


@pytest.mark.parametrize('preset', ['academic', 'openvino'])
def test_sizes_add_up_to_that_of_the_report(preset: str) -> None:
    model = prepare(classifier('resnet'), preset)
    layers, size = layer_shapes(model), model_size(model)
    rest = other_bytes(model)
    assert rest + 4 * sum(layer.weights for layer in layers) == size.float
    assert round(rest + sum(ModelSize().layer_cost(layer, layer.bits) for layer in layers)) == size.quantized
    assert {layer.name for layer in layers} == {layer.name for layer in model.layers}


def test_the_model_runs_as_before() -> None:
    model = prepare(classifier('resnet'), 'academic')
    hooks = [len(module._forward_hooks) for module in model.model.modules()]
    layer_shapes(model)
    assert [len(module._forward_hooks) for module in model.model.modules()] == hooks
