from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from small_models import classifier, conv, images, net, packed, residual, run
from torch import Tensor, nn

from mmbrecq.deploy.backends import KernelCount
from mmbrecq.deploy.backends.onnxruntime import ONNXRuntimeBackend
from mmbrecq.deploy.exporters import ONNXExporter
from mmbrecq.deploy.exporters.base import count_quantized_calls
from mmbrecq.deploy.verify import ExpectedQuantization, verify_file
from mmbrecq.errors import ExportError
from mmbrecq.presets import PRESETS
from mmbrecq.quantizers import QuantizedModel

BITS = [(8, 8), (4, 8), (2, 4)]


def moved_images(found: Tensor, wanted: Tensor) -> int:
    """Images of which an output differs by more than float32 summation explains: a value fell on a rounding tie."""
    off = (found - wanted).abs() > 2e-5 * wanted.abs().max()
    return int(off.flatten(1).any(1).sum())


def as_written(path: Path, x: Tensor) -> list[Tensor]:
    """Runs every Q and DQ as the file has it, in float."""
    return ONNXRuntimeBackend(path, num_threads=1, optimize=False)(x)


@pytest.mark.parametrize('bits', BITS, ids=lambda bits: f'W{bits[0]}A{bits[1]}')
@pytest.mark.parametrize('preset', PRESETS)
def test_file_keeps_the_rules_and_computes_what_torch_simulates(
    tmp_path: Path, preset: str, bits: tuple[int, int]
) -> None:
    model = packed(classifier('resnet'), preset, *bits)
    path = ONNXExporter().export(model.image_graph, images(2), tmp_path)
    assert path == tmp_path / 'model.onnx' and [p.name for p in tmp_path.iterdir()] == ['model.onnx']
    assert count_quantized_calls(model.image_graph) == 21
    assert verify_file(path, preset, ExpectedQuantization(21)) == []
    x = images(8, seed=1)
    # none of the 8 falls on a tie where this was written; one may where sums are added up in another order
    assert moved_images(as_written(path, x)[0], run(model, x)) <= 1


@pytest.mark.parametrize('preset', PRESETS)
def test_grouped_convolutions(tmp_path: Path, preset: str) -> None:
    model = packed(classifier('regnet'), preset, 4, 4)
    path = ONNXExporter().export(model.image_graph, images(2), tmp_path)
    x = images(8, seed=1)
    assert moved_images(as_written(path, x)[0], run(model, x)) <= 1


@pytest.mark.parametrize('name', ['resnet', 'mobilenetv2'])
def test_every_layer_runs_in_integers(tmp_path: Path, name: str) -> None:
    model = packed(classifier(name), 'onnxruntime', 8, 8)
    backend = ONNXRuntimeBackend(ONNXExporter().export(model.image_graph, images(2), tmp_path), num_threads=1)
    kernels = backend.integer_kernels()
    assert kernels.float_layers == {}
    assert (
        kernels.integer
        == kernels.quantized
        == count_quantized_calls(model.image_graph)
        == {'resnet': 21, 'mobilenetv2': 53}[name]
    )


@pytest.mark.parametrize('bits', BITS, ids=lambda bits: f'W{bits[0]}A{bits[1]}')
def test_integer_kernels_give_the_simulated_integers(tmp_path: Path, bits: tuple[int, int]) -> None:
    """The last layer copies channels, so that its output shows the integers of the activation before it."""
    copy = conv(4, 4, 1, bias=False)
    model = net(lambda self, x: self.copy(F.relu(self.conv(x))), conv=conv(), copy=copy)
    with torch.no_grad():
        copy.weight.copy_(torch.eye(4)[:, :, None, None])
    prepared = packed(model, 'onnxruntime', *bits)
    path = ONNXExporter().export(prepared.image_graph, images(2), tmp_path)
    step = prepared.image_graph.quantizers['activation_quantizers.relu'].scale
    x = images(4, seed=1)
    found, wanted = ((values / step).round() for values in (ONNXRuntimeBackend(path, 1)(x)[0], run(prepared, x)))
    assert len(wanted.unique()) > 2 ** bits[1] // 2
    distance = (found - wanted).abs()
    # none of the 16,384 is another where this was written; ties may fall otherwise on another CPU
    assert distance.max() <= 1
    assert int((distance > 0).sum()) <= 4


@pytest.mark.parametrize('bits', BITS[:2], ids=lambda bits: f'W{bits[0]}A{bits[1]}')
def test_integer_kernels_compute_a_whole_network_as_simulated(tmp_path: Path, bits: tuple[int, int]) -> None:
    """None of the 16 images differs where this was written; one may where sums are added up in another order."""
    model = packed(classifier('resnet'), 'onnxruntime', *bits)
    path = ONNXExporter().export(model.image_graph, images(2), tmp_path)
    x = images(16, seed=1)
    assert moved_images(ONNXRuntimeBackend(path, 1)(x)[0], run(model, x)) <= 1


@pytest.mark.parametrize(
    ('name', 'weight_bits', 'activation_bits'), [('resnet', *b) for b in BITS] + [('mobilenetv2', 8, 8)]
)
def test_file_for_tensorrt_runs_in_onnxruntime(
    tmp_path: Path, name: str, weight_bits: int, activation_bits: int
) -> None:
    model = packed(classifier(name), 'tensorrt', weight_bits, activation_bits)
    path = ONNXExporter().export(model.image_graph, images(2), tmp_path)
    assert not [v for v in verify_file(path, 'tensorrt') if v.rule.startswith('T')]
    x = images(4, seed=1)
    wanted = run(model, x)
    found = ONNXRuntimeBackend(path, num_threads=1)(x)[0]
    assert found.shape == wanted.shape and bool(torch.isfinite(found).all())
    assert moved_images(as_written(path, x)[0], wanted) <= 1


def test_weights_are_stored_as_the_packed_integers(tmp_path: Path) -> None:
    model = packed(residual(), 'openvino', 4, 8)
    path = ONNXExporter().export(model.image_graph, images(2), tmp_path)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for layer in model.layers:
        codes, scale = (stored[f'{layer.name}.parametrizations.weight.original{i}'] for i in range(2))
        weight = run(lambda name=layer.name: model.model.get_submodule(name).weight).numpy()
        shape = (-1, *[1] * (weight.ndim - 1))
        assert codes.dtype == np.int8
        np.testing.assert_allclose(codes * scale.reshape(shape), weight, rtol=1e-6, atol=0)


def test_batch_size_is_free(tmp_path: Path) -> None:
    model = packed(residual(), 'onnxruntime')
    path = ONNXExporter().export(model.image_graph, images(2), tmp_path)
    for count in (1, 5):
        assert as_written(path, images(count, seed=1))[0].shape == (count, 5)
    graph = onnx.load(path).graph
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == 'batch'


def test_activations_in_float(tmp_path: Path) -> None:
    model = packed(residual(), 'academic', 4, None)
    path = ONNXExporter().export(model.image_graph, images(2), tmp_path)
    ops = [node.op_type for node in onnx.load(path).graph.node]
    assert 'QuantizeLinear' not in ops and ops.count('DequantizeLinear') == 5
    x = images(8, seed=1)
    torch.testing.assert_close(as_written(path, x)[0], run(model, x), rtol=1e-4, atol=1e-5)


def shared_head() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        fine = F.relu(self.stem(x))
        coarse = F.relu(self.down(fine))
        return self.head(fine).mean((2, 3)) + self.head(coarse).mean((2, 3))

    return net(forward, stem=conv(), down=conv(4, 4), head=conv(4, 6))


@pytest.mark.parametrize('preset', PRESETS)
def test_shared_layer_counts_once_per_call(tmp_path: Path, preset: str) -> None:
    model = packed(shared_head(), preset, 8, 8)
    assert count_quantized_calls(model.image_graph) == 4
    path = ONNXExporter().export(model.image_graph, images(2), tmp_path)
    x = images(4, seed=1)
    wanted = run(model, x)
    assert moved_images(as_written(path, x)[0], wanted) <= 1
    assert ONNXRuntimeBackend(path, num_threads=1)(x)[0].shape == wanted.shape


@pytest.mark.parametrize('opset', [13, 20])
def test_opsets(tmp_path: Path, opset: int) -> None:
    model = packed(residual(), 'onnxruntime', 4, 4)
    path = ONNXExporter('net.onnx', opset).export(model.image_graph, images(2), tmp_path / 'new' / 'folder')
    assert path.name == 'net.onnx'
    assert {o.domain: o.version for o in onnx.load(path).opset_import}[''] == opset
    assert moved_images(as_written(path, images())[0], run(model, images())) <= 1


@pytest.mark.parametrize('opset', [12, 21, 0])
def test_opset_out_of_range(opset: int) -> None:
    with pytest.raises(ExportError, match=f'^expected opset in 13..20, but got {opset}$'):
        ONNXExporter(opset=opset)


def test_wrong_suffix() -> None:
    with pytest.raises(ExportError, match=re.escape("expected the exported file to end with '.onnx', but got 'a.xml'")):
        ONNXExporter('a.xml')


def test_model_stays_as_it_was(tmp_path: Path) -> None:
    model: QuantizedModel = packed(residual(), 'openvino', 4, 4)
    before = run(model, images())
    state = {name: value.clone() for name, value in model.model.state_dict().items()}
    ONNXExporter().export(model.image_graph, images(2), tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in model.model.state_dict().items())
    torch.testing.assert_close(run(model, images()), before, rtol=0, atol=0)


@pytest.mark.parametrize('bits', [8, 4])
def test_layers_behind_concatenations_run_in_integers(tmp_path: Path, bits: int) -> None:
    """Of rectified and signed values, and behind a pooling: see :func:`mmbrecq.graph.placement._joins_grids`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = torch.cat([F.relu(self.left(x)), self.right(x)], 1)
        y = torch.cat([y, F.relu(self.middle(y))], 1)
        return self.fc(self.last(F.max_pool2d(y, 2)).mean((2, 3)))

    model = net(
        forward, stem=conv(), left=conv(4, 4), right=conv(4, 4), middle=conv(8, 4), last=conv(12, 4), fc=nn.Linear(4, 5)
    )
    model = packed(model, 'onnxruntime', 8, bits)
    path = ONNXExporter().export(model.image_graph, images(2), tmp_path)
    backend, x = ONNXRuntimeBackend(path, num_threads=1), images(4, seed=1)
    assert backend.integer_kernels() == KernelCount(6, 6)
    assert moved_images(backend(x)[0], run(model, x)) == moved_images(as_written(path, x)[0], run(model, x)) == 0
