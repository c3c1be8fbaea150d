"""A network with several outputs, whose heights and widths follow the image's: the shape of a detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from small_models import conv, images, net, packed
from torch import Tensor, nn

from mmbrecq.deploy.backends import ONNXRuntimeBackend, as_forward, open_backend
from mmbrecq.deploy.backends.onnxruntime import unshare_weights
from mmbrecq.deploy.exporters import ONNXExporter, OpenVINOExporter
from mmbrecq.deploy.exporters.base import count_quantized_calls
from mmbrecq.quantizers import QuantizedModel


def pyramid(self: Any, x: Tensor) -> Any:
    """Two levels, the upper one added to the lower as FPN does it, and a head that both share."""
    low = F.relu(self.stem(x))
    high = F.relu(self.down(low))
    low = low + F.interpolate(high, size=low.shape[2:], mode='nearest')
    return [self.scores(low), self.scores(high)], [self.boxes(low), self.boxes(high)]


@pytest.fixture
def model() -> QuantizedModel:
    layers = {'stem': conv(), 'down': conv(4, 4, stride=2), 'scores': conv(4, 2, 1), 'boxes': conv(4, 4, 1)}
    return packed(net(pyramid, **layers), 'academic', 4, 8)


@pytest.mark.parametrize('exporter', [ONNXExporter, OpenVINOExporter])
def test_nested_outputs_of_any_image_size(exporter: Any, model: QuantizedModel, tmp_path: Path) -> None:
    run = as_forward(open_backend(exporter().export(model.image_graph, images(2), tmp_path), num_threads=1))
    for batch, height, width in [(2, 16, 16), (1, 24, 10), (3, 7, 9)]:
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            wanted: Any = model(x)
        found = run(x)
        assert isinstance(found, tuple) and [len(level) for level in found] == [2, 2]
        for kind in (0, 1):
            for level in (0, 1):
                a, b = found[kind][level], wanted[kind][level]
                assert a.shape == b.shape
                # one value on a rounding tie may move by a step
                assert float(((a - b).abs() > 1e-4 * b.abs().max()).float().mean()) < 0.01


def test_names_and_free_axes(model: QuantizedModel, tmp_path: Path) -> None:
    proto = onnx.load(ONNXExporter().export(model.image_graph, images(2), tmp_path))
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.input}
    assert axes == {'images': ['batch', 3, 'height', 'width']}
    assert [v.name for v in proto.graph.output] == ['output_0_0', 'output_0_1', 'output_1_0', 'output_1_1']
    assert count_quantized_calls(model.image_graph) == 6


def test_a_classifier_keeps_its_height_and_width(tmp_path: Path) -> None:
    model = packed(
        net(lambda self, x: self.fc(self.stem(x).mean((2, 3))), stem=conv(), fc=torch.nn.Linear(4, 3)), 'academic'
    )
    proto = onnx.load(ONNXExporter().export(model.image_graph, images(2), tmp_path))
    shape = [d.dim_param or d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ['batch', *images(2).shape[1:]]
    assert [v.name for v in proto.graph.output] == ['output']


def test_a_quantizer_that_two_values_share(tmp_path: Path) -> None:
    """TensorRT wants equal scales of what is concatenated, so one quantizer is called for each."""

    def forward(self: Any, x: Tensor) -> Any:
        one, other = F.silu(self.one(x)), F.silu(self.other(x))
        return self.last(torch.cat([one, other], 1))

    model = packed(net(forward, one=conv(), other=conv(), last=conv(8, 3, 1)), 'tensorrt')
    assert len(model.image_graph.quantizers) == 2
    path = ONNXExporter().export(model.image_graph, images(2), tmp_path)
    x = images(3, seed=1)
    with torch.no_grad():
        wanted: Any = model(x)
    torch.testing.assert_close(
        open_backend(path, num_threads=1)(x)[0], wanted, rtol=0, atol=float(wanted.abs().max()) / 50
    )


@pytest.mark.parametrize('preset', ['onnxruntime', 'tensorrt'])
def test_weights_that_levels_share(preset: str, tmp_path: Path) -> None:
    """The file has them once; ONNX Runtime, asked for exact products, opens it on any processor."""
    layers = {'stem': conv(), 'down': conv(4, 4, stride=2), 'scores': conv(4, 2, 1), 'boxes': conv(4, 4, 1)}
    path = ONNXExporter().export(packed(net(pyramid, **layers), preset).image_graph, images(2), tmp_path)
    proto = onnx.load(path)
    weights = [node.input[0] for node in proto.graph.node if node.op_type == 'DequantizeLinear']
    assert sum(name.startswith('backbone.scores.') for name in weights) == 2
    assert len({name for name in weights if name.startswith('backbone.scores.')}) == 1
    backend = ONNXRuntimeBackend(path, num_threads=1)
    plain = ONNXRuntimeBackend(path, num_threads=1, optimize=False)
    x = images(2, seed=1)
    for found, wanted in zip(backend(x), plain(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=float(wanted.abs().max()) / 25)
    assert backend.integer_kernels().quantized == 6
    assert unshare_weights(proto) and not unshare_weights(proto)


def constants(self: Any, x: Tensor) -> Tensor:
    """Two learned constants that layers read, for every image."""
    first, second = (table.expand(x.shape[0], -1, -1) for table in (self.first, self.second))
    return self.last(self.stem(x) * (self.a(first) + self.b(second))[..., None])


def test_constants_that_share_a_zero_point(tmp_path: Path) -> None:
    model = net(constants, stem=conv(), a=nn.Linear(3, 1), b=nn.Linear(3, 1), last=conv(4, 2))
    model.backbone.first, model.backbone.second = (nn.Parameter(torch.randn(1, 4, 3)) for _ in range(2))
    path = ONNXExporter().export(packed(model, 'tensorrt').image_graph, images(2), tmp_path)
    exact, plain = (ONNXRuntimeBackend(path, num_threads=1, optimize=optimize) for optimize in (True, False))
    (wanted,) = plain(images(3))
    torch.testing.assert_close(exact(images(3))[0], wanted, rtol=0, atol=float(wanted.abs().max()) / 50)
