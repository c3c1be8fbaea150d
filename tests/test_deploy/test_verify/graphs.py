"""Small Q/DQ ONNX graphs, valid as they come, and the one change that breaks each rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SCALE = 0.05


class Builder:
    """Adds nodes one after the other; every method returns the name of its output tensor.

    Args:
        opset: Opset of the default domain.
        signed: Activations in int8, else uint8.
        integer: A narrow grid is clipped at its integers between Q and DQ, else at real values before Q.
        seed: Of the weights.
    """

    def __init__(self, opset: int = 17, signed: bool = False, integer: bool = False, seed: int = 0) -> None:
        self.opset, self.signed, self.integer = opset, signed, integer
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.rng = np.random.default_rng(seed)

    def tensor(self, name: str, value: Any) -> str:
        self.tensors[name] = np.asarray(value)
        return name

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name + '_out'], name=name, **attributes))
        return name + '_out'

    def qdq(self, x: str, name: str, clip: tuple[int, int] | None = None, scale: float = SCALE) -> str:
        """name_Q and name_DQ around 0, and name_clip to the integers ``clip`` with bounds name_l and name_h."""
        grid = [self.tensor(f'{name}_scale', np.float32(scale)), self.tensor(f'{name}_zero', self.container(0))]
        bounds = [
            self.tensor(f'{name}_{end}', self.container(value) if self.integer else np.float32(value * scale))
            for end, value in zip('lh', clip or (), strict=False)
        ]
        if bounds and not self.integer:
            x = self.node('Clip', [x, *bounds], f'{name}_clip')
        x = self.node('QuantizeLinear', [x, *grid], f'{name}_Q')
        if bounds and self.integer:
            x = self.node('Clip', [x, *bounds], f'{name}_clip')
        return self.node('DequantizeLinear', [x, *grid], f'{name}_DQ')

    def container(self, value: int) -> np.generic:
        return np.int8(value) if self.signed else np.uint8(value)

    def weight(self, name: str, shape: tuple[int, ...], axis: int) -> str:
        """Int8 initializer, one scale per index of ``axis``, name_w_DQ."""
        size = shape[axis]
        values = self.tensor(f'{name}_w', self.rng.integers(-2, 2, shape).astype(np.int8))
        scale = self.tensor(f'{name}_w_scale', self.rng.uniform(0.01, 0.02, size).astype(np.float32))
        zero = self.tensor(f'{name}_w_zero', np.zeros(size, np.int8))
        return self.node('DequantizeLinear', [values, scale, zero], f'{name}_w_DQ', axis=axis)

    def conv(self, x: str, name: str, c_in: int = 4, c_out: int = 4, **attributes: Any) -> str:
        group = attributes.get('group', 1)
        weight = self.weight(name, (c_out, c_in // group, 3, 3), 0)
        bias = self.tensor(f'{name}_b', self.rng.normal(size=c_out).astype(np.float32))
        attributes = {'kernel_shape': [3, 3], 'pads': [1] * 4} | attributes
        return self.node('Conv', [x, weight, bias], name, **attributes)

    def gemm(self, x: str, name: str, c_in: int = 4, c_out: int = 3) -> str:
        bias = self.tensor(f'{name}_b', np.zeros(c_out, np.float32))
        return self.node('Gemm', [x, self.weight(name, (c_out, c_in), 0), bias], name, transB=1)

    def gemm_and_add(self, x: str, name: str, c_in: int = 4, c_out: int = 3) -> str:
        """The form in which ONNX Runtime computes a Gemm with float result in integers."""
        product = self.node('Gemm', [x, self.weight(name, (c_out, c_in), 0)], name, transB=1)
        return self.node('Add', [product, self.tensor(f'{name}_b', np.zeros(c_out, np.float32))], f'{name}_add')

    def model(self, output: str, shape: list[Any] | None = None) -> onnx.ModelProto:
        """Input ``x`` of (N, 4, 8, 8); checked by ONNX itself."""
        graph = helper.make_graph(
            self.nodes,
            'net',
            [helper.make_tensor_value_info('x', TensorProto.FLOAT, ['N', 4, 8, 8])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape or ['N', 'C', 'H', 'W'])],
            [numpy_helper.from_array(value, name) for name, value in self.tensors.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', self.opset)], ir_version=10)
        onnx.checker.check_model(model)
        return model


def chain(opset: int = 17, signed: bool = False, bits: int = 8, integer: bool = False) -> onnx.ModelProto:
    """conv1 - relu1 - conv2 - relu2 - max-pool - global average pool - fc; 3 layers.

    Q/DQ before each layer and around the max-pool, clipped to ``bits`` where these are fewer than 8. With ``integer``
    as it is exported for ONNX Runtime: clips between Q and DQ, a Reshape for the Flatten, fc without its bias.
    """
    b = Builder(opset, signed, integer)
    full = (-128, 127) if signed else (0, 255)
    clip = None if bits == 8 else (full[0] >> (8 - bits), full[1] >> (8 - bits))
    x = b.qdq('x', 'in', clip)
    x = b.qdq(b.node('Relu', [b.conv(x, 'conv1')], 'relu1'), 'a1', clip)
    x = b.qdq(b.node('Relu', [b.conv(x, 'conv2')], 'relu2'), 'a2', clip)
    x = b.qdq(b.node('MaxPool', [x], 'pool', kernel_shape=[2, 2]), 'a3', clip)
    x = b.node('GlobalAveragePool', [x], 'gap')
    if integer:
        x = b.node('Reshape', [x, b.tensor('flat_shape', np.array([0, -1]))], 'flat')
        return b.model(b.gemm_and_add(b.qdq(x, 'a4', clip), 'fc'), ['N', 3])
    return b.model(b.gemm(b.qdq(b.node('Flatten', [x], 'flat'), 'a4', clip), 'fc'), ['N', 3])


def runtime_residual(integer: bool = True) -> onnx.ModelProto:
    """A residual block of 4 bits as ONNX Runtime wants it: both operands of the add through Q/DQ; 3 layers."""
    b = Builder(integer=integer)
    x = b.qdq('x', 'in', (0, 15))
    y = b.qdq(b.node('Relu', [b.conv(x, 'conv1')], 'relu1'), 'a1', (0, 15))
    y = b.qdq(b.conv(y, 'conv2'), 'a2', (0, 15))
    y = b.node('Relu', [b.node('Add', [y, x], 'add')], 'relu2')
    return b.model(b.conv(b.qdq(y, 'a3', (0, 15)), 'conv3'))


def residual(shortcut: str = 'identity', opset: int = 17) -> onnx.ModelProto:
    """A residual block as TensorRT wants it: conv2 straight into the add, the shortcut through Q/DQ.

    Args:
        shortcut: ``'identity'`` or ``'conv'``.
        opset: Opset of the default domain.
    """
    b = Builder(opset, signed=True)
    x = b.qdq('x', 'in')
    y = b.qdq(b.node('Relu', [b.conv(x, 'conv1')], 'relu1'), 'a1')
    y = b.conv(y, 'conv2')
    other = x if shortcut == 'identity' else b.qdq(b.conv(x, 'down'), 'a_down')
    y = b.node('Relu', [b.node('Add', [y, other], 'add')], 'relu2')
    return b.model(b.conv(b.qdq(y, 'a2'), 'conv3'))


def by_channel(reader: str, op: str = '', axis: int = 1) -> onnx.ModelProto:
    """A scale per channel on what ``reader`` (``depthwise``, ``dense``, ``both`` or ``sum``) reads, behind ``op``."""
    b = Builder()
    x = b.qdq('x', 'in')
    for pair in b.nodes:
        pair.attribute.append(helper.make_attribute('axis', axis))
    size = 4 if axis == 1 else 8
    b.tensor('in_scale', np.linspace(0.1, 0.4, size, dtype=np.float32))
    b.tensor('in_zero', np.arange(size, dtype=np.uint8))
    attributes = {'MaxPool': dict(kernel_shape=[1, 1]), 'Transpose': dict(perm=[0, 1, 3, 2])}
    moved = b.node(op, [x], 'move', **attributes[op]) if op else x
    outputs = [b.conv(moved, 'dw', group=4)] if reader != 'dense' else []
    outputs += [b.conv(moved, 'dense')] if reader in ('dense', 'both') else [moved] if reader == 'sum' else []
    return b.model(outputs[0] if len(outputs) == 1 else b.node('Add', outputs, 'add'))


def concat() -> onnx.ModelProto:
    """Two convolutions, quantized with one scale, concatenated into a third."""
    b = Builder(signed=True)
    x = b.qdq('x', 'in')
    parts = [b.qdq(b.node('Relu', [b.conv(x, f'conv{i}')], f'relu{i}'), f'a{i}') for i in (1, 2)]
    return b.model(b.conv(b.node('Concat', parts, 'cat', axis=1), 'conv3', c_in=8))


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def set_tensor(model: onnx.ModelProto, name: str, value: Any) -> None:
    """Replaces an initializer."""
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))


def rename_tensor(model: onnx.ModelProto, name: str, new: str) -> None:
    """Renames an initializer for all that read it."""
    next(t for t in model.graph.initializer if t.name == name).name = new
    for reader in model.graph.node:
        for index, tensor in enumerate(reader.input):
            reader.input[index] = new if tensor == name else tensor


def add_tensor(model: onnx.ModelProto, name: str, value: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def set_attribute(model: onnx.ModelProto, name: str, **attributes: Any) -> None:
    """Sets attributes of a node; None removes one."""
    target = node(model, name)
    kept = [a for a in target.attribute if a.name not in attributes]
    del target.attribute[:]
    target.attribute.extend(kept)
    target.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items() if v is not None)


def rewire(model: onnx.ModelProto, name: str, index: int, tensor: str) -> None:
    """Lets input ``index`` of a node read ``tensor``; the empty string drops a last input."""
    target = node(model, name)
    if tensor:
        target.input[index] = tensor
    else:
        del target.input[index]


def set_grid(model: onnx.ModelProto, name: str, scale: Any, zero_point: Any) -> None:
    """Scale and zero-point of the pair name_Q, name_DQ (or of the weight DQ alone)."""
    set_tensor(model, f'{name}_scale', scale)
    set_tensor(model, f'{name}_zero', zero_point)


def drop(model: onnx.ModelProto, name: str) -> None:
    """Takes a node out; what read it reads its input 0."""
    target = node(model, name)
    for reader in model.graph.node:
        for index, tensor in enumerate(reader.input):
            if tensor == target.output[0]:
                reader.input[index] = target.input[0]
    model.graph.node.remove(target)


def insert(
    model: onnx.ModelProto, op: str, name: str, before: str, inputs: Sequence[str] = (), **attributes: Any
) -> None:
    """Inserts a node in front of input 0 of ``before``."""
    target = node(model, before)
    new = helper.make_node(op, [target.input[0], *inputs], [name + '_out'], name=name, **attributes)
    model.graph.node.insert(list(model.graph.node).index(target), new)
    target.input[0] = name + '_out'


def insert_qdq(model: onnx.ModelProto, name: str, before: str, grid: str) -> None:
    """Inserts name_Q and name_DQ in front of input 0 of ``before``, with the grid of the pair ``grid``."""
    tensors = [f'{grid}_scale', f'{grid}_zero']
    insert(model, 'QuantizeLinear', f'{name}_Q', before, tensors)
    insert(model, 'DequantizeLinear', f'{name}_DQ', before, tensors)


def save(model: onnx.ModelProto, folder: Path, name: str = 'net.onnx') -> Path:
    onnx.save(model, folder / name)
    return folder / name
