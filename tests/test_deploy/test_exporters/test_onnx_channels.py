from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from small_models import calibrate, conv, images, net, packed, prepare, relative_error, run
from torch import Tensor, nn

from mmbrecq.api import quantize
from mmbrecq.deploy.backends.onnxruntime import ONNXRuntimeBackend
from mmbrecq.deploy.exporters import ONNXExporter
from mmbrecq.presets import PRESETS

FOLDED = pytest.mark.parametrize('preset', [name for name, preset in PRESETS.items() if preset.folds_channel_scales])


def uneven() -> nn.Module:
    """Two depthwise convolutions behind GELU that read channels of ranges a factor of 1,000 apart."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.gelu(self.wide(F.gelu(self.stem(x))))
        return self.last(F.gelu(self.bare(F.max_pool2d(F.interpolate(x, scale_factor=2.0), 2))))

    model = net(
        forward, stem=conv(3, 6, stride=2), wide=conv(6, 12, 5, stride=2, groups=6),
        bare=conv(12, 12, groups=12, bias=False), last=conv(12, 2),
    )  # fmt: skip
    first, second = torch.logspace(-1, 2, 6), torch.logspace(2, -1, 12)
    with torch.no_grad():
        for layer, before, after in (
            (model.backbone.stem, None, first),
            (model.backbone.wide, first.repeat_interleave(2), second),
            (model.backbone.bare, second, None),
        ):
            layer.weight.mul_(3 * (1 if after is None else after.reshape(-1, 1, 1, 1)))
            layer.weight.div_(1 if before is None else before.reshape(-1, 1, 1, 1))
            if layer.bias is not None:
                layer.bias.mul_(after)
        # a channel that is always 0
        model.backbone.stem.weight[0], model.backbone.stem.bias[0] = 0, 0
    return model


@FOLDED
@pytest.mark.parametrize('bits', [8, 4])
def test_file_has_scales_per_tensor_and_computes_what_torch_simulates(tmp_path: Path, preset: str, bits: int) -> None:
    options: Any = {'first_last_8bit': False} if bits == 4 else {}
    model = packed(uneven(), preset, 8, bits, **options)
    by_channel = {n.rpartition('.')[2] for n, q in model.image_graph.quantizers.items() if q.scale.dim()}
    of_the_runtime = {'backbone_stem', 'backbone_wide', 'backbone_bare'} if preset == 'onnxruntime' else set()
    assert by_channel == {'gelu', 'gelu_1'} | of_the_runtime
    path = ONNXExporter().export(model.image_graph, images(2), tmp_path)
    graph = onnx.load(path).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    activations = [node for node in graph.node if node.op_type == 'QuantizeLinear']
    assert activations and all(stored[node.input[1]].ndim == 0 for node in activations)
    found = [node.op_type for node in graph.node]
    # GELU is written with two products and a quotient
    assert found.count('Div') == 3 + 2 and found.count('Mul') == 6 + len(of_the_runtime)
    x = images(8, seed=1)
    for optimize in (False, True):
        out = ONNXRuntimeBackend(path, num_threads=1, optimize=optimize)(x)[0]
        assert relative_error(out, run(model, x)) < 1e-6


@FOLDED
def test_eight_bits_are_enough_for_channels_of_uneven_ranges(preset: str) -> None:
    x, model = images(8, seed=1), uneven()
    wanted = run(model, x)
    assert relative_error(run(packed(uneven(), 'academic'), x), wanted) > 0.5
    assert relative_error(run(packed(model, preset), x), wanted) < 0.06


@FOLDED
def test_biases_and_weights_of_layers_that_levels_share(tmp_path: Path, preset: str) -> None:
    """A depthwise convolution that reads two values has a weight in the file for each."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        return self.last(self.shared(F.silu(self.deep(x))) * self.shared(x * 3.0))

    def build() -> nn.Module:
        return net(forward, stem=conv(3, 4), deep=conv(4, 4), shared=conv(4, 4, groups=4), last=conv(4, 2))

    overrides = [{'pattern': 'backbone.deep', 'weight_bits': 'float'}]
    model = packed(build(), preset, overrides=overrides if preset == 'onnxruntime' else [])
    path = ONNXExporter().export(model.image_graph, images(2), tmp_path)
    x = images(4, seed=1)
    out = ONNXRuntimeBackend(path, num_threads=1, optimize=False)(x)[0]
    assert relative_error(out, run(model, x)) < 1e-6


@FOLDED
def test_bias_is_rounded_in_units_of_the_scale_of_its_channel(preset: str) -> None:
    prepared = calibrate(prepare(uneven(), preset))
    layer = prepared.model.get_submodule('backbone.wide')
    before = layer.bias.detach().clone()
    weight_scale = next(fq.scale.clone() for name, _, fq in prepared.weights() if name == 'backbone.wide')
    unit = weight_scale * prepared.image_graph.quantizers['activation_quantizers.gelu'].scale.repeat_interleave(2)
    prepared.pack()
    wanted = torch.round(before / unit) * unit if PRESETS[preset].bias_rounded else before
    torch.testing.assert_close(layer.bias, wanted)


@FOLDED
def test_scales_of_channels_are_learned(preset: str) -> None:
    x = images(16)
    found = quantize(uneven(), x, preset=preset, activation_bits=4, iterations=8, method='qdrop')
    nearest = quantize(uneven(), x, preset=preset, activation_bits=4, method='nearest')
    first, second = (q.model.image_graph.quantizers['activation_quantizers.gelu_1'].scale for q in (found, nearest))
    assert first.shape == (12,) and not torch.equal(first, second)
    assert torch.isfinite(found(x)).all()
