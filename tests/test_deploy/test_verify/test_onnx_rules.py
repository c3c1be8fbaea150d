"""Every rule on ONNX: a valid graph passes all presets that fit it, one change is reported by rule and node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest

from mmbrecq.deploy.verify import ExpectedQuantization, Grid, verify_file

Change = Callable[[onnx.ModelProto], object]


def found(model: onnx.ModelProto, folder: Path, preset: str, expected: ExpectedQuantization | None = None) -> set:
    return {(v.rule, v.node) for v in verify_file(graphs.save(model, folder), preset, expected)}


@pytest.mark.parametrize('opset', [17, 21])
@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize(
    ('signed', 'preset'),
    [(False, 'academic'), (False, 'onnxruntime'), (False, 'openvino'), (True, 'openvino'), (True, 'tensorrt')],
)
def test_valid_chain(tmp_path: Path, opset: int, bits: int, signed: bool, preset: str) -> None:
    model = graphs.chain(opset, signed, bits)
    assert verify_file(graphs.save(model, tmp_path), preset, ExpectedQuantization(3)) == []


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize(
    ('signed', 'preset'), [(False, 'academic'), (False, 'onnxruntime'), (False, 'openvino'), (True, 'openvino')]
)
def test_valid_chain_clipped_at_integers(tmp_path: Path, bits: int, signed: bool, preset: str) -> None:
    model = graphs.chain(signed=signed, bits=bits, integer=True)
    assert verify_file(graphs.save(model, tmp_path), preset, ExpectedQuantization(3)) == []


@pytest.mark.parametrize('integer', [False, True])
@pytest.mark.parametrize('preset', ['academic', 'onnxruntime', 'openvino'])
def test_valid_residual_of_onnxruntime(tmp_path: Path, integer: bool, preset: str) -> None:
    path = graphs.save(graphs.runtime_residual(integer), tmp_path)
    assert verify_file(path, preset, ExpectedQuantization(3)) == []


@pytest.mark.parametrize('model', [graphs.residual(), graphs.residual('conv'), graphs.concat()])
@pytest.mark.parametrize('preset', ['tensorrt', 'academic', 'openvino'])
def test_valid_joins(tmp_path: Path, model: onnx.ModelProto, preset: str) -> None:
    assert verify_file(graphs.save(model, tmp_path), preset) == []


def float_weight(model: onnx.ModelProto, off: float = 0.0) -> None:
    """conv1's weight as float -> Q -> DQ, one value ``off`` steps beside the grid."""
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    weight = tensors['conv1_w'] * tensors['conv1_w_scale'].reshape(-1, 1, 1, 1)
    weight[0, 0, 0, 0] += off * tensors['conv1_w_scale'][0]
    graphs.add_tensor(model, 'conv1_wf', weight.astype(np.float32))
    graphs.rewire(model, 'conv1_w_DQ', 0, 'conv1_wf')
    graphs.insert(model, 'QuantizeLinear', 'conv1_w_Q', 'conv1_w_DQ', ['conv1_w_scale', 'conv1_w_zero'], axis=0)


def test_float_weight_on_its_grid_passes(tmp_path: Path) -> None:
    model = graphs.chain()
    float_weight(model)
    assert found(model, tmp_path, 'academic', ExpectedQuantization(3)) == set()


@pytest.mark.parametrize(
    ('low', 'high', 'broken'), [(-3, 12, False), (-4, 12, True), (-3, 253, True), (-3, 11.5, True)]
)
def test_clip_around_a_zero_point(tmp_path: Path, low: float, high: float, broken: bool) -> None:
    """uint8 with zero-point 3 holds -3 .. 252 steps."""
    model = graphs.chain(bits=4)
    graphs.set_tensor(model, 'in_zero', np.uint8(3))
    graphs.set_tensor(model, 'in_l', np.float32(low) * np.float32(graphs.SCALE))
    graphs.set_tensor(model, 'in_h', np.float32(high) * np.float32(graphs.SCALE))
    assert found(model, tmp_path, 'academic') == ({('C7', 'in_clip')} if broken else set())


def computed(model: onnx.ModelProto, name: str, index: int) -> None:
    """Puts a Neg before input ``index``, so that it is no constant."""
    target = graphs.node(model, name)
    new = onnx.helper.make_node('Neg', [target.input[index]], ['neg_out'], name='neg')
    model.graph.node.insert(0, new)
    target.input[index] = 'neg_out'


def quantized_bias(model: onnx.ModelProto) -> None:
    graphs.add_tensor(model, 'bi', np.zeros(4, np.int32))
    graphs.add_tensor(model, 'bs', np.full(4, 1e-3, np.float32))
    graphs.add_tensor(model, 'bz', np.zeros(4, np.int32))
    model.graph.node.insert(
        0, onnx.helper.make_node('DequantizeLinear', ['bi', 'bs', 'bz'], ['b'], name='b_DQ', axis=0)
    )
    graphs.rewire(model, 'conv1', 2, 'b')


# Rule, node, change on chain(bits=4) in uint8, preset 'academic'
C_CASES: list[tuple[str, str, Change]] = [
    ('C1', 'a1_Q', lambda m: graphs.set_tensor(m, 'a1_scale', np.float32(0))),
    ('C1', 'a1_DQ', lambda m: graphs.set_tensor(m, 'a1_scale', np.float32(-0.1))),
    ('C1', 'a1_Q', lambda m: graphs.set_tensor(m, 'a1_scale', np.float32('nan'))),
    ('C1', 'a1_Q', lambda m: graphs.set_tensor(m, 'a1_scale', np.float32('inf'))),
    ('C1', 'conv1_w_DQ', lambda m: graphs.set_tensor(m, 'conv1_w_scale', np.float32([0.1, 0.1, 0, 0.1]))),
    ('C1', 'a2_Q', lambda m: computed(m, 'a2_Q', 1)),
    ('C2', 'a1_Q', lambda m: graphs.rewire(m, 'a1_Q', 2, '')),
    ('C2', 'conv2_w_DQ', lambda m: graphs.set_tensor(m, 'conv2_w_zero', np.int8(0))),
    ('C2', 'a1_DQ', lambda m: computed(m, 'a1_DQ', 2)),
    ('C3', 'conv1_w_DQ', lambda m: graphs.set_attribute(m, 'conv1_w_DQ', axis=None)),
    ('C3', 'conv1_w_DQ', lambda m: graphs.set_attribute(m, 'conv1_w_DQ', axis=1)),
    ('C3', 'conv1_w_DQ', lambda m: graphs.set_attribute(m, 'conv1_w_DQ', axis=2)),
    ('C3', 'conv1_w_DQ', lambda m: graphs.set_attribute(m, 'conv1_w_DQ', axis=4)),
    ('C3', 'fc_w_DQ', lambda m: graphs.set_attribute(m, 'fc', transB=0)),
    ('C4', 'a1_Q', lambda m: graphs.set_tensor(m, 'a1_zero', np.int16(0))),
    ('C4', 'a1_Q', lambda m: setattr(graphs.node(m, 'a1_Q'), 'domain', 'com.microsoft')),
    ('C5', 'a1_Q', lambda m: graphs.rewire(m, 'a1_DQ', 1, 'conv1_w_scale')),
    ('C5', 'a1_Q', lambda m: graphs.rewire(m, 'a1_DQ', 2, graphs.add_tensor(m, 'z3', np.uint8(3)))),
    ('C5', 'twice_Q', lambda m: graphs.insert_qdq(m, 'twice', 'conv2', 'a1')),
    (
        'C5',
        'twice_Q',
        lambda m: (graphs.insert_qdq(m, 'twice', 'conv2', 'conv1_b'), graphs.insert(m, 'Identity', 'id', 'twice_Q')),
    ),
    ('C5', 'a1_Q', lambda m: graphs.insert(m, 'Identity', 'id', 'a1_DQ')),
    ('C5', 'a1_DQ', lambda m: graphs.insert(m, 'Identity', 'id', 'a1_DQ')),
    (
        'C5',
        'net',
        lambda m: graphs.rewire(m, 'conv1', 1, graphs.add_tensor(m, 'wf', np.ones((4, 4, 3, 3), np.float32))),
    ),
    ('C6', 'conv1_w_DQ', lambda m: float_weight(m, 0.4)),
    ('C6', 'conv1_w_DQ', lambda m: graphs.set_tensor(m, 'conv1_w', np.zeros((4, 4, 3, 3), np.int32))),
    ('C7', 'a1_clip', lambda m: graphs.set_tensor(m, 'a1_h', np.float32(15.5 * graphs.SCALE))),
    ('C7', 'a1_clip', lambda m: graphs.set_tensor(m, 'a1_h', np.float32(15 * graphs.SCALE * 1.0001))),
    ('C7', 'a1_clip', lambda m: graphs.set_tensor(m, 'a1_h', np.float32(300 * graphs.SCALE))),
    ('C7', 'a1_clip', lambda m: graphs.set_tensor(m, 'a1_l', np.float32(-graphs.SCALE))),
    ('C7', 'a1_clip', lambda m: graphs.set_tensor(m, 'a1_l', np.float32(15 * graphs.SCALE))),
    ('C7', 'a1_clip', lambda m: graphs.set_tensor(m, 'a1_h', np.float32('nan'))),
    ('C7', 'a1_clip', lambda m: graphs.set_tensor(m, 'a1_l', np.float32(graphs.SCALE))),
    ('C8', 'conv1', lambda m: graphs.set_tensor(m, 'conv1_b', np.zeros(4, np.float16))),
    ('C8', 'conv1', quantized_bias),
    ('C9', 'conv1', lambda m: graphs.set_tensor(m, 'conv1_w_scale', np.float32([0.01, 0.01, 1e-9, 0.01]))),
    ('C9', 'fc', lambda m: graphs.set_tensor(m, 'fc_b', np.float32([0, 0, 2**31 * 0.05 * 0.02]))),
]


@pytest.mark.parametrize('case', range(len(C_CASES)), ids=[f'{r}-{n}-{i}' for i, (r, n, _) in enumerate(C_CASES)])
def test_broken_common_rule(tmp_path: Path, case: int) -> None:
    rule, name, change = C_CASES[case]
    model = graphs.chain(bits=4)
    change(model)
    violations = found(model, tmp_path, 'academic', ExpectedQuantization(3))
    assert (rule, name) in violations
    # One fault may break a second rule at the same place (an int16 weight, say), but nothing elsewhere.
    assert {n.removesuffix('_Q').removesuffix('_DQ') for _, n in violations} <= {
        name.removesuffix('_Q').removesuffix('_DQ').removesuffix('_clip'), name, 'id', 'net', 'b',
    }  # fmt: skip


INTEGER_CASES: list[tuple[str, str, Change]] = [
    ('C5', 'a1_Q', lambda m: graphs.rewire(m, 'a1_DQ', 1, graphs.add_tensor(m, 's', np.float32(0.1)))),
    ('C5', 'a1_Q', lambda m: graphs.rewire(m, 'a1_DQ', 2, graphs.add_tensor(m, 'z3', np.uint8(3)))),
    ('C5', 'a1_Q', lambda m: graphs.insert(m, 'Identity', 'id', 'a1_DQ')),
    ('C5', 'a1_Q', lambda m: graphs.insert(m, 'Identity', 'id', 'a1_clip')),
    ('C5', 'a1_DQ', lambda m: graphs.insert(m, 'Clip', 'id', 'a1_DQ', ['a1_l', 'a1_h'])),
    ('C5', 'a1_DQ', lambda m: graphs.rewire(m, 'conv2', 0, read_twice(m))),
    ('C5', 'a1_Q', lambda m: m.graph.output.append(onnx.helper.make_empty_tensor_value_info('a1_Q_out'))),
    ('C5', 'a1_Q', lambda m: m.graph.output.append(onnx.helper.make_empty_tensor_value_info('a1_clip_out'))),
    ('C5', 'twice_Q', lambda m: graphs.insert_qdq(m, 'twice', 'conv2', 'a1')),
    ('C7', 'a1_clip', lambda m: graphs.set_tensor(m, 'a1_h', np.float32(15))),
    ('C7', 'a1_clip', lambda m: graphs.set_tensor(m, 'a1_h', np.int8(15))),
    ('C7', 'a1_clip', lambda m: graphs.set_tensor(m, 'a1_h', np.int32(300))),
    ('C7', 'a1_clip', lambda m: graphs.set_tensor(m, 'a1_l', np.uint8(15))),
    ('C7', 'a1_clip', lambda m: graphs.set_tensor(m, 'a1_l', np.uint8(20))),
    ('C7', 'a1_clip', lambda m: graphs.set_tensor(m, 'a1_l', np.zeros(2, np.uint8))),
    ('C7', 'a1_clip', lambda m: graphs.rewire(m, 'a1_clip', 2, 'x')),
    ('C8', 'fc', lambda m: graphs.set_tensor(m, 'fc_b', np.zeros(3, np.float16))),
    ('C8', 'fc', lambda m: graphs.set_tensor(m, 'fc_b', np.zeros(3, np.int32))),
]


def read_twice(model: onnx.ModelProto) -> str:
    """A second DQ that passes by the Clip."""
    twin = onnx.helper.make_node('DequantizeLinear', ['a1_Q_out', 'a1_scale', 'a1_zero'], ['id_out'], name='id')
    model.graph.node.insert(list(model.graph.node).index(graphs.node(model, 'conv2')), twin)
    return 'id_out'


@pytest.mark.parametrize(
    'case', range(len(INTEGER_CASES)), ids=[f'{r}-{n}-{i}' for i, (r, n, _) in enumerate(INTEGER_CASES)]
)
def test_broken_rule_with_clips_of_integers(tmp_path: Path, case: int) -> None:
    rule, name, change = INTEGER_CASES[case]
    model = graphs.chain(bits=4, integer=True)
    change(model)
    violations = found(model, tmp_path, 'academic', ExpectedQuantization(3))
    assert (rule, name) in violations
    # C5 may name both ends of a pair.
    assert {r for r, _ in violations} == {rule}
    assert {n for _, n in violations} <= {name, 'a1_Q', 'a1_DQ'}


@pytest.mark.parametrize(('inputs', 'bounds'), [(['', 'a1_h'], (0, 15)), (['a1_l'], (3, 255))])
def test_clip_of_integers_with_one_bound(tmp_path: Path, inputs: list[str], bounds: tuple[int, int]) -> None:
    model = graphs.chain(bits=4, integer=True)
    clip = graphs.node(model, 'a1_clip')
    clip.input[1:] = inputs
    graphs.set_tensor(model, 'a1_l', np.uint8(3))
    graphs.set_tensor(model, 'a1_zero', np.uint8(5))
    grids = [((0, 15), 0), (bounds, 5)]
    scales = (float(np.float32(graphs.SCALE)),)
    expected = ExpectedQuantization(3, None, frozenset(Grid(scales, (zero,), *ends) for ends, zero in grids))
    assert found(model, tmp_path, 'academic', expected) == set()


def test_activation_function_before_a_clip_of_integers(tmp_path: Path) -> None:
    """Bounds of an activation function need not lie on the grid, those of a grid must."""
    model = graphs.chain(bits=4, integer=True)
    bounds = [graphs.add_tensor(model, name, np.float32(value)) for name, value in (('low', 0), ('high', 0.333))]
    graphs.insert(model, 'Clip', 'limit', 'a1_Q', bounds)
    assert found(model, tmp_path, 'onnxruntime') == set()
    graphs.drop(model, 'a1_clip')
    assert found(model, tmp_path, 'onnxruntime') == {('C7', 'limit')}


@pytest.mark.parametrize('integer', [False, True])
def test_second_quantization_on_another_grid(tmp_path: Path, integer: bool) -> None:
    b = graphs.Builder(integer=integer)
    x = b.qdq(b.qdq('x', 'in'), 'twice', (0, 15), scale=0.3)
    assert found(b.model(b.conv(x, 'conv1')), tmp_path, 'academic') == {('C5', 'twice_Q')}


def test_weight_is_not_clipped(tmp_path: Path) -> None:
    model = graphs.chain()
    float_weight(model)
    bounds = [graphs.add_tensor(model, name, np.int8(value)) for name, value in (('low', -1), ('high', 1))]
    graphs.insert(model, 'Clip', 'cut', 'conv1_w_DQ', bounds)
    violations = found(model, tmp_path, 'academic', ExpectedQuantization(3))
    assert violations == {('C5', 'conv1_w_Q'), ('C5', 'conv1_w_DQ'), ('C5', 'net')}


def test_clip_of_integers_needs_opset_12(tmp_path: Path) -> None:
    model = graphs.chain(bits=4, integer=True)
    model.opset_import[0].version = 11
    assert {('C4', f'{name}_clip') for name in ('in', 'a1', 'a2', 'a3', 'a4')} < found(model, tmp_path, 'academic')
    model.opset_import[0].version = 12
    assert not any(name.endswith('clip') for _, name in found(model, tmp_path, 'academic'))


def test_per_channel_axis_needs_opset_13(tmp_path: Path) -> None:
    model = graphs.chain()
    model.opset_import[0].version = 12
    weights = {('C4', name) for name in ('conv1_w_DQ', 'conv2_w_DQ', 'fc_w_DQ')}
    assert found(model, tmp_path, 'academic') == weights


def shortcut_float(model: onnx.ModelProto) -> None:
    graphs.rewire(model, 'add', 1, 'x')


def pooled_shortcut(model: onnx.ModelProto) -> None:
    """A max-pool on the shortcut: values still come off the Q/DQ before it."""
    graphs.rewire(model, 'add', 1, 'pool_out')
    pool = onnx.helper.make_node('MaxPool', ['in_DQ_out'], ['pool_out'], name='pool', kernel_shape=[1, 1])
    model.graph.node.insert(list(model.graph.node).index(graphs.node(model, 'add')), pool)


T_CASES: list[tuple[str, str, Callable[[], onnx.ModelProto], Change]] = [
    ('T1', 'a1_Q', lambda: graphs.chain(signed=True), lambda m: graphs.set_tensor(m, 'a1_zero', np.uint8(0))),
    ('T1', 'a1_DQ', lambda: graphs.chain(signed=True), lambda m: graphs.set_tensor(m, 'a1_zero', np.int8(3))),
    ('T1', 'conv1_w_DQ', lambda: graphs.chain(signed=True),
     lambda m: graphs.set_tensor(m, 'conv1_w_zero', np.int8([0, 0, 1, 0]))),
    ('T2', 'a1_Q', lambda: graphs.chain(signed=True),
     lambda m: graphs.set_grid(m, 'a1', np.full(4, 0.1, np.float32), np.zeros(4, np.int8))),
    ('T3', 'conv2', lambda: graphs.chain(signed=True), lambda m: graphs.rewire(m, 'conv2', 0, 'relu1_out')),
    ('T3', 'fc', lambda: graphs.chain(signed=True),
     lambda m: graphs.rewire(m, 'fc', 1, graphs.add_tensor(m, 'wf', np.ones((3, 4), np.float32)))),
    ('T4', 'new_Q', lambda: graphs.chain(signed=True), lambda m: graphs.insert_qdq(m, 'new', 'relu1', 'a2')),
    ('T4', 'a1_Q', lambda: graphs.chain(signed=True),
     lambda m: graphs.insert(m, 'Pad', 'pad', 'a1_Q', [graphs.add_tensor(m, 'pads', np.zeros(8, np.int64))])),
    ('T5', 'add', graphs.residual, shortcut_float),
    ('T5', 'add', graphs.residual, lambda m: graphs.insert_qdq(m, 'new', 'add', 'a2')),
    ('T5', 'add', lambda: graphs.residual('conv'), lambda m: graphs.rewire(m, 'add', 1, 'down_out')),
    ('T5', 'add', lambda: graphs.residual('conv'), lambda m: graphs.insert_qdq(m, 'new', 'add', 'a2')),
    ('T6', 'cat', graphs.concat, lambda m: graphs.rewire(m, 'cat', 0, 'relu1_out')),
    ('T6', 'cat', graphs.concat, lambda m: graphs.set_tensor(m, 'a1_scale', np.float32(0.1))),
]  # fmt: skip


@pytest.mark.parametrize('case', range(len(T_CASES)), ids=[f'{c[0]}-{c[1]}-{i}' for i, c in enumerate(T_CASES)])
def test_broken_tensorrt_rule(tmp_path: Path, case: int) -> None:
    rule, name, make, change = T_CASES[case]
    model = make()
    change(model)
    assert (rule, name) in found(model, tmp_path, 'tensorrt')
    assert not any(r[0] == 'T' for r, _ in found(model, tmp_path, 'academic'))


def test_tensorrt_has_no_clip_of_integers(tmp_path: Path) -> None:
    model = graphs.chain(signed=True, bits=4, integer=True)
    clips = {('T1', f'{name}_clip') for name in ('in', 'a1', 'a2', 'a3', 'a4')}
    assert found(model, tmp_path, 'tensorrt') == clips


def test_tensorrt_rules_see_through_a_clip_of_integers(tmp_path: Path) -> None:
    model = graphs.runtime_residual()
    graphs.insert(model, 'Pad', 'pad', 'a1_Q', [graphs.add_tensor(model, 'pads', np.zeros(8, np.int64))])
    graphs.insert(model, 'LeakyRelu', 'leaky', 'add')
    violations = {v for v in found(model, tmp_path, 'tensorrt') if v[0] != 'T1'}
    assert violations == {('T4', 'a1_Q'), ('T4', 'a2_Q')}
    graphs.drop(model, 'leaky')
    graphs.drop(model, 'pad')
    assert {v for v in found(model, tmp_path, 'tensorrt') if v[0] != 'T1'} == {('T5', 'add')}


def test_activation_function_is_fused_whatever_clips_the_integers_behind(tmp_path: Path) -> None:
    model = graphs.chain(signed=True, bits=4, integer=True)
    graphs.insert_qdq(model, 'new', 'relu1', 'a2')
    activation = graphs.node(model, 'relu1')
    activation.op_type = 'Clip'
    activation.input.extend(graphs.add_tensor(model, name, np.float32(v)) for name, v in (('low', 0), ('high', 0.333)))
    assert ('T4', 'new_Q') in found(model, tmp_path, 'tensorrt')


def test_shortcut_through_a_pool_is_quantized(tmp_path: Path) -> None:
    model = graphs.residual()
    pooled_shortcut(model)
    assert found(model, tmp_path, 'tensorrt') == set()


def test_layer_left_in_float_passes_but_is_counted(tmp_path: Path) -> None:
    model = graphs.chain(signed=True)
    graphs.rewire(model, 'conv2', 0, 'relu1_out')
    graphs.rewire(model, 'conv2', 1, graphs.add_tensor(model, 'wf', np.ones((4, 4, 3, 3), np.float32)))
    kept = [n for n in model.graph.node if n.name not in ('a1_Q', 'a1_DQ', 'conv2_w_DQ')]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    assert found(model, tmp_path, 'tensorrt', ExpectedQuantization(2)) == set()
    assert found(model, tmp_path, 'tensorrt', ExpectedQuantization(3)) == {('C5', 'net')}


O_CASES: list[tuple[str, str, Change]] = [
    ('O1', 'conv1', lambda m: graphs.insert(m, 'HardSwish', 'act', 'a1_Q')),
    ('O1', 'conv2', lambda m: graphs.insert(m, 'GlobalAveragePool', 'mean', 'a2_Q')),
    ('O2', 'a1_Q', lambda m: graphs.set_tensor(m, 'a1_zero', np.int8(0))),
    ('O2', 'a1_Q', lambda m: graphs.set_tensor(m, 'a1_zero', np.uint8(7))),
    ('O3', 'pool', lambda m: graphs.set_tensor(m, 'a3_scale', np.float32(0.1))),
]


@pytest.mark.parametrize('case', range(len(O_CASES)), ids=[f'{r}-{n}-{i}' for i, (r, n, _) in enumerate(O_CASES)])
def test_broken_onnxruntime_rule(tmp_path: Path, case: int) -> None:
    rule, name, change = O_CASES[case]
    for model in (graphs.chain(), graphs.chain(bits=4, integer=True)):
        change(model)
        assert (rule, name) in found(model, tmp_path, 'onnxruntime')
        assert {r for r, _ in found(model, tmp_path, 'onnxruntime')} <= {rule, 'C7'}


@pytest.mark.parametrize('quantized', [True, False])
def test_a_sum_of_a_convolution_and_a_float_value(tmp_path: Path, quantized: bool) -> None:
    b = graphs.Builder(signed=True)
    total = b.node('Add', [b.conv(b.qdq('x', 'in'), 'conv1'), b.node('Sigmoid', ['x'], 'gate')], 'add')
    last = b.conv(b.qdq(total, 'a1'), 'conv2') if quantized else b.node('Sigmoid', [total], 'last')
    assert found(b.model(last), tmp_path, 'tensorrt') == ({('T5', 'add')} if quantized else set())


def test_a_convolution_that_another_layer_reads_and_a_float_value(tmp_path: Path) -> None:
    b = graphs.Builder(signed=True)
    first = b.qdq(b.conv(b.qdq('x', 'in'), 'conv1'), 'a1')
    total = b.node('Add', [first, b.node('Sigmoid', [b.conv(first, 'conv2')], 'gate')], 'add')
    assert found(b.model(total), tmp_path, 'tensorrt') == set()


V_CASES: list[tuple[str, str, bool, Change]] = [
    ('V1', 'a1_Q', False, lambda m: graphs.set_tensor(m, 'a1_zero', np.uint16(0))),
    ('V2', 'a1_Q', True, lambda m: graphs.set_tensor(m, 'a1_zero', np.int8(5))),
    ('V4', 'conv2', False, lambda m: graphs.rewire(m, 'conv2', 0, 'relu1_out')),
    ('V4', 'conv1_w_DQ', False, lambda m: graphs.set_tensor(m, 'conv1_w_zero', np.int8([0, 4, 0, 0]))),
    ('V5', 'a1_Q', False, lambda m: graphs.set_grid(m, 'a1', np.full(4, 0.1, np.float32), np.zeros(4, np.uint8))),
]


@pytest.mark.parametrize('case', range(len(V_CASES)), ids=[f'{c[0]}-{c[1]}-{i}' for i, c in enumerate(V_CASES)])
def test_broken_openvino_rule(tmp_path: Path, case: int) -> None:
    rule, name, signed, change = V_CASES[case]
    for model in (graphs.chain(21, signed), graphs.chain(21, signed, bits=4, integer=True)):
        change(model)
        assert {v for v in found(model, tmp_path, 'openvino') if v[0][0] == 'V'} == {(rule, name)}


@pytest.mark.parametrize(
    ('name', 'value'), [('a1_scale', np.float32(0.1)), ('a2_zero', np.int8(-128)), ('a1_zero', np.uint8(0))]
)
def test_concatenation_of_two_grids(tmp_path: Path, name: str, value: np.generic) -> None:
    model = graphs.concat()
    graphs.set_tensor(model, name, value)
    assert found(model, tmp_path, 'openvino') == {('V7', 'cat')}
    assert found(model, tmp_path, 'academic') == set()


def test_grids_of_a_concatenation_are_found_behind_a_pool(tmp_path: Path) -> None:
    model = graphs.concat()
    graphs.set_tensor(model, 'a1_scale', np.float32(0.1))
    graphs.insert(model, 'MaxPool', 'pool', 'cat', kernel_shape=[1, 1])
    assert found(model, tmp_path, 'openvino') == {('V7', 'cat')}


def test_float_input_of_a_concatenation(tmp_path: Path) -> None:
    model = graphs.concat()
    graphs.rewire(model, 'cat', 0, 'relu1_out')
    assert found(model, tmp_path, 'openvino') == {('V4', 'conv3')}


def test_quantized_network_output(tmp_path: Path) -> None:
    b = graphs.Builder()
    model = b.model(b.qdq(b.conv(b.qdq('x', 'in'), 'conv1'), 'out'))
    assert found(model, tmp_path, 'openvino') == {('V6', 'out_DQ')}
    assert found(model, tmp_path, 'academic') == set()


@pytest.mark.parametrize(('also', 'broken'), [(False, set()), (True, {('V5', 'a_Q')})])
def test_scales_per_channel_before_depthwise_convolutions(tmp_path: Path, also: bool, broken: set) -> None:
    b = graphs.Builder()
    scale, zero = b.tensor('s', np.full(4, 0.1, np.float32)), b.tensor('z', np.zeros(4, np.uint8))
    x = b.node('QuantizeLinear', ['x', scale, zero], 'a_Q', axis=1)
    x = b.node('DequantizeLinear', [x, scale, zero], 'a_DQ', axis=1)
    y = b.conv(b.node('Identity', [x], 'same'), 'dw', group=4)
    model = b.model(b.node('Add', [y, b.conv(x, 'full')], 'add') if also else y)
    assert found(model, tmp_path, 'openvino') == broken
    assert ('T2', 'a_Q') in found(model, tmp_path, 'tensorrt')
