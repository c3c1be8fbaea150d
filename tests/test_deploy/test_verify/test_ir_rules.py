"""Rules that an OpenVINO IR shows: converted Q/DQ graphs pass, graphs built to break one rule are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import openvino as ov
import pytest
from openvino import opset13 as ops

from mmbrecq.deploy.verify import PRESETS, verify_file


def convert(model: onnx.ModelProto, folder: Path) -> Path:
    path = graphs.save(model, folder)
    ov.save_model(ov.convert_model(path), path.with_suffix('.xml'), compress_to_fp16=False)
    return path.with_suffix('.xml')


def found(path: Path, preset: str = 'openvino') -> set:
    return {(v.rule, v.node) for v in verify_file(path, preset)}


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('signed', [False, True])
@pytest.mark.parametrize('integer', [False, True])
def test_valid_chain(tmp_path: Path, bits: int, signed: bool, integer: bool) -> None:
    path = convert(graphs.chain(signed=signed, bits=bits, integer=integer), tmp_path)
    for preset in PRESETS:
        assert verify_file(path, preset) == []


@pytest.mark.parametrize(
    'model', [graphs.residual(), graphs.residual('conv'), graphs.concat(), graphs.runtime_residual()]
)
def test_valid_joins(tmp_path: Path, model: onnx.ModelProto) -> None:
    assert verify_file(convert(model, tmp_path), 'openvino') == []


def test_valid_depthwise_transposed_and_linear(tmp_path: Path) -> None:
    b = graphs.Builder()
    x = b.qdq(b.conv(b.qdq('x', 'in'), 'dw', group=4), 'a1')
    x = b.qdq(b.node('ConvTranspose', [x, b.weight('up', (4, 6, 2, 2), 1)], 'up', strides=[2, 2]), 'a2')
    x = b.qdq(b.node('Flatten', [b.node('GlobalAveragePool', [x], 'gap')], 'flat'), 'a3')
    model = b.model(b.node('MatMul', [x, b.weight('fc', (6, 5), 1)], 'fc'), ['N', 5])
    assert verify_file(convert(model, tmp_path), 'openvino') == []


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
    assert verify_file(path, 'openvino') == []


@pytest.mark.parametrize(
    ('rule', 'node', 'tensor', 'value'),
    [
        ('C1', 'a1_DQ', 'a1_scale', np.float32(0)),
        ('C1', 'a1_DQ', 'a1_scale', np.float32(-0.1)),
        ('C1', 'a1_DQ', 'a1_scale', np.float32('nan')),
        ('C1', 'conv1_w_DQ', 'conv1_w_scale', np.float32([0.1, 0, 0.1, 0.1])),
        ('C1', 'conv1_w_DQ', 'conv1_w_scale', np.float32([0.1, -1, 0.1, 0.1])),
        ('C1', 'conv1_w_DQ', 'conv1_w_scale', np.float32([0.1, 'inf', 0.1, 0.1])),
        ('V4', 'conv1_w_DQ', 'conv1_w_zero', np.int8([0, 1, 0, 0])),
    ],
)
def test_broken_constant(tmp_path: Path, rule: str, node: str, tensor: str, value: Any) -> None:
    model = graphs.chain(bits=4)
    graphs.set_tensor(model, tensor, value)
    assert found(convert(model, tmp_path)) == {(rule, node)}


@pytest.mark.parametrize('op', ['Mul', 'Add'])
def test_constant_folded_into_a_range(tmp_path: Path, op: str) -> None:
    """convert_model folds it into the FakeQuantize, so that its input range is no longer its output range."""
    model = graphs.chain()
    graphs.insert(model, op, 'extra', 'a4_Q', [graphs.add_tensor(model, 'two', np.float32(2))])
    path = convert(model, tmp_path)
    assert not any(op.get_friendly_name() == 'extra' for op in ov.Core().read_model(path).get_ops())
    assert verify_file(path, 'openvino') == []


def fake(x: Any, low: Any, high: Any, levels: int = 256, name: str = 'fq', out: Any = None) -> Any:
    bounds = [np.float32(value) for value in (low, high, *(out or (low, high)))]
    node = ops.fake_quantize(x, *[ops.constant(value) for value in bounds], levels)
    node.set_friendly_name(name)
    return node


def int8_weight() -> Any:
    integers = ops.convert(ops.constant(np.arange(6 * 4 * 9).reshape(6, 4, 3, 3).astype(np.int8)), 'f32')
    return ops.multiply(integers, ops.constant(np.full((6, 1, 1, 1), 0.01, np.float32)))


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
    ('levels', 'low', 'broken'),
    [
        (255, -127, set()),
        (256, -128, set()),
        (256, -129, {('V4', 'wq')}),
        (16, -8, {('V1', 'wq')}),
    ],
)
def test_fake_quantize_of_a_weight(tmp_path: Path, levels: int, low: int, broken: set) -> None:
    steps = np.random.default_rng(0).integers(-8, 8, (6, 4, 3, 3)).astype(np.float64)
    scale = np.linspace(0.01, 0.02, 6).reshape(6, 1, 1, 1)
    values = ops.constant((steps * scale).astype(np.float32))
    weight = fake(values, low * scale, (low + levels - 1) * scale, levels, 'wq')
    assert found(one_conv(tmp_path, weight)) == broken


def test_wide_integer_weight(tmp_path: Path) -> None:
    integers = ops.convert(ops.constant(np.ones((6, 4, 3, 3), np.int16)), 'f32')
    weight = ops.multiply(integers, ops.constant(np.full((6, 1, 1, 1), 0.01, np.float32)))
    weight.set_friendly_name('w')
    assert found(one_conv(tmp_path, weight)) == {('V1', 'w')}


def test_computed_range(tmp_path: Path) -> None:
    x = ops.parameter([1, 4, 8, 8], ov.Type.f32, 'x')
    highest = ops.reduce_max(x, ops.constant(np.array([0, 1, 2, 3])), True)
    zero = ops.constant(np.float32(0))
    quant = ops.fake_quantize(x, zero, highest, zero, highest, 256)
    quant.set_friendly_name('fq')
    path = save(ops.convolution(quant, int8_weight(), [1, 1], [1, 1], [1, 1], [1, 1]), x, tmp_path)
    assert found(path, 'academic') == {('C1', 'fq')}


@pytest.mark.parametrize('bits', [4, 8])
def test_quantized_output(tmp_path: Path, bits: int) -> None:
    """With a Clip of integers, too, where a pair stays Convert, Clamp, Convert and Multiply, and behind a move."""
    b = graphs.Builder(integer=True)
    x = b.qdq(b.conv(b.qdq('x', 'in'), 'conv1'), 'out', None if bits == 8 else (0, 15))
    path = convert(b.model(b.node('Transpose', [x], 'turn', perm=[0, 2, 3, 1])), tmp_path)
    assert [rule for rule, _ in found(path)] == ['V6']
    assert found(path, 'academic') == set()


@pytest.mark.parametrize(('also', 'broken'), [(False, set()), (True, {('V5', 'fq')})])
def test_range_per_channel_before_a_depthwise_convolution(tmp_path: Path, also: bool, broken: set) -> None:
    x = ops.parameter([1, 4, 8, 8], ov.Type.f32, 'x')
    quantized = fake(x, 0, np.linspace(1, 2, 4).reshape(1, 4, 1, 1))
    integers = ops.convert(ops.constant(np.ones((4, 1, 1, 3, 3), np.int8)), 'f32')
    weight = ops.multiply(integers, ops.constant(np.full((4, 1, 1, 1, 1), 0.01, np.float32)))
    outputs = [ops.group_convolution(quantized, weight, [1, 1], [1, 1], [1, 1], [1, 1])]
    outputs += [ops.convolution(quantized, int8_weight(), [1, 1], [1, 1], [1, 1], [1, 1])] if also else []
    ov.save_model(ov.Model(outputs, [x], 'net'), tmp_path / 'net.xml')
    assert found(tmp_path / 'net.xml') == broken
