"""A read-only view of an ONNX file with Q/DQ nodes, and what the quantized torch model says of it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mmbrecq.dependencies import require
from mmbrecq.errors import ExportError, first_line

Array = npt.NDArray[Any]
Faults = Iterator[tuple[str, str]]
"""Names of nodes that break a rule, each with a sentence, see :class:`~mmbrecq.deploy.verify.Violation`."""

CONV_OPS = frozenset({'Conv', 'ConvTranspose'})
LAYER_OPS = CONV_OPS | {'Gemm', 'MatMul'}
QUANTIZATION_OPS = ('QuantizeLinear', 'DequantizeLinear')
# Whose operations every runtime has.
STANDARD_DOMAINS = frozenset({'', 'ai.onnx'})
# Their output holds only values of their inputs, or zeros: what lies on a grid stays on it.
MOVE_OPS = frozenset(
    {'Concat', 'Flatten', 'Gather', 'Identity', 'MaxPool', 'Pad', 'Reshape', 'Slice', 'Split', 'Squeeze', 'Transpose'}
    | {'DepthToSpace', 'Expand', 'SpaceToDepth', 'Unsqueeze'}
)
# Bounds of activation functions that are written as a Clip: ReLU6, Hardtanh, and ReLU1.
ACTIVATION_BOUNDS = frozenset({(0.0, 6.0), (-1.0, 1.0), (0.0, 1.0)})


class Grid(NamedTuple):
    """An activation grid: scales and zero-points, one or one per channel, and the smallest and the largest integer."""

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    low: int
    high: int


@dataclass(frozen=True)
class ExpectedQuantization:
    """Holds what the quantized torch model says about the ONNX file that was written from it.

    Args:
        layers: Number of convolution and linear calls with quantized weights; a layer that is called once per pyramid
            level counts once per call.
        weights: Path of a layer, with which the name of its integers begins -> smallest and largest integer; None
            leaves weights unchecked.
        activations: Grids of all activation quantizers; None leaves them unchecked. They are known by their values,
            because an exporter shares constants that are equal, and inlines others without a name.
    """

    layers: int
    weights: Mapping[str, tuple[int, int]] | None = None
    activations: frozenset[Grid] | None = None


@dataclass(frozen=True, eq=False)
class Node:
    """An operator: its name (its first output's where it has none), type, tensors and attributes."""

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def input(self, index: int) -> str:
        """Tensor at ``index``, the empty string where an optional input is left out."""
        return self.inputs[index] if index < len(self.inputs) else ''


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or a linear layer: its node, input, weight, and the DQ of the weight if there is one."""

    node: Node
    data: str
    weight: str
    weight_dq: Node | None


def integer_range(dtype: np.dtype[Any]) -> tuple[int, int] | None:
    """Smallest and largest integer of ``dtype`` (ml_dtypes' int4 and int2 included), None for other dtypes."""
    found = re.fullmatch(r'(u?)int(\d+)', dtype.name)
    if found is None:
        return None
    levels = 2 ** int(found[2])
    return (0, levels - 1) if found[1] else (-levels // 2, levels // 2 - 1)


class OnnxGraph:
    """Producers, consumers and constants of an ``onnx.ModelProto`` whose tensors are loaded.

    ``source`` names the file in messages. ExportError is raised if the model holds a subgraph or a local function,
    which the rules cannot see into.
    """

    def __init__(self, model: Any, source: str, expected: ExpectedQuantization | None = None) -> None:
        from onnx import numpy_helper

        graph = model.graph
        self.name = graph.name or Path(source).name
        self.expected = expected
        self.opset = max((o.version for o in model.opset_import if o.domain in STANDARD_DOMAINS), default=0)
        self.constants: dict[str, Array] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.outputs = [value.name for value in graph.output]
        if model.functions:
            raise ExportError(f'{source}: expected plain operators, but got local function {model.functions[0].name!r}')
        self.nodes = [_read_node(proto, source) for proto in graph.node]
        self._producers = {tensor: node for node in self.nodes for tensor in node.outputs if tensor}
        self._consumers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for tensor in dict.fromkeys(filter(None, node.inputs)):
                self._consumers.setdefault(tensor, []).append(node)
            if node.op == 'Constant' and node.attributes:
                given = next(iter(node.attributes.values()))
                value = np.asarray(given)
                listed = value is not given and value.dtype == np.float64
                self.constants[node.outputs[0]] = value.astype(np.float32) if listed else value
            elif node.op == 'Identity' and node.inputs[0] in self.constants:
                self.constants[node.outputs[0]] = self.constants[node.inputs[0]]

    def producer(self, tensor: str) -> Node | None:
        """Node that writes ``tensor``; None for inputs and initializers."""
        return self._producers.get(tensor)

    def consumers(self, tensor: str) -> list[Node]:
        """Nodes that read ``tensor``, each once."""
        return self._consumers.get(tensor, [])

    def constant(self, tensor: str) -> Array | None:
        """Value of an initializer or a Constant node, None for what is computed."""
        return self.constants.get(tensor)

    def of_type(self, *ops: str) -> Iterator[Node]:
        """Nodes of the types, in file order."""
        return (node for node in self.nodes if node.op in ops and node.domain in STANDARD_DOMAINS)

    def activation_quantizers(self) -> Iterator[Node]:
        """QuantizeLinear nodes whose data is computed, so not a weight."""
        return (node for node in self.of_type('QuantizeLinear') if self.constant(node.input(0)) is None)

    def integer_clip(self, quantizer: Node) -> Node | None:
        """The Clip between an activation's Q and its DQ, which narrows the grid; None if there is none."""
        codes = quantizer.outputs[0]
        clip, *others = self.consumers(codes) or [quantizer]
        if others or self.constant(quantizer.input(0)) is not None:
            return None
        return clip if clip.op == 'Clip' and clip.domain in STANDARD_DOMAINS and clip.input(0) == codes else None

    def dequantizers(self, quantizer: Node) -> list[Node]:
        """Nodes that read the integers of a Q, through the Clip that narrows its grid; DQ nodes in a sound file."""
        return self.consumers((self.integer_clip(quantizer) or quantizer).outputs[0])

    def readers_behind(self, quantizer: Node) -> list[Node]:
        """Nodes that read what comes from a Q through its DQ."""
        dequantizers = [node for node in self.dequantizers(quantizer) if node.op == 'DequantizeLinear']
        return [reader for dq in dequantizers for reader in self.consumers(dq.outputs[0])]

    def quantizer(self, dq: Node | None) -> Node | None:
        """The Q whose integers a DQ reads, through the Clip that narrows its grid; None if there is none, or no DQ."""
        clip = maker = None if dq is None or dq.op != 'DequantizeLinear' else self.producer(dq.input(0))
        if maker is not None and maker.op == 'Clip':
            maker = self.producer(maker.input(0))
        if maker is None or maker.op != 'QuantizeLinear':
            return None
        return maker if clip in (maker, self.integer_clip(maker)) else None

    def zero_point_range(self, node: Node) -> tuple[int, int] | None:
        """Integer range of a Q or DQ node's container; ONNX's uint8 where nothing says otherwise."""
        for tensor in (node.input(2), node.input(0) if node.op == 'DequantizeLinear' else ''):
            value = self.constant(tensor)
            if value is not None:
                return integer_range(value.dtype)
        quantizer = self.quantizer(node)
        return (0, 255) if quantizer is None else self.zero_point_range(quantizer)

    def zero_point(self, node: Node) -> Array:
        """Zero-point of a Q or DQ node as int64; 0 where it is missing or computed."""
        value = self.constant(node.input(2))
        return np.zeros((), np.int64) if value is None else value.astype(np.int64)

    def scale(self, node: Node) -> Array | None:
        """Scale of a Q or DQ node as float64, None where it is computed."""
        value = self.constant(node.input(1))
        return None if value is None else value.astype(np.float64)

    def same_grid(self, first: Node, second: Node) -> bool:
        """Whether two Q or DQ nodes have equal constant scale, zero-point and container."""
        a, b = self.scale(first), self.scale(second)
        if a is None or b is None or not np.array_equal(a, b):
            return False
        same_axis = a.size == 1 or first.attributes.get('axis', 1) == second.attributes.get('axis', 1)
        same_container = self.zero_point_range(first) == self.zero_point_range(second)
        return same_axis and same_container and np.array_equal(self.zero_point(first), self.zero_point(second))

    def layers(self) -> Iterator[Layer]:
        """Convolutions and linear layers; a MatMul of two computed tensors is none."""
        for node in self.of_type(*LAYER_OPS):
            places = ((0, 1), (1, 0)) if node.op == 'MatMul' else ((0, 1),)
            for data, weight in places:
                found, dq = self._trace_weight(node.input(weight))
                if found or node.op in CONV_OPS:
                    yield Layer(node, node.input(data), node.input(weight), dq)
                    break

    def _trace_weight(self, tensor: str) -> tuple[bool, Node | None]:
        """Whether ``tensor`` comes from a constant, and the DQ on the way."""
        dq: Node | None = None
        while tensor not in self.constants:
            node = self.producer(tensor)
            if node is None or node.op not in MOVE_OPS.union(QUANTIZATION_OPS):
                return False, None
            if node.op == 'DequantizeLinear' and dq is None:
                dq = node
            tensor = node.inputs[0]
        return True, dq

    def quantized_sources(self, tensor: str) -> list[Node] | None:
        """DQ nodes that ``tensor`` comes from through nodes that only move values; None if any path has none."""
        node = self.producer(tensor)
        if node is None or node.op == 'DequantizeLinear':
            return None if node is None else [node]
        nearest = node.op == 'Resize' and node.attributes.get('mode', 'nearest') == 'nearest'
        if node.op not in MOVE_OPS and not nearest:
            return None
        sources = [self.quantized_sources(source) for source in node.inputs[: None if node.op == 'Concat' else 1]]
        return None if None in sources else [dq for found in sources if found is not None for dq in found]

    def clip_bounds(self, node: Node) -> tuple[float, float] | None:
        """Bounds of a Clip, infinite where left out; None where a bound is not one constant, cast or not."""
        bounds = []
        for index, name, default in ((1, 'min', -np.inf), (2, 'max', np.inf)):
            if not node.input(index):
                bounds.append(float(node.attributes.get(name, default)))
                continue
            maker = self.producer(node.input(index))
            source = maker.input(0) if maker is not None and maker.op == 'Cast' else node.input(index)
            value = self.constant(source)
            if value is None or value.size != 1:
                return None
            bounds.append(float(value.reshape(())))
        return bounds[0], bounds[1]

    def grid_clip(self, quantizer: Node) -> Node | None:
        """The Clip just before a Q that narrows the grid; None if there is none or it is an activation function.

        Where a Clip of integers narrows the grid, the one before the Q has no other reason to be there. Where the grids
        of the model are known, a Clip before one that fills its container is an operation of the model.
        """
        node = self.producer(quantizer.input(0))
        if node is None or node.op != 'Clip' or self.integer_clip(quantizer) is not None:
            return None
        container, grids = self.zero_point_range(quantizer), self.expected and self.expected.activations
        fills = container is not None and self.grid(quantizer, container) in (grids or ())
        return None if fills or self.clip_bounds(node) in ACTIVATION_BOUNDS else node

    def grid(self, quantizer: Node, integers: tuple[int, int]) -> Grid:
        """The grid of a Q that is cut at two integers."""
        scale, zero_point = self.scale(quantizer), self.zero_point(quantizer)
        scales = tuple(() if scale is None else np.ravel(scale).tolist())
        return Grid(scales, tuple(np.ravel(zero_point).tolist()), *integers)


def _read_node(proto: Any, source: str) -> Node:
    from onnx import AttributeProto, helper, numpy_helper

    name = proto.name or (proto.output[0] if proto.output else proto.op_type)
    attributes: dict[str, Any] = {}
    for attribute in proto.attribute:
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            raise ExportError(f'{source}: expected no control flow, but got node {name!r} ({proto.op_type})')
        if attribute.type == AttributeProto.TENSOR:
            attributes[attribute.name] = numpy_helper.to_array(attribute.t)
        else:
            value = helper.get_attribute_value(attribute)
            attributes[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return Node(name, proto.op_type, proto.domain, tuple(proto.input), tuple(proto.output), attributes)


def read_onnx(path: Path, expected: ExpectedQuantization | None = None) -> OnnxGraph:
    """Reads an ONNX file, if onnx is installed; ExportError if it cannot be read, or holds what no rule sees into."""
    onnx = require('onnx')
    try:
        model = onnx.load(path)
        # Protobuf accepts many byte strings; a model names its opset and has nodes.
        if not model.opset_import or not model.graph.node:
            raise ValueError('no graph in it')
        return OnnxGraph(model, str(path), expected)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f'{path}: expected an ONNX model, but could not read it ({first_line(error)})') from error
