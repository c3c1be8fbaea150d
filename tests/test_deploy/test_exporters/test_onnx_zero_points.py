from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from small_models import conv, images, net, packed, relative_error, run
from torch import Tensor, nn

from mmbrecq.deploy.backends.onnxruntime import ONNXRuntimeBackend
from mmbrecq.deploy.exporters import ONNXExporter
from mmbrecq.deploy.verify.onnx_graph import OnnxGraph


def branches() -> nn.Module:
    """SiLU read by pointwise convolutions, at once and through a concatenation, by a sum, and by padded ones."""

    def forward(self: Any, x: Tensor) -> Tensor:
        a = F.silu(self.stem(x))
        b = F.silu(self.bare(a)) + a
        c = F.silu(self.left(b))
        d = F.max_pool2d(c, 3, 1, 1)
        e = F.silu(self.joined(torch.cat([c, d, F.silu(self.right(b))], 1)))
        return self.last(F.silu(self.padded(e)))

    model = net(
        forward, stem=conv(3, 4, 3), bare=conv(4, 4, 1, bias=False), left=conv(4, 4, 1), right=conv(4, 4, 1),
        joined=conv(12, 4, 1), padded=conv(4, 4, 3), last=conv(4, 2, 1),
    )  # fmt: skip
    with torch.no_grad():
        for layer in model.backbone.children():
            layer.weight.mul_(4)
    return model


def tokens() -> nn.Module:
    """GELU and LayerNorm read by linear layers on tokens, with and without a bias, and on vectors."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        x = self.bare(F.gelu(x))
        return self.last(F.gelu(x.flatten(1)[:, :16]))

    return net(
        forward, stem=nn.Conv2d(3, 8, 4, 4), norm=nn.LayerNorm(8), up=nn.Linear(8, 16), down=nn.Linear(16, 8),
        bare=nn.Linear(8, 8, bias=False), last=nn.Linear(16, 3),
    )  # fmt: skip


def exported(model: Any, folder: Path) -> Path:
    path: Path = ONNXExporter().export(model.image_graph, images(2), folder)
    return path


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('build', [branches, tokens])
def test_file_has_no_zero_points_and_computes_what_torch_simulates(tmp_path: Path, build: Any, bits: int) -> None:
    options: Any = {'first_last_8bit': False} if bits == 4 else {}
    model = packed(build(), 'tensorrt', 8, bits, **options)
    shifted = {n.rpartition('.')[2]: q for n, q in model.image_graph.quantizers.items() if not q.qtype.symmetric}
    expected = {'silu', 'add', 'silu_2', 'silu_5'} if build is branches else {'backbone_norm', 'gelu', 'gelu_1'}
    assert expected <= shifted.keys() and any(int(q.zero_point) for q in shifted.values())
    # a 3 x 3 convolution pads them with zeros
    assert 'silu_4' not in shifted
    path = exported(model, tmp_path)
    graph = OnnxGraph(onnx.load(path), path.name)
    assert not any(graph.zero_point(node).any() for node in graph.of_type('QuantizeLinear', 'DequantizeLinear'))
    x = images(8, seed=1)
    for optimize in (False, True):
        out = ONNXRuntimeBackend(path, num_threads=1, optimize=optimize)(x)[0]
        # single values round to the other of two neighbours
        assert relative_error(out, run(model, x)) < 1e-3


def test_a_layer_that_levels_share_has_a_bias_for_each(tmp_path: Path) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        return self.shared(F.silu(self.deep(x)) * 5.0) * self.shared(x)

    model = packed(net(forward, stem=conv(3, 4), deep=conv(4, 4, 1), shared=conv(4, 2, 1)), 'tensorrt')
    path = exported(model, tmp_path)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    biases = [stored[node.input[2]] for node in onnx.load(path).graph.node if node.op_type == 'Conv']
    first, second = (bias for bias in biases if bias.shape == (2,))
    assert not (first == second).any()
    x = images(4, seed=1)
    assert relative_error(ONNXRuntimeBackend(path, num_threads=1)(x)[0], run(model, x)) < 1e-4


def test_a_linear_layer_without_bias_whose_outputs_leave_the_network(tmp_path: Path) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.stem(x).flatten(2).transpose(1, 2)))

    model = packed(net(forward, stem=nn.Conv2d(3, 8, 4, 4), last=nn.Linear(8, 3, bias=False)), 'tensorrt')
    assert not model.image_graph.quantizers['activation_quantizers.gelu'].qtype.symmetric
    x = images(4, seed=1)
    found = ONNXRuntimeBackend(exported(model, tmp_path), num_threads=1)(x)[0]
    assert relative_error(found, run(model, x)) < 1e-4


def test_a_zero_point_makes_steps_of_silu_smaller() -> None:
    symmetric, shifted = (packed(branches(), 'tensorrt', symmetric=given).image_graph for given in (True, None))
    assert all(q.qtype.symmetric for q in symmetric.quantizers.values())
    for name in ('silu', 'silu_2', 'silu_5'):
        path = f'activation_quantizers.{name}'
        # from its least value, -0.28, to the largest, on 255 steps instead of 127 for the largest alone
        largest = 127 * symmetric.quantizers[path].scale
        torch.testing.assert_close(shifted.quantizers[path].scale, (largest + 0.2785) / 255, rtol=0.02, atol=0)
