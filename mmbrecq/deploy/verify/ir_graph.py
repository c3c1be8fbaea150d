"""A read-only view of an OpenVINO IR: layers, quantized weights and FakeQuantize operations in all their forms."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmbrecq.deploy.verify.ir_nodes import (
    CONV_AXES,
    INTEGER_TYPES,
    MOVE_OPS,
    SHAPE_OPS,
    Array,
    FakeQuant,
    IRNode,
    Layer,
    Weight,
)
from mmbrecq.deploy.verify.violation import ExpectedQuantization
from mmbrecq.errors import BackendError, ExportError


class IRGraph:
    """Layers and quantizers of an OpenVINO model.

    Args:
        model (openvino.Model): The model.
        source: Name of the file, for messages.
        expected: What the torch model says; None checks the file on its own.
    """

    def __init__(self, model: Any, source: str, expected: ExpectedQuantization | None = None) -> None:
        self.name = model.get_friendly_name() or source
        self.expected = expected
        self.nodes: list[IRNode] = []
        places: dict[str, IRNode] = {}
        for op in model.get_ordered_ops():
            node = _read_op(op)
            # get_name() is unique in a model, friendly names need not be.
            places[op.get_name()] = node
            node.inputs = [places[i.get_source_output().get_node().get_name()] for i in op.inputs()]
            for maker in node.inputs:
                maker.readers.append(node)
            self.nodes.append(node)

    def of_type(self, *ops: str) -> Iterator[IRNode]:
        """Operations of the types, in topological order."""
        return (node for node in self.nodes if node.op in ops)

    def fake_quants(self) -> Iterator[FakeQuant]:
        """FakeQuantize operations of activations, with the operations that dequantize them."""
        for node in self.nodes:
            found = self.as_fake_quant(node)
            if found is not None and found.node.inputs[0].constant() is None:
                yield found

    def as_fake_quant(self, node: IRNode) -> FakeQuant | None:
        """The quantizer that ends in ``node``, None if none does."""
        if node.op == 'FakeQuantize' and not any(_to_integers(reader) for reader in node.readers):
            return FakeQuant(node, node, int(node.attributes['levels']), *_bounds(node))
        parts = _dequantization(node)
        if parts is None:
            return None
        integers, scale, zero_point = parts
        clamps: list[IRNode] = []
        while integers.op in MOVE_OPS or _to_integers(integers) or _clamps_integers(integers):
            clamps += [integers] if integers.op == 'Clamp' else []
            integers = integers.inputs[0]
        if integers.op != 'FakeQuantize':
            return None
        low, high, first, last = _bounds(integers)
        zero = np.zeros(()) if zero_point is None else zero_point
        factor = np.full((), np.nan) if scale is None else scale
        ends = np.asarray((first - zero) * factor), np.asarray((last - zero) * factor)
        return FakeQuant(integers, node, int(integers.attributes['levels']), low, high, *ends, tuple(clamps))

    def used_integers(self) -> Iterator[tuple[IRNode, IRNode]]:
        """Conversions of a FakeQuantize to integers, each with an operation that computes something else from them."""
        for start in self.nodes:
            if not _to_integers(start) or start.inputs[0].op != 'FakeQuantize':
                continue
            reached = [start]
            for node in reached:
                for reader in node.readers:
                    if reader.op in MOVE_OPS or _to_integers(reader) or _clamps_integers(reader):
                        reached.append(reader)
                    elif reader.op not in ('Convert', 'ShapeOf'):
                        yield start, reader

    def layers(self) -> Iterator[Layer]:
        """Convolutions and linear layers; a MatMul of two computed tensors is none."""
        for node in self.of_type(*CONV_AXES, 'MatMul'):
            places = ((0, 1), (1, 0)) if node.op == 'MatMul' else ((0, 1),)
            for data, index in places:
                weight = self.weight(node.inputs[index])
                if weight is not None or node.inputs[index].constant() is not None or node.op in CONV_AXES:
                    yield Layer(node, node.inputs[data], weight)
                    break

    def weight(self, node: IRNode) -> Weight | None:
        """The quantized weight that ``node`` yields, None if it yields something else.

        OpenVINO folds a constant factor behind a layer into its weight, as one more Multiply; the integers and their
        scale stay below it.
        """
        while (inner := _before_a_factor(node)) is not None:
            node = inner
        found = self.as_fake_quant(node)
        if found is not None:
            # A clamp would change what the constant says.
            values = None if found.clamps else found.node.inputs[0].constant()
            return None if values is None else Weight(node, root(found.node), values, found.out_step, None, found)
        parts = _dequantization(node)
        if parts is None:
            return None
        integers, scale, zero_point = parts
        values, source = integers.constant(), root(integers)
        if values is None or source.dtype not in INTEGER_TYPES:
            return None
        return Weight(node, source, values, scale, zero_point, None)

    def quantized_sources(self, node: IRNode) -> list[FakeQuant] | None:
        """Quantizers that ``node`` comes from through operations that only move values; None if a path has none."""
        found = self.as_fake_quant(node)
        if found is not None:
            return [found]
        nearest = node.op == 'Interpolate' and node.attributes.get('mode') == 'nearest'
        if node.op not in MOVE_OPS and not nearest:
            return None
        makers = node.inputs if node.op == 'Concat' else node.inputs[:1]
        sources = [self.quantized_sources(maker) for maker in makers]
        return None if None in sources else [quant for found in sources if found is not None for quant in found]


def root(node: IRNode) -> IRNode:
    """First operation of the chain of first inputs that leads to ``node``."""
    while node.inputs:
        node = node.inputs[0]
    return node


def _bounds(fake_quantize: IRNode) -> tuple[Array, Array, Array, Array]:
    found = [source.constant() for source in fake_quantize.inputs[1:5]]
    low, high, out_low, out_high = (np.full((), np.nan) if bound is None else bound for bound in found)
    return low, high, out_low, out_high


def _to_integers(node: IRNode) -> bool:
    return node.op == 'Convert' and node.dtype in INTEGER_TYPES


def _before_a_factor(node: IRNode) -> IRNode | None:
    """What a change of shape or a constant factor is applied to; None for another operation."""
    if node.op in SHAPE_OPS:
        return node.inputs[0]
    if node.op == 'Multiply':
        for data, factor in (node.inputs, node.inputs[::-1]):
            if data.op in {'FakeQuantize', 'Multiply'} | SHAPE_OPS and factor.constant() is not None:
                return data
    return None


def _clamps_integers(node: IRNode) -> bool:
    return node.op == 'Clamp' and node.dtype in INTEGER_TYPES


def _dequantization(node: IRNode) -> tuple[IRNode, Array | None, Array | None] | None:
    """Integers, scale and zero-point of ``Convert -> [Subtract] -> Multiply``; None if ``node`` ends no such chain."""
    if node.op != 'Multiply':
        return None
    for data, scale in (node.inputs, node.inputs[::-1]):
        zero_point = None
        if data.op == 'Subtract':
            zero_point = data.inputs[1].constant()
            data = data.inputs[0]
        if data.op == 'Convert' and data.inputs[0].dtype in INTEGER_TYPES:
            return data.inputs[0], scale.constant(), zero_point
    return None


def _read_op(op: Any) -> IRNode:
    kind = op.get_type_name()
    dtype = op.get_output_element_type(0).get_type_name() if op.get_output_size() else ''
    value: Array | None = None
    if kind == 'Constant' and op.get_output_element_type(0).bitwidth >= 8:
        value = np.array(op.get_data())
    elif kind == 'Constant':
        # Packed values cannot be seen as an array; an empty one keeps the constant known as a constant.
        value = np.empty(0)
    return IRNode(op.get_friendly_name(), kind, dtype, dict(op.get_attributes()), value=value, shape=_shape(op))


def _shape(op: Any) -> tuple[int, ...]:
    shape = op.get_output_partial_shape(0) if op.get_output_size() else None
    if shape is None or shape.rank.is_dynamic:
        return ()
    return tuple(axis.get_length() if axis.is_static else -1 for axis in shape)


def read_ir(path: Path, expected: ExpectedQuantization | None = None) -> IRGraph:
    """Reads an OpenVINO IR (``.xml`` with its ``.bin`` beside it).

    Raises:
        BackendError: OpenVINO is not installed.
        ExportError: The file cannot be read.
    """
    try:
        import openvino
    except ImportError as error:
        raise BackendError(f'{path}: cannot read it without OpenVINO: pip install "mmbrecq[deploy]"') from error
    try:
        return IRGraph(openvino.Core().read_model(path), str(path), expected)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ExportError(f'{path}: expected an OpenVINO IR, but could not read it ({reason})') from error
