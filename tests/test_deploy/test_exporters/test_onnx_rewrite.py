from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_models import classifier, images, packed

from mmbrecq.deploy.backends import KernelCount, ONNXRuntimeBackend, OpenVINOBackend
from mmbrecq.deploy.exporters.onnx import onnx_model
from mmbrecq.deploy.exporters.onnx_rewrite import clip_signed_values, rewrite_for
from mmbrecq.deploy.exporters.openvino import convert
from mmbrecq.presets import PRESETS


def run_as_written(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def model_of(nodes: list[Any], tensors: dict[str, Any], shape: list[Any]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        'net',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, ['N', 'K'])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=9)


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize('preset', PRESETS)
def test_bias_of_a_linear_layer_is_added_apart_where_the_preset_says_so(preset: str) -> None:
    rng = np.random.default_rng(0)
    tensors = {'w': rng.normal(size=(5, 12)).astype(np.float32), 'b': rng.normal(size=5).astype(np.float32)}
    nodes = [
        helper.make_node('Flatten', ['x'], ['flat'], name='flatten'),
        helper.make_node('Gemm', ['flat', 'w', 'b'], ['y'], name='fc', transB=1),
    ]
    model = model_of(nodes, tensors, ['N', 3, 2, 2])
    x = rng.normal(size=(4, 3, 2, 2)).astype(np.float32)
    rewrite_for(model, PRESETS[preset])
    onnx.checker.check_model(model)
    expected = {'linear': ['Flatten', 'Gemm', 'Add'], 'all': ['Flatten', 'Gemm', 'Add'], 'none': ['Flatten', 'Gemm']}
    assert ops(model) == expected[PRESETS[preset].bias_apart]
    wanted = x.reshape(4, -1) @ tensors['w'].T + tensors['b']
    np.testing.assert_allclose(run_as_written(model, x), wanted, rtol=1e-5, atol=1e-6)


def test_flatten_along_another_axis_stays() -> None:
    model = model_of([helper.make_node('Flatten', ['x'], ['y'], name='f', axis=2)], {}, ['N', 3, 2, 2])
    rewrite_for(model, PRESETS['onnxruntime'])
    assert ops(model) == ['Flatten']


def test_shared_zero_points_become_each_weights_own() -> None:
    """As the exporter of torch writes equal tensors: once, and an Identity for every other reader."""
    zero, scale = np.int8(0), np.float32(0.5)
    tensors = {'w1': np.int8([[100, -100]]), 'w2': np.int8([[90], [-90]]), 'z': zero, 's': scale}
    nodes = [
        helper.make_node('Identity', ['z'], ['z2'], name='alias'),
        helper.make_node('QuantizeLinear', ['x', 's', 'z'], ['q'], name='Q'),
        helper.make_node('DequantizeLinear', ['q', 's', 'z2'], ['dq'], name='DQ'),
        helper.make_node('DequantizeLinear', ['w1', 's', 'z2'], ['w1_dq'], name='DQ1'),
        helper.make_node('DequantizeLinear', ['w2', 's', 'z'], ['w2_dq'], name='DQ2'),
        helper.make_node('MatMul', ['dq', 'w2_dq'], ['h'], name='first'),
        helper.make_node('MatMul', ['h', 'w1_dq'], ['y'], name='second'),
    ]
    model = model_of(nodes, tensors, ['N', 2])
    x = np.float32([[1, 2], [-3, 0.4]])
    wanted = run_as_written(model, x)
    rewrite_for(model, PRESETS['tensorrt'])
    onnx.checker.check_model(model)
    assert 'Identity' not in ops(model)
    weights = [node for node in model.graph.node if node.name in ('DQ1', 'DQ2')]
    others = {name for node in model.graph.node if node not in weights for name in node.input}
    found = [node.input[2] for node in weights]
    assert len(set(found)) == 2 and not others & set(found)
    np.testing.assert_array_equal(run_as_written(model, x), wanted)


@pytest.mark.parametrize('preset', PRESETS)
def test_exported_weights_share_no_zero_point(preset: str) -> None:
    model = onnx_model(packed(classifier('resnet'), preset).image_graph, images(2), 17)
    stored = {tensor.name for tensor in model.graph.initializer}
    weights = [n for n in model.graph.node if n.op_type == 'DequantizeLinear' and n.input[0] in stored]
    assert len(weights) == 21
    assert set(Counter(node.input[2] for node in weights).values()) == {1}
    read = {name for node in model.graph.node for name in node.input}
    assert stored <= read, 'an initializer that nobody reads'


def quantized(dtype: Any, zero: int, low: int, high: int, scale: Any = 0.3) -> onnx.ModelProto:
    """Q - Clip of integers - DQ."""
    scale = np.float32(scale)
    axis = {'axis': 1} if scale.ndim else {}
    tensors = {'s': scale, 'z': np.full(scale.shape, zero, dtype), 'l': dtype(low)}
    nodes = [
        helper.make_node('Constant', [], ['h'], name='bound', value=numpy_helper.from_array(np.asarray(dtype(high)))),
        helper.make_node('QuantizeLinear', ['x', 's', 'z'], ['q'], name='Q', **axis),
        helper.make_node('Clip', ['q', 'l', 'h'], ['c'], name='C'),
        helper.make_node('DequantizeLinear', ['c', 's', 'z'], ['y'], name='DQ', **axis),
    ]
    return model_of(nodes, tensors, ['N', 2])


@pytest.mark.parametrize(('zero', 'low', 'high'), [(0, -8, 7), (0, 0, 15), (3, -4, 3)])
def test_clip_of_int8_moves_before_the_quantizer(zero: int, low: int, high: int) -> None:
    model = quantized(np.int8, zero, low, high)
    x = np.linspace(-9, 9, 400, dtype=np.float32).reshape(-1, 2)
    wanted = run_as_written(model, x)
    by_hand = (np.clip(np.round(x / np.float32(0.3)) + zero, low, high) - zero) * np.float32(0.3)
    np.testing.assert_allclose(wanted, by_hand, rtol=1e-6, atol=1e-6)
    clip_signed_values(model)
    onnx.checker.check_model(model)
    assert ops(model) == ['Clip', 'QuantizeLinear', 'DequantizeLinear']
    np.testing.assert_array_equal(run_as_written(model, x), wanted)
    clip_signed_values(model)
    assert ops(model) == ['Clip', 'QuantizeLinear', 'DequantizeLinear']


@pytest.mark.parametrize(
    'model', [quantized(np.uint8, 0, 0, 15), quantized(np.int8, 0, -8, 7, [0.3, 0.4])], ids=['uint8', 'per channel']
)
def test_other_clips_of_integers_stay(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    clip_signed_values(model)
    assert model.SerializeToString() == before


def test_rewrites_keep_what_the_exported_graph_computes() -> None:
    """Against the file that torch writes, before any rewrite."""
    model = packed(classifier('resnet'), 'onnxruntime', 4, 4)
    buffer = io.BytesIO()
    options = {'dynamo': False} if torch.__version__ >= '2.5' else {}
    with torch.no_grad():
        torch.onnx.export(
            model.image_graph.compiled, (images(2),), buffer, opset_version=17, do_constant_folding=False, **options
        )
    plain = onnx.load_from_string(buffer.getvalue())
    x = images(2, seed=1).numpy()
    np.testing.assert_allclose(
        run_as_written(onnx_model(model.image_graph, images(2), 17), x), run_as_written(plain, x), rtol=1e-6, atol=1e-6
    )  # fmt: skip


def qdq(name: str, source: str, axis: int | None = None) -> list[Any]:
    """Q and DQ of an activation, or with an axis the DQ of stored integers."""
    grid = [f'{name}_s', f'{name}_z']
    if axis is not None:
        return [helper.make_node('DequantizeLinear', [source, *grid], [name], name=f'{name}_dq', axis=axis)]
    return [
        helper.make_node('QuantizeLinear', [source, *grid], [f'{name}_q'], name=f'{name}_q'),
        helper.make_node('DequantizeLinear', [f'{name}_q', *grid], [name], name=f'{name}_dq'),
    ]


def grids(rng: np.random.Generator, channels: int) -> dict[str, Any]:
    return {
        'a_s': np.float32(0.05), 'a_z': np.uint8(100),
        'w_s': rng.uniform(0.01, 0.02, channels).astype(np.float32), 'w_z': np.zeros(channels, np.int8),
    }  # fmt: skip


def test_weight_of_a_linear_layer_on_tokens_leaves_transposed() -> None:
    rng = np.random.default_rng(0)
    tensors = {'codes': rng.integers(-60, 60, (5, 6)).astype(np.int8), **grids(rng, 5)}
    transpose = helper.make_node('Transpose', ['w'], ['wt'], name='t', perm=[1, 0])
    matmul = helper.make_node('MatMul', ['a', 'wt'], ['y'], name='mm')
    model = model_of([*qdq('a', 'x'), *qdq('w', 'codes', 0), transpose, matmul], tensors, ['N', 4, 6])
    x = rng.normal(size=(2, 4, 6)).astype(np.float32)
    before = run_as_written(model, x)
    rewrite_for(model, PRESETS['onnxruntime'])
    assert ops(model) == ['QuantizeLinear', 'DequantizeLinear', 'DequantizeLinear', 'MatMul']
    np.testing.assert_array_equal(run_as_written(model, x), before)
    assert [tuple(t.dims) for t in model.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) == 2] == [
        (6, 5)
    ]


@pytest.mark.parametrize(('preset', 'pairs'), [('onnxruntime', 2), ('tensorrt', 1)])
def test_onnx_runtime_finds_a_quantizer_right_before_a_layer(tmp_path: Path, preset: str, pairs: int) -> None:
    rng = np.random.default_rng(0)
    tensors = {'codes': rng.integers(-60, 60, (5, 3, 1, 1)).astype(np.int8), **grids(rng, 5)}
    tensors |= {'sizes': np.array([3, 1]), 'b_s': np.float32(0.1), 'b_z': np.uint8(128)}
    part = helper.make_node('Split', ['a', 'sizes'], ['part', 'rest'], name='split', axis=1)
    conv = helper.make_node('Conv', ['part', 'w'], ['c'], name='conv')
    last = helper.make_node('Identity', ['b'], ['y'])
    nodes = [*qdq('a', 'x'), *qdq('w', 'codes', 0), part, conv, *qdq('b', 'c'), last]
    model = model_of(nodes, tensors, ['N', 4, 4, 4])
    x = rng.normal(size=(2, 4, 4, 4)).astype(np.float32)
    before = run_as_written(model, x)
    rewrite_for(model, PRESETS[preset])
    assert Counter(ops(model))['QuantizeLinear'] == pairs + 1
    np.testing.assert_array_equal(run_as_written(model, x), before)
    onnx.save(model, tmp_path / 'm.onnx')
    reason = 'Split stands between the quantization of its input and the layer'
    count = ONNXRuntimeBackend(tmp_path / 'm.onnx', num_threads=1).integer_kernels()
    assert count == (KernelCount(1, 1) if pairs == 2 else KernelCount(1, 0, {'conv': reason}))


def test_values_that_are_moved_out_of_the_graph_keep_their_middle() -> None:
    """A zero-point is taken from an int8 grid, and from what leaves the graph behind a node that moves it."""
    tensors = {'b_s': np.float32(0.1), 'b_z': np.int8(28), 'shape': np.array([-1, 4])}
    move = helper.make_node('Reshape', ['b', 'shape'], ['y'], name='move')
    model = model_of([*qdq('b', 'x'), move], tensors, ['N', 4])
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    before = run_as_written(model, x)
    rewrite_for(model, PRESETS['tensorrt'])
    assert ops(model) == ['Add', 'QuantizeLinear', 'DequantizeLinear', 'Sub', 'Reshape']
    np.testing.assert_allclose(run_as_written(model, x), before, atol=1e-6)


@pytest.mark.parametrize('bias', [None, 'zeros'])
def test_openvino_is_right_where_several_nodes_read_a_convolution_without_bias(
    tmp_path: Path, bias: str | None
) -> None:
    """It is not with 2026.4 and the file as torch writes it: off by the power of the outputs."""
    rng = np.random.default_rng(0)
    tensors = {'codes': rng.integers(-60, 60, (16, 8, 3, 3)).astype(np.int8), **grids(rng, 16)}
    tensors |= {'zeros': np.zeros(16, np.float32)} if bias else {}
    inputs = ['a', 'w', bias] if bias else ['a', 'w']
    conv = helper.make_node('Conv', inputs, ['c'], name='conv', pads=[1, 1, 1, 1])
    nodes = [*qdq('a', 'x'), *qdq('w', 'codes', 0), conv, helper.make_node('Relu', ['c'], ['r'], name='r')]
    model = model_of([*nodes, helper.make_node('Sub', ['r', 'c'], ['y'], name='sub')], tensors, ['N', 8, 8, 8])
    x = rng.normal(size=(2, 8, 8, 8)).astype(np.float32)
    before = run_as_written(model, x)
    rewrite_for(model, PRESETS['openvino'])
    np.testing.assert_array_equal(run_as_written(model, x), before)
    np.testing.assert_allclose(run_in_openvino(model, x, tmp_path), before, atol=1e-3)


def test_openvino_reads_a_constant_on_a_grid_as_values(tmp_path: Path) -> None:
    """Learned queries, split in two, of which a layer reads one."""
    rng = np.random.default_rng(0)
    tensors = {'codes': rng.integers(-60, 60, (8, 6)).astype(np.int8), **grids(rng, 6), 'halves': np.array([8, 8])}
    tensors |= {'queries': rng.normal(size=(5, 16)).astype(np.float32), 'zero': np.array([0])}
    nodes = [*qdq('a', 'queries'), helper.make_node('Split', ['a', 'halves'], ['p', 'q'], name='split', axis=1)]
    nodes += [helper.make_node('Unsqueeze', ['p', 'zero'], ['u'], name='u')]
    nodes += [helper.make_node('Shape', ['x'], ['shape'], name='shape')]
    nodes += [helper.make_node('Expand', ['u', 'shape'], ['e'], name='e')]
    nodes += [*qdq('w', 'codes', 1), helper.make_node('MatMul', ['e', 'w'], ['m'], name='m')]
    nodes += [
        helper.make_node('ReduceSum', ['q'], ['s'], name='s'),
        helper.make_node('Add', ['m', 's'], ['y'], name='y'),
    ]
    model = model_of(nodes, tensors, ['N', 5, 8])
    x = rng.normal(size=(2, 5, 8)).astype(np.float32)
    before = run_as_written(model, x)
    rewrite_for(model, PRESETS['openvino'])
    np.testing.assert_allclose(run_as_written(model, x), before, atol=1e-6)
    # the constant is no longer brought to a grid, but what the layer reads
    assert [node.input[0] for node in model.graph.node if node.op_type == 'QuantizeLinear'] == ['e']
    np.testing.assert_allclose(run_in_openvino(model, x, tmp_path), before, atol=1e-3)


def test_openvino_takes_one_index_of_scales_per_channel(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {'codes': rng.integers(-60, 60, (8, 6)).astype(np.int8), **grids(rng, 6), 'one': np.array(1)}
    nodes = [*qdq('a', 'x'), *qdq('w', 'codes', 1), helper.make_node('MatMul', ['a', 'w'], ['m'], name='m')]
    nodes += [helper.make_node('Gather', [a, 'one'], [b], name=b, axis=1) for a, b in (('m', 'g'), ('g', 'h'))]
    nodes += [helper.make_node('Transpose', ['h'], ['y'], name='t', perm=[1, 0])]
    model = model_of(nodes, tensors, ['N', 4, 5, 8])
    x = rng.normal(size=(2, 4, 5, 8)).astype(np.float32)
    before = run_as_written(model, x)
    rewrite_for(model, PRESETS['openvino'])
    np.testing.assert_allclose(run_in_openvino(model, x, tmp_path), before, atol=1e-3)


def run_in_openvino(model: onnx.ModelProto, x: np.ndarray, folder: Path) -> np.ndarray:
    onnx.save(model, folder / 'm.onnx')
    openvino.save_model(convert(folder / 'm.onnx'), folder / 'm.xml', compress_to_fp16=False)
    return OpenVINOBackend(folder / 'm.xml', num_threads=1)(torch.from_numpy(x))[0].numpy()
