from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction.cache import ActivationCache, CachePlan
from mmbrecq.reconstruction.streams import Streams

Prepare = Callable[..., QuantizedModel]


@contextmanager
def module_outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What every module gives in a plain forward pass, under the name that its node has in the graph."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, output: outputs.__setitem__(name, output.detach().clone())

    handles = [m.register_forward_hook(keep(n.replace('.', '_'))) for n, m in model.named_modules() if n]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def float_activations(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The float model's values at the ends of the blocks, by its own layers."""
    backbone, head = model.backbone, model.head
    values = {'inputs': x}
    with torch.no_grad():
        values['activation_quantizers_relu'] = x = torch.relu(backbone.stem(x))
        values['activation_quantizers_relu_2'] = x = backbone.first(x)
        values['backbone_pool'] = x = backbone.pool(x)
        values['activation_quantizers_relu_4'] = x = backbone.second(x)
        values['head_fc'] = head(x)
    return values


def carry(model: QuantizedModel, streams: Streams, activations: bool) -> Iterator[tuple]:
    """Runs both streams to the end; yields every unit with its inputs and outputs in both."""
    for index, unit in enumerate(model.image_graph.units):
        inputs = streams.float_inputs(unit), streams.quantized_inputs(unit)
        outputs = (
            streams.run(unit, inputs[0], weights=False, activations=False),
            streams.run(unit, inputs[1], weights=True, activations=activations),
        )
        yield unit, inputs, outputs
        streams.advance(index, *outputs)


@pytest.mark.parametrize('place', ['host', 'disk'])
def test_the_float_stream_is_the_float_model(
    prepared: Prepare, classifier: nn.Module, images: Tensor, tmp_path: Path, place: str
) -> None:
    model, expected = prepared(), float_activations(classifier, images)
    cache = ActivationCache(CachePlan(place, 0, ''), images.device, tmp_path)
    streams = Streams(model.image_graph, model.image_graph.units, cache.hold(images), cache, 10)
    for unit, (floats, _), (outputs, _) in carry(model, streams, activations=True):
        assert len(floats) == len(unit.inputs)
        for name, value in [*zip(unit.inputs, floats, strict=True), *zip(unit.outputs, outputs, strict=True)]:
            torch.testing.assert_close(value[:], expected[name], rtol=1e-5, atol=1e-5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('activations', [True, False])
@pytest.mark.parametrize('place', ['host', 'disk'])
def test_the_quantized_stream_is_the_quantized_model(
    prepared: Prepare, images: Tensor, tmp_path: Path, place: str, activations: bool
) -> None:
    model = prepared()
    with torch.no_grad(), model.quantization(True, activations), module_outputs(model.model) as expected:
        final = model(images)
    expected['inputs'] = images
    cache = ActivationCache(CachePlan(place, 0, ''), images.device, tmp_path)
    for unit, (floats, quantized), (float_outputs, outputs) in carry(
        model, Streams(model.image_graph, model.image_graph.units, cache.hold(images), cache, 10), activations
    ):
        for name, value in [*zip(unit.inputs, quantized, strict=True), *zip(unit.outputs, outputs, strict=True)]:
            # a batch of another size may add up in another order, which moves a value to the next step at most
            assert (value[:] - expected[name]).abs().gt(1e-4).float().mean() < 1e-3
        if unit.name != 'backbone.stem':
            assert not torch.allclose(floats[0][:], quantized[0][:], atol=1e-3)
        pair = outputs[0][:], float_outputs[0][:]
    torch.testing.assert_close(pair[0], final, rtol=1e-4, atol=1e-2)
    assert not torch.allclose(*pair, atol=1e-2)


def test_both_streams_start_from_the_images(prepared: Prepare, images: Tensor, host: ActivationCache) -> None:
    model = prepared()
    inputs = host.hold(images)
    streams = Streams(model.image_graph, model.image_graph.units, inputs, host, 10)
    assert streams.float_inputs(model.image_graph.units[0])[0] is inputs
    assert streams.quantized_inputs(model.image_graph.units[0])[0] is inputs


@pytest.mark.parametrize('place', ['host', 'disk'])
def test_values_lie_in_the_order_that_their_reader_wants(
    prepared: Prepare, classifier: nn.Module, images: Tensor, tmp_path: Path, place: str
) -> None:
    block = classifier.backbone.second
    block.conv1 = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    model = prepared(model=classifier)
    depthwise = {
        name for unit in model.image_graph.units if 'backbone.second.conv1' in unit.layers for name in unit.inputs
    }
    assert len(depthwise) == 1
    seen = set()
    cache = ActivationCache(CachePlan(place, 0, ''), torch.device('cpu'), tmp_path)
    for unit, _, outputs in carry(
        model, Streams(model.image_graph, model.image_graph.units, cache.hold(images), cache, 10), True
    ):
        for values in zip(unit.outputs, *outputs, strict=True):
            name, both = values[0], values[1:]
            for x in (v[torch.tensor([5, 0, 7])] for v in both):
                innermost = x.dim() == 4 and not x.is_contiguous()
                assert innermost == (name in depthwise)
                seen.add(innermost)
    assert seen == {True, False}


@pytest.mark.parametrize('granularity', ['layer', 'block', 'stage', 'net'])
def test_only_what_a_later_unit_reads_is_kept(
    prepared: Prepare, classifier: nn.Module, images: Tensor, host: ActivationCache, granularity: str
) -> None:
    model = prepared(granularity=granularity)
    streams = Streams(model.image_graph, model.image_graph.units, host.hold(images), host, 24)
    for index, _ in enumerate(carry(model, streams, True)):
        # looked at before the unit hands its outputs on
        ahead = {name for unit in model.image_graph.units[index:] for name in unit.inputs}
        behind = {name for unit in model.image_graph.units[:index] for name in unit.outputs} | {'inputs'}
        assert set(streams.float_values) == set(streams.quantized_values) == ahead & behind
    assert streams.float_values == streams.quantized_values == {}


def test_layers_carry_the_shortcut_past_the_block(
    prepared: Prepare, classifier: nn.Module, images: Tensor, host: ActivationCache
) -> None:
    """Cut into layers, the last one of a block reads what the one before it gave, and the input of the block."""
    model = prepared(granularity='layer')
    last = [unit for unit in model.image_graph.units if 'backbone.first.conv2' in unit.layers]
    assert len(last[0].inputs) == 2
    *_, (_, _, (outputs, _)) = carry(
        model, Streams(model.image_graph, model.image_graph.units, host.hold(images), host, 24), True
    )
    with torch.no_grad():
        torch.testing.assert_close(outputs[0][:], classifier(images), rtol=1e-5, atol=1e-5)


def test_the_last_partial_batch_counts(prepared: Prepare, images: Tensor, host: ActivationCache) -> None:
    model = prepared()
    results = [
        Streams(model.image_graph, model.image_graph.units, host.hold(images), host, size).run(
            model.image_graph.units[0], [images], False, False
        )[0]
        for size in (1, 7, 24, 100)
    ]
    for result in results:
        assert len(result) == 24
        torch.testing.assert_close(result[:], results[0][:], rtol=1e-5, atol=1e-5)


def test_the_switches_are_put_back(prepared: Prepare, images: Tensor, host: ActivationCache) -> None:
    model = prepared()
    Streams(model.image_graph, model.image_graph.units, host.hold(images), host, 10).run(
        model.image_graph.units[0], [images], weights=True, activations=True
    )
    assert not any(fake_quant.enabled for _, _, fake_quant in model.weights())
    assert not any(quantizer.enabled for quantizer in model.image_graph.quantizers.values())
