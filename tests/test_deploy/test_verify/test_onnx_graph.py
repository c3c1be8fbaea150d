"""How layers, weights and expectations are recognised in ONNX."""

from __future__ import annotations

from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest

from mmbrecq.deploy.verify import ExpectedQuantization, Grid, verify_file
from mmbrecq.deploy.verify.onnx_graph import integer_range


def linear(op: str, axis: int, transpose: bool = False, **attributes: int) -> onnx.ModelProto:
    """One linear layer on a (N, 4) input whose weight has its scales along ``axis``."""
    b = graphs.Builder()
    x = b.qdq(b.node('Flatten', [b.node('GlobalAveragePool', ['x'], 'gap')], 'flat'), 'a')
    rows = (6, 4) if transpose or attributes.get('transB') else (4, 6)
    weight = b.weight('fc', rows, axis)
    if transpose:
        weight = b.node('Transpose', [weight], 'turn', perm=[1, 0])
    return b.model(b.node(op, [x, weight], 'fc', **attributes), ['N', 6])


@pytest.mark.parametrize(
    ('model', 'right'),
    [
        (linear('MatMul', 1), True),
        (linear('MatMul', 0), False),
        (linear('MatMul', 0, transpose=True), True),
        (linear('MatMul', 1, transpose=True), False),
        (linear('Gemm', 1), True),
        (linear('Gemm', 0, transB=1), True),
        (linear('Gemm', 1, transB=1), False),
    ],
)
def test_channel_axis_of_a_linear_layer(tmp_path: Path, model: onnx.ModelProto, right: bool) -> None:
    violations = verify_file(graphs.save(model, tmp_path), 'academic', ExpectedQuantization(1))
    assert [(v.rule, v.node) for v in violations] == ([] if right else [('C3', 'fc_w_DQ')])


@pytest.mark.parametrize(('axis', 'right'), [(1, True), (0, False)])
def test_channel_axis_of_a_transposed_convolution(tmp_path: Path, axis: int, right: bool) -> None:
    b = graphs.Builder()
    weight = b.weight('up', (4, 6, 2, 2), axis)
    model = b.model(b.node('ConvTranspose', [b.qdq('x', 'in'), weight], 'up', strides=[2, 2]))
    assert [v.rule for v in verify_file(graphs.save(model, tmp_path), 'tensorrt')] == (
        ['T1', 'T1'] if right else ['C3', 'T1', 'T1']
    )


def test_depthwise_and_shared_weights_count_per_call(tmp_path: Path) -> None:
    b = graphs.Builder(signed=True)
    x = b.qdq('x', 'in')
    y = b.conv(x, 'dw', group=4)
    z = b.node('Conv', [b.qdq(y, 'a1'), 'dw_w_DQ_out', 'dw_b'], 'again', group=4, pads=[1] * 4)
    path = graphs.save(b.model(z), tmp_path)
    assert verify_file(path, 'tensorrt', ExpectedQuantization(2)) == []


def test_matmul_of_two_activations_is_no_layer(tmp_path: Path) -> None:
    b = graphs.Builder()
    path = graphs.save(b.model(b.node('MatMul', [b.qdq('x', 'in'), 'x'], 'attention')), tmp_path)
    assert verify_file(path, 'openvino', ExpectedQuantization(0)) == []


def test_relu6_is_no_grid_clip(tmp_path: Path) -> None:
    model = graphs.chain()
    bounds = [graphs.add_tensor(model, name, np.float32(value)) for name, value in (('zero', 0), ('six', 6))]
    graphs.insert(model, 'Clip', 'relu6', 'a1_Q', bounds)
    assert verify_file(graphs.save(model, tmp_path), 'academic') == []


def test_bounds_of_an_activation_function_behind_a_cast(tmp_path: Path) -> None:
    """torch writes the bounds of Hardsigmoid as Constant - Cast."""
    model = graphs.chain()
    bounds = [graphs.add_tensor(model, name, np.float64(value)) for name, value in (('zero', 0), ('one', 1))]
    graphs.insert(model, 'Clip', 'limit', 'a1_Q', bounds)
    for index, name in ((1, 'zero'), (2, 'one')):
        cast = onnx.helper.make_node('Cast', [name], [f'{name}_cast'], to=onnx.TensorProto.FLOAT)
        model.graph.node.insert(0, cast)
        graphs.rewire(model, 'limit', index, f'{name}_cast')
    path = graphs.save(model, tmp_path)
    assert verify_file(path, 'onnxruntime', ExpectedQuantization(3)) == []
    graphs.set_tensor(model, 'one', np.float64(0.333))
    assert [v.node for v in verify_file(graphs.save(model, tmp_path), 'onnxruntime')] == ['limit']


def told(weights: dict | None = None, *activations: tuple[int, int]) -> ExpectedQuantization:
    grids = frozenset(Grid((float(np.float32(graphs.SCALE)),), (0,), *ends) for ends in activations)
    return ExpectedQuantization(3, weights, grids or None)


@pytest.mark.parametrize(
    ('expected', 'broken'),
    [
        (told({'conv1': (-2, 1), 'conv2': (-2, 1), 'fc': (-128, 127)}, (0, 15)), set()),
        (told({'conv1': (-1, 1), 'conv2': (-8, 7), 'fc': (-8, 7)}), {('C6', 'conv1_w_DQ')}),
        (told({'conv1': (-8, 7), 'conv2': (-8, 7)}), {('C6', 'fc_w_DQ')}),
        (told(None, (0, 15), (0, 255)), set()),
        (told(None, (0, 7)), {('C7', f'{name}_clip') for name in ('in', 'a1', 'a2', 'a3', 'a4')}),
    ],
)
@pytest.mark.parametrize('integer', [False, True])
def test_expected_bits(tmp_path: Path, expected: ExpectedQuantization, broken: set, integer: bool) -> None:
    model = graphs.chain(bits=4, integer=integer)
    for name in ('conv1', 'conv2', 'fc'):
        graphs.rename_tensor(model, f'{name}_w', f'{name}.parametrizations.weight.original0')
    path = graphs.save(model, tmp_path)
    assert {(v.rule, v.node) for v in verify_file(path, 'academic', expected)} == broken


def test_expected_bits_of_unclipped_and_wide_tensors(tmp_path: Path) -> None:
    model = graphs.chain(bits=8)
    graphs.set_tensor(model, 'conv1_w', np.arange(144).reshape(4, 4, 3, 3).astype(np.int8))
    graphs.set_tensor(model, 'a2_scale', np.float32(0.1))
    expected = told({'conv1_w': (-2, 1), 'conv2_w': (-2, 1), 'fc_w': (-2, 1)}, (0, 15))
    violations = {v.node: v.message for v in verify_file(graphs.save(model, tmp_path), 'academic', expected)}
    assert violations['conv1_w_DQ'] == 'expected integers in -2..1, but got -128..127'
    assert violations['a1_Q'] == 'expected the integers 0..15, but got 0..255 (scale 0.05, zero-point 0)'
    assert violations['a2_Q'] == 'expected a grid of the model, but got 0..255 (scale 0.1, zero-point 0)'


def test_grid_that_ends_where_an_activation_function_does(tmp_path: Path) -> None:
    """A Clip to 0..6 is ReLU6 or, with the step 2, a grid of 2 bits."""
    model = graphs.chain(bits=2)
    for name in ('in', 'a1', 'a2', 'a3', 'a4'):
        graphs.set_tensor(model, f'{name}_scale', np.float32(2))
        graphs.set_tensor(model, f'{name}_h', np.float32(6))
    path, scales = graphs.save(model, tmp_path), ((2.0,), (0,))
    for high, broken in ((3, 0), (255, 0), (7, 5)):
        expected = ExpectedQuantization(3, None, frozenset([Grid(*scales, 0, high)]))
        assert len(verify_file(path, 'academic', expected)) == broken


@pytest.mark.parametrize('dtype', [np.int8, np.uint8, np.int16, np.int32])
def test_integer_range(dtype: type[np.integer]) -> None:
    assert integer_range(np.dtype(dtype)) == (np.iinfo(dtype).min, np.iinfo(dtype).max)


def test_integer_range_of_packed_and_other_types() -> None:
    packed = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.INT4)
    assert integer_range(packed) == (-8, 7)
    assert integer_range(np.dtype(np.float32)) is None
    assert integer_range(np.dtype(bool)) is None
