"""Every rule on OpenVINO IR: converted Q/DQ graphs pass, graphs built to break one rule are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import openvino as ov
import pytest
from openvino import opset13 as ops

from mmbrecq.deploy.verify import PRESETS, ExpectedQuantization, verify_file


def convert(model: onnx.ModelProto, folder: Path) -> Path:
    path = graphs.save(model, folder)
    ov.save_model(ov.convert_model(path), path.with_suffix('.xml'), compress_to_fp16=False)
    return path.with_suffix('.xml')


def found(path: Path, preset: str = 'openvino', expected: ExpectedQuantization | None = None) -> set:
    return {(v.rule, v.node) for v in verify_file(path, preset, expected)}


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('integer', [False, True])
def test_valid_chain(tmp_path: Path, bits: int, signed: bool, integer: bool) -> None:
    path = convert(graphs.chain(signed=signed, bits=bits, integer=integer), tmp_path)
    for preset in PRESETS:
        assert verify_file(path, preset, ExpectedQuantization(3)) == []


@pytest.mark.parametrize(
    ('model', 'layers'),
    [(graphs.residual(), 3), (graphs.residual('conv'), 4), (graphs.concat(), 3), (graphs.runtime_residual(), 3)],
)
def test_valid_joins(tmp_path: Path, model: onnx.ModelProto, layers: int) -> None:
    assert verify_file(convert(model, tmp_path), 'openvino', ExpectedQuantization(layers)) == []


def test_valid_depthwise_transposed_and_linear(tmp_path: Path) -> None:
    b = graphs.Builder()
    x = b.qdq(b.conv(b.qdq('x', 'in'), 'dw', group=4), 'a1')
    x = b.qdq(b.node('ConvTranspose', [x, b.weight('up', (4, 6, 2, 2), 1)], 'up', strides=[2, 2]), 'a2')
    x = b.qdq(b.node('Flatten', [b.node('GlobalAveragePool', [x], 'gap')], 'flat'), 'a3')
    model = b.model(b.node('MatMul', [x, b.weight('fc', (6, 5), 1)], 'fc'), ['N', 5])
    assert verify_file(convert(model, tmp_path), 'openvino', ExpectedQuantization(3)) == []


@pytest.mark.parametrize('form', ['onnx', 'xml'])
@pytest.mark.parametrize(
    ('reader', 'op', 'axis', 'right'),
    [
        ('depthwise', '', 1, True), ('depthwise', 'MaxPool', 1, True), ('sum', '', 1, True), ('dense', '', 1, False),
        ('both', '', 1, False), ('depthwise', 'Transpose', 1, False), ('sum', 'MaxPool', 1, True),
        ('depthwise', '', 2, False),
    ],
)  # fmt: skip
def test_scales_of_channels_that_depthwise_convolutions_read(
    tmp_path: Path, reader: str, op: str, axis: int, right: bool, form: str
) -> None:
    model = graphs.by_channel(reader, op, axis)
    path = graphs.save(model, tmp_path) if form == 'onnx' else convert(model, tmp_path)
    broken = verify_file(path, 'openvino')
    assert {v.rule for v in broken} == (set() if right else {'V5'})
    assert right or 'or depthwise convolutions that read its channels, but got' in broken[0].message


def test_pool_between_q_and_dq(tmp_path: Path) -> None:
    """convert_model keeps the integers of such a pair: FakeQuantize - Convert - MaxPool - Convert - Multiply."""
    model = graphs.chain()
    for name, tensor in (('pool', 'a2_Q_out'), ('a2_DQ', 'pool_out')):
        graphs.rewire(model, name, 0, tensor)
    graphs.rewire(model, 'a3_Q', 0, 'a2_DQ_out')
    graphs.set_tensor(model, 'a3_scale', np.float32(0.06))
    order = [n.name for n in model.graph.node]
    nodes = list(model.graph.node)
    nodes.insert(order.index('a2_DQ'), nodes.pop(order.index('pool')))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    path = convert(model, tmp_path)
    read = ov.Core().read_model(path)
    assert any(op.get_type_name() == 'MaxPool' and op.get_output_element_type(0) == ov.Type.u8 for op in read.get_ops())
    assert verify_file(path, 'openvino', ExpectedQuantization(3)) == []


@pytest.mark.parametrize(
    ('rule', 'node', 'tensor', 'value'),
    [
        ('C1', 'a1_DQ', 'a1_scale', np.float32(0)),
        ('C1', 'a1_DQ', 'a1_scale', np.float32(-0.1)),
        ('C1', 'a1_DQ', 'a1_scale', np.float32('nan')),
        ('C1', 'conv1_w_DQ', 'conv1_w_scale', np.float32([0.1, 0, 0.1, 0.1])),
        ('C1', 'conv1_w_DQ', 'conv1_w_scale', np.float32([0.1, -1, 0.1, 0.1])),
        ('C1', 'conv1_w_DQ', 'conv1_w_scale', np.float32([0.1, 'inf', 0.1, 0.1])),
        ('C7', 'a1_clip', 'a1_h', np.float32(14.5 * graphs.SCALE)),
        ('V4', 'conv1_w_DQ', 'conv1_w_zero', np.int8([0, 1, 0, 0])),
    ],
)
def test_broken_constant(tmp_path: Path, rule: str, node: str, tensor: str, value: Any) -> None:
    model = graphs.chain(bits=4)
    graphs.set_tensor(model, tensor, value)
    violations = {v for v in found(convert(model, tmp_path)) if v != ('C7', 'a1_clip') or rule == 'C7'}
    assert violations == {(rule, node)}


@pytest.mark.parametrize(
    ('tensor', 'value', 'broken'),
    [('a1_scale', np.float32(0), {('C1', 'a1_DQ')}), ('a1_zero', np.uint8(3), set())],
)
def test_constants_with_clamps_of_integers(tmp_path: Path, tensor: str, value: Any, broken: set) -> None:
    model = graphs.chain(bits=4, integer=True)
    graphs.set_tensor(model, tensor, value)
    assert found(convert(model, tmp_path), 'openvino', ExpectedQuantization(3)) == broken


def test_clip_of_integers_that_is_no_clamp(tmp_path: Path) -> None:
    """convert_model leaves Maximum and Minimum where the bounds are in the wrong order."""
    model = graphs.chain(bits=4, integer=True)
    graphs.set_tensor(model, 'a1_l', np.uint8(20))
    path = convert(model, tmp_path)
    assert found(path, 'academic') == {('C5', 'a1_Q')}
    assert found(path) == {('C5', 'a1_Q'), ('V4', 'conv2/WithoutBiases')}


def test_activation_function_before_a_clamp_of_integers(tmp_path: Path) -> None:
    model = graphs.chain(bits=4, integer=True)
    bounds = [graphs.add_tensor(model, name, np.float32(value)) for name, value in (('low', 0), ('high', 0.333))]
    graphs.insert(model, 'Clip', 'limit', 'a1_Q', bounds)
    path = convert(model, tmp_path)
    assert 'limit' in {op.get_friendly_name() for op in ov.Core().read_model(path).get_ops()}
    assert found(path, 'openvino', ExpectedQuantization(3)) == set()


@pytest.mark.parametrize('inputs', [['', 'a1_h'], ['a1_l']])
def test_clip_of_integers_with_one_bound(tmp_path: Path, inputs: list[str]) -> None:
    model = graphs.chain(bits=4, integer=True)
    graphs.node(model, 'a1_clip').input[1:] = inputs
    graphs.set_tensor(model, 'a1_l', np.uint8(3))
    assert found(convert(model, tmp_path), 'openvino', ExpectedQuantization(3)) == set()


@pytest.mark.parametrize('op', ['Mul', 'Add'])
def test_constant_folded_into_a_range(tmp_path: Path, op: str) -> None:
    """convert_model folds it into the FakeQuantize, so that its input range is no longer its output range."""
    model = graphs.chain()
    graphs.insert(model, op, 'extra', 'a4_Q', [graphs.add_tensor(model, 'two', np.float32(2))])
    path = convert(model, tmp_path)
    assert not any(op.get_friendly_name() == 'extra' for op in ov.Core().read_model(path).get_ops())
    assert verify_file(path, 'openvino', ExpectedQuantization(3)) == []


def test_float_layer_and_quantized_output(tmp_path: Path) -> None:
    b = graphs.Builder()
    model = b.model(b.qdq(b.conv('x', 'conv1'), 'out'))
    path = convert(model, tmp_path)
    assert found(path, 'openvino', ExpectedQuantization(1)) == {('V4', 'conv1/WithoutBiases'), ('V6', 'out_DQ_out')}


@pytest.mark.parametrize(('name', 'value'), [('a1_scale', np.float32(0.1)), ('a2_zero', np.int8(-128))])
def test_concatenation_of_two_ranges(tmp_path: Path, name: str, value: np.generic) -> None:
    model = graphs.concat()
    graphs.set_tensor(model, name, value)
    path = convert(model, tmp_path)
    assert found(path) == {('V7', 'cat')}
    assert found(path, 'academic') == set()


def test_weights_along_input_channels(tmp_path: Path) -> None:
    model = graphs.chain()
    graphs.set_attribute(model, 'conv1_w_DQ', axis=1)
    assert found(convert(model, tmp_path)) == {('C3', 'conv1_w_DQ')}


def test_biases_in_half_precision(tmp_path: Path) -> None:
    x, weight = ops.parameter([1, 4, 8, 8], ov.Type.f32, 'x'), int8_weight()
    conv = ops.convolution(fake(x, 0, 2.55), weight, [1, 1], [1, 1], [1, 1], [1, 1])
    bias = ops.convert(ops.constant(np.zeros((1, 6, 1, 1), np.float16)), 'f32')
    conv.set_friendly_name('conv')
    assert found(save(ops.add(conv, bias), x, tmp_path)) == {('C8', 'conv')}


def fake(x: Any, low: Any, high: Any, levels: int = 256, name: str = 'fq', out: Any = None) -> Any:
    bounds = [np.float32(value) for value in (low, high, *(out or (low, high)))]
    node = ops.fake_quantize(x, *[ops.constant(value) for value in bounds], levels)
    node.set_friendly_name(name)
    return node


def int8_weight(zero_points: int | None = None) -> Any:
    integers = ops.convert(ops.constant(np.arange(6 * 4 * 9).reshape(6, 4, 3, 3).astype(np.int8)), 'f32')
    if zero_points is not None:
        zeros = ops.constant(np.zeros((zero_points, 1, 1, 1), np.int8))
        integers = ops.subtract(integers, ops.convert(zeros, 'f32'))
    weight = ops.multiply(integers, ops.constant(np.full((6, 1, 1, 1), 0.01, np.float32)))
    weight.set_friendly_name('w')
    return weight


def save(output: Any, x: Any, folder: Path) -> Path:
    ov.save_model(ov.Model([output], [x], 'net'), folder / 'net.xml', compress_to_fp16=False)
    return folder / 'net.xml'


def one_conv(folder: Path, weight: Any = None, **quantizer: Any) -> Path:
    """x - fq - Convolution, in OpenVINO's own operations."""
    x = ops.parameter([1, 4, 8, 8], ov.Type.f32, 'x')
    quantizer = {'low': 0, 'high': 2.55} | quantizer
    conv = ops.convolution(fake(x, **quantizer), weight or int8_weight(), [1, 1], [1, 1], [1, 1], [1, 1])
    return save(conv, x, folder)


@pytest.mark.parametrize(
    ('quantizer', 'broken'),
    [
        ({}, set()),
        (dict(low=-1.28, high=1.27), set()),
        (dict(low=-1.27, high=1.27, levels=255), set()),
        (dict(high=1.5, levels=16), {('V1', 'fq')}),
        (dict(low=-0.28, high=2.27), set()),
        (dict(low=-2.55, high=0), set()),
        (dict(low=-0.285, high=2.265), {('V2', 'fq')}),
        (dict(low=-2.65, high=-0.1), {('V2', 'fq')}),
        (dict(low=-1.27, high=1.27), {('V2', 'fq')}),
        (dict(low=-1.28, high=1.27, levels=255), {('V2', 'fq')}),
        (dict(low=0.1), {('V3', 'fq')}),
        (dict(high=np.linspace(1, 2, 4).reshape(1, 4, 1, 1)), {('V5', 'fq')}),
        (dict(out=(0, 5.1)), set()),
        (dict(out=(0.1, 2.65)), {('V3', 'fq')}),
        (dict(out=(0, 0)), {('C1', 'fq')}),
    ],
)
def test_fake_quantize_of_an_activation(tmp_path: Path, quantizer: dict, broken: set) -> None:
    assert found(one_conv(tmp_path, **quantizer)) == broken


@pytest.mark.parametrize(
    ('off', 'levels', 'low', 'broken'),
    [
        (0, 255, -127, set()),
        (0, 256, -128, set()),
        (0.3, 255, -127, {('C6', 'wq')}),
        (0, 256, -129, {('V4', 'wq')}),
        (0, 16, -8, {('V1', 'wq')}),
    ],
)
def test_fake_quantize_of_a_weight(tmp_path: Path, off: float, levels: int, low: int, broken: set) -> None:
    steps = np.random.default_rng(0).integers(-8, 8, (6, 4, 3, 3)).astype(np.float64)
    steps[0, 0, 0, 0] += off
    scale = np.linspace(0.01, 0.02, 6).reshape(6, 1, 1, 1)
    values = ops.constant((steps * scale).astype(np.float32))
    weight = fake(values, low * scale, (low + levels - 1) * scale, levels, 'wq')
    assert found(one_conv(tmp_path, weight), 'openvino', ExpectedQuantization(1)) == broken


def clamped(x: Any, low: float, high: float, name: str = 'c', dtype: str = 'u8') -> Any:
    """FakeQuantize - Convert - Clamp - Convert - Multiply, of 256 levels and scale 0.01."""
    first = 0 if dtype == 'u8' else -128
    codes = fake(x, first * 0.01, (first + 255) * 0.01, out=(first, first + 255))
    clamp = ops.clamp(ops.convert(codes, dtype), low, high)
    clamp.set_friendly_name(f'{name}_clamp')
    end = ops.multiply(ops.convert(clamp, 'f32'), ops.constant(np.float32(0.01)))
    end.set_friendly_name(name)
    return end


@pytest.mark.parametrize(
    ('low', 'high', 'dtype', 'right'),
    [
        (0, 15, 'u8', True), (3, 18, 'u8', True), (0, 255, 'u8', True), (-8, 7, 'i8', True), (-128, 127, 'i8', True),
        (0, 14.5, 'u8', False), (-1, 15, 'u8', False), (0, 256, 'u8', False), (15, 15, 'u8', False),
        (15, 0, 'u8', False), (-129, 7, 'i8', False), (0, 128, 'i8', False),
    ],
)  # fmt: skip
def test_bounds_of_a_clamp_of_integers(tmp_path: Path, low: float, high: float, dtype: str, right: bool) -> None:
    x = ops.parameter([1, 4, 8, 8], ov.Type.f32, 'x')
    try:
        quant = clamped(x, low, high, dtype=dtype)
    except RuntimeError:
        # OpenVINO refuses some of them itself.
        assert not right
        return
    path = save(ops.convolution(quant, int8_weight(), [1, 1], [1, 1], [1, 1], [1, 1]), x, tmp_path)
    assert found(path, 'openvino', ExpectedQuantization(1)) == (set() if right else {('C7', 'c_clamp')})


@pytest.mark.parametrize(('high', 'repeated'), [(15, True), (3, False), (None, True)])
def test_doubled_clamp_of_integers(tmp_path: Path, high: float | None, repeated: bool) -> None:
    x = ops.parameter([1, 4, 8, 8], ov.Type.f32, 'x')
    first = clamped(x, 0, 15, 'first')
    second = fake(first, 0, 2.55, name='second') if high is None else clamped(first, 0, high, 'second')
    path = save(ops.convolution(second, int8_weight(), [1, 1], [1, 1], [1, 1], [1, 1]), x, tmp_path)
    assert found(path) == ({('C5', 'second')} if repeated else set())


@pytest.mark.parametrize('turned', [False, True])
def test_factor_folded_into_a_weight(tmp_path: Path, turned: bool) -> None:
    """convert_model folds a factor behind a convolution into its weight, as another Multiply."""
    model = graphs.chain()
    graphs.insert(model, 'Mul', 'sixth', 'relu1', [graphs.add_tensor(model, 'factor', np.float32(1 / 6))])
    if turned:
        graphs.set_attribute(model, 'conv1_w_DQ', axis=1)
    path = convert(model, tmp_path)
    convs = [op for op in ov.Core().read_model(path).get_ops() if op.get_type_name() == 'Convolution']
    weights = [conv.input_value(1).get_node() for conv in convs]
    above = [weight.input_value(0).get_node().get_type_name() for weight in weights]
    assert sorted(above) == ['Convert', 'Multiply'], 'one weight has the factor before its dequantized integers'
    expected = {('C3', 'conv1_w_DQ')} if turned else set()
    assert found(path, 'openvino', ExpectedQuantization(3)) == expected


def test_computed_weight_of_a_convolution(tmp_path: Path) -> None:
    x = ops.parameter([1, 4, 8, 8], ov.Type.f32, 'x')
    weight = ops.reduce_mean(x, ops.constant(np.array([2, 3])), True)
    conv = ops.convolution(fake(x, 0, 2.55), weight, [1, 1], [0, 0], [0, 0], [1, 1])
    conv.set_friendly_name('conv')
    assert ('V4', 'conv') in {(v.rule, v.node) for v in verify_file(save(conv, x, tmp_path), 'openvino')}


def test_weight_is_not_clamped(tmp_path: Path) -> None:
    values = ops.constant(np.full((6, 4, 3, 3), 0.05, np.float32))
    path = one_conv(tmp_path, clamped(values, -3, 3, 'w', 'i8'))
    assert {v.rule for v in verify_file(path, 'openvino', ExpectedQuantization(1))} == {'V4', 'C5'}
    assert {v.rule for v in verify_file(path, 'openvino')} == {'V4'}


def test_integer_weight(tmp_path: Path) -> None:
    assert found(one_conv(tmp_path, int8_weight(6))) == set()
    assert found(one_conv(tmp_path, int8_weight(1))) == {('C2', 'w')}


def test_wide_integer_weight(tmp_path: Path) -> None:
    integers = ops.convert(ops.constant(np.ones((6, 4, 3, 3), np.int16)), 'f32')
    weight = ops.multiply(integers, ops.constant(np.full((6, 1, 1, 1), 0.01, np.float32)))
    weight.set_friendly_name('w')
    assert found(one_conv(tmp_path, weight)) == {('C6', 'w'), ('V1', 'w')}


def test_doubled_quantizer_and_missing_layer(tmp_path: Path) -> None:
    x = ops.parameter([1, 4, 8, 8], ov.Type.f32, 'x')
    twice = fake(fake(x, 0, 2.55, name='first'), 0, 2.55, name='second')
    path = save(ops.convolution(twice, int8_weight(), [1, 1], [1, 1], [1, 1], [1, 1]), x, tmp_path)
    assert found(path, 'academic', ExpectedQuantization(2)) == {('C5', 'second'), ('C5', 'net')}


def test_computed_range(tmp_path: Path) -> None:
    x = ops.parameter([1, 4, 8, 8], ov.Type.f32, 'x')
    highest = ops.reduce_max(x, ops.constant(np.array([0, 1, 2, 3])), True)
    zero = ops.constant(np.float32(0))
    quant = ops.fake_quantize(x, zero, highest, zero, highest, 256)
    quant.set_friendly_name('fq')
    path = save(ops.convolution(quant, int8_weight(), [1, 1], [1, 1], [1, 1], [1, 1]), x, tmp_path)
    assert found(path, 'academic') == {('C1', 'fq')}
