from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import calibrate, classifier, conv, images, net, packed, prepare, relative_error, residual, run
from torch import Tensor, nn

from mmbrecq.deploy.backends.onnxruntime import ONNXRuntimeBackend
from mmbrecq.deploy.exporters import ONNXExporter
from mmbrecq.fake_quants.bias import bias_correction
from mmbrecq.fake_quants.weight import original_weight
from mmbrecq.presets import PRESETS
from mmbrecq.quantizers import QuantizedModel


def switches(model: QuantizedModel) -> dict[str, bool]:
    found = {f'{name}.weight': fq.enabled for name, _, fq in model.weights()}
    for name, module, _ in model.weights():
        correction = bias_correction(module)
        if correction is not None:
            found[f'{name}.bias'] = correction.enabled
    return found | {name: quantizer.enabled for name, quantizer in model.image_graph.quantizers.items()}


@pytest.mark.parametrize('weights', [False, True])
@pytest.mark.parametrize('activations', [False, True])
def test_switches_are_set_and_put_back(weights: bool, activations: bool) -> None:
    model = prepare(residual(), 'academic')
    next(iter(model.image_graph.quantizers.values())).enabled = True
    next(fq for _, _, fq in model.weights()).enabled = True
    before = switches(model)
    with model.quantization(weights, activations):
        within = switches(model)
        assert {name: on for name, on in within.items() if name in model.image_graph.quantizers} == dict.fromkeys(
            model.image_graph.quantizers, activations
        )
        assert {on for name, on in within.items() if name not in model.image_graph.quantizers} == {weights}
        with model.quantization(not weights, not activations):
            assert switches(model) == {name: not on for name, on in within.items()}
        assert switches(model) == within
    assert switches(model) == before


def test_switches_are_put_back_after_an_error() -> None:
    model = prepare(residual(), 'academic')
    before = switches(model)
    with pytest.raises(KeyboardInterrupt), model.quantization(True, True):
        raise KeyboardInterrupt
    assert switches(model) == before


def quantized_by_hand(weight: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, low: int, high: int) -> np.ndarray:
    shape = (-1, *[1] * (weight.ndim - 1))
    s, z = scale.reshape(shape), zero_point.reshape(shape).astype(np.float32)
    return (np.clip(np.round(weight / s) + z, low, high) - z) * s


def test_each_switch_quantizes_its_part() -> None:
    model, x = calibrate(prepare(residual(), 'academic', 4, 4)), images()
    stem = model.model.backbone.stem
    float_weight = original_weight(stem).clone()
    fake_quant = next(fq for name, _, fq in model.weights() if name == 'backbone.stem')
    wanted = quantized_by_hand(
        float_weight.numpy(), fake_quant.scale.numpy(), fake_quant.zero_point.numpy(), 0, 255
    )  # fmt: skip
    results = {}
    for weights, activations in ((False, False), (True, False), (False, True), (True, True)):
        with model.quantization(weights, activations):
            results[weights, activations] = run(model, x)
            np.testing.assert_allclose(stem.weight.detach(), wanted if weights else float_weight, rtol=0, atol=1e-7)
    outputs = list(results.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_weights_of_a_unit() -> None:
    model = prepare(classifier('resnet'), 'academic')
    unit = next(unit for unit in model.image_graph.units if unit.name == 'backbone.layer2.0')
    modules = [module for module, _ in model.image_graph.unit_weights(unit)]
    block = model.model.backbone.layer2[0]
    assert len(modules) == 3
    assert all(
        any(module is wanted for module in modules) for wanted in (block.conv1, block.conv2, block.downsample[0])
    )
    assert {q.qtype.bits for q in model.image_graph.unit_quantizers(unit)} == {8}
    assert len(model.image_graph.unit_quantizers(unit)) == len(unit.quantizers) > 0


@pytest.mark.parametrize('preset', [name for name, preset in PRESETS.items() if not preset.bias_rounded])
def test_packing_keeps_the_function(preset: str) -> None:
    model, x = calibrate(prepare(residual(), preset, 4, 4)), images(5, seed=1)
    with model.quantization(weights=True, activations=True):
        wanted = run(model, x)
    model.pack()
    torch.testing.assert_close(run(model, x), wanted, rtol=0, atol=0)
    torch.testing.assert_close(run(lambda v: model.model(v, mode='tensor'), x), wanted, rtol=0, atol=0)


def test_packing_rounds_biases_as_the_runtime_does() -> None:
    """In units of input scale times weight scale, for convolutions; a linear layer has its bias added in float."""
    model = calibrate(prepare(residual(), 'onnxruntime', 4, 4))
    readers = {'stem': 'inputs', 'conv1': 'backbone_stem_relu', 'conv2': 'backbone_relu1', 'down': 'backbone_stem_relu'}
    body: Any = model.model.backbone
    scales = {name.rpartition('.')[2]: fq.scale.numpy().astype(np.float64) for name, _, fq in model.weights()}
    before = {name: getattr(body, name).bias.detach().double().numpy() for name in (*readers, 'fc')}
    model.pack()
    for name, source in readers.items():
        step = float(model.image_graph.quantizers[f'activation_quantizers.{source}'].scale) * scales[name]
        wanted = np.round(before[name] / step) * step
        np.testing.assert_allclose(getattr(body, name).bias.detach(), wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(body.fc.bias.detach(), before['fc'])


def test_packing_rounds_the_bias_behind_a_pooling() -> None:
    """Pooling by maximum moves values of the grid before it, so the layer behind reads that grid."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.flatten(self.gap(self.after(self.pool(self.relu(self.stem(x))))), 1)

    model = net(
        forward, stem=conv(), relu=nn.ReLU(), pool=nn.MaxPool2d(2), after=conv(4, 6), gap=nn.AdaptiveAvgPool2d(1)
    )
    prepared = calibrate(prepare(model, 'onnxruntime', 4, 8))
    scale = {name.rpartition('.')[2]: fq.scale.double() for name, _, fq in prepared.weights()}['after']
    before = model.backbone.after.bias.detach().double()
    prepared.pack()
    step = scale * prepared.image_graph.quantizers['activation_quantizers.backbone_relu'].scale.double()
    wanted = torch.round(before / step) * step
    assert (wanted - before).abs().max() > 1e-6
    torch.testing.assert_close(model.backbone.after.bias.detach().double(), wanted, rtol=1e-5, atol=1e-8)


def vanishing(preset: str, weight_bits: int = 8) -> QuantizedModel:
    """A convolution of which one channel has no weights left, and a bias that int32 has no room for."""
    model = residual()
    with torch.no_grad():
        model.backbone.conv1.weight[1] = 0
        model.backbone.conv1.bias[1] = 40.0
        model.backbone.conv2.weight[:, 1] *= 0.01
    return prepare(model, preset, weight_bits)


def largest_bias(model: QuantizedModel) -> float:
    scale = next(fq.scale for name, _, fq in model.weights() if name == 'backbone.conv1')
    step = model.image_graph.quantizers['activation_quantizers.backbone_stem_relu'].scale * scale
    return float((model.model.backbone.conv1.bias / step).abs().max())


def test_scales_leave_room_for_the_bias_before_anything_is_learned() -> None:
    model = calibrate(vanishing('tensorrt'))
    assert 2**27 < largest_bias(model) < 1.01 * 2**28


@pytest.mark.parametrize('weight_bits', [2, 8])
@pytest.mark.parametrize('preset', ['onnxruntime', 'tensorrt'])
def test_packing_leaves_room_for_the_bias(tmp_path: Path, preset: str, weight_bits: int) -> None:
    """ONNX Runtime wraps around a bias that int32 cannot hold; scales and integers stay those learned elsewhere."""
    model = calibrate(vanishing(preset, weight_bits))
    fake_quant = next(fq for name, _, fq in model.weights() if name == 'backbone.conv1')
    fake_quant.scale[1] = 1e-9
    fake_quant.codes[0, 0, 0, 0] = 1
    codes = fake_quant.codes.clone()
    assert largest_bias(model) > 2**31
    model.pack()
    stored = model.model.backbone.conv1.parametrizations.weight
    assert torch.equal(stored.original0, codes)
    x = images(8, seed=1)
    deployed = ONNXRuntimeBackend(ONNXExporter().export(model.image_graph, images(2), tmp_path), num_threads=1)(x)[0]
    # the file for TensorRT has float biases, which ONNX Runtime rounds
    assert relative_error(deployed, run(model, x)) < (1e-5 if preset == 'onnxruntime' else 0.02)


def test_packed_model_stores_integers_in_place_of_weights() -> None:
    model = packed(residual(), 'openvino', 4, 8)
    state = model.model.state_dict()
    assert list(model.weights()) == []
    for layer in model.layers:
        weight = [value for name, value in state.items() if name.startswith(f'{layer.name}.parametrizations.weight')]
        assert [value.dtype for value in weight] == [torch.int8, torch.float32, torch.int8]
        codes = weight[0]
        assert codes.dim() >= 2 and weight[1].shape == weight[2].shape == (codes.shape[0],)
        half = 2 ** (layer.weight_bits - 1) if layer.weight_bits == 4 else 64
        assert -half <= int(codes.min()) and int(codes.max()) < half
        assert f'{layer.name}.weight' not in state
        assert state[f'{layer.name}.bias'].dtype == torch.float32
    assert all(quantizer.enabled and quantizer.observer is None for quantizer in model.image_graph.quantizers.values())


def test_packing_adds_the_correction_to_the_bias() -> None:
    model = calibrate(prepare(residual(), 'academic', 4, 8))
    stem: Any = model.model.backbone.stem
    bias = stem.bias.detach().clone()
    correction = bias_correction(stem)
    assert correction is not None
    offset = torch.arange(len(bias), dtype=torch.float32)
    correction.offset.data.copy_(offset)
    assert torch.equal(stem.bias.detach(), bias)
    model.pack()
    assert torch.equal(stem.bias.detach(), bias + offset)
    assert isinstance(stem.bias, nn.Parameter)


def test_packed_state_goes_round() -> None:
    model, x = packed(residual(), 'onnxruntime', 4, 4), images(5, seed=1)
    other = prepare(residual(), 'onnxruntime', 4, 4)
    other.pack()
    state: dict[str, Tensor] = copy.deepcopy(model.model.state_dict())
    assert relative_error(run(other, x), run(model, x)) > 0.01
    other.model.load_state_dict(state, strict=True)
    torch.testing.assert_close(run(other, x), run(model, x), rtol=0, atol=0)
