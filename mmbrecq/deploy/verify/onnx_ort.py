"""O1 to O3: what ONNX Runtime asks of a Q/DQ ONNX file to run it in integer kernels.

Source: ONNX Runtime's Q/DQ selectors and its ReLU fusion (``core/optimizer/qdq_transformer``), and the
optimized graphs that it writes.
"""

import numpy as np

from mmbrecq.deploy.verify.onnx_graph import MOVE_OPS, Faults, Node, OnnxGraph
from mmbrecq.deploy.verify.onnx_structure import title


def check_outputs(graph: OnnxGraph) -> Faults:
    """O1: a quantized convolution feeds a Q, with nothing but a ReLU or Clip between; a network output is exempt.

    So is one that is only moved, as the scores of a classifier whose last layer is a convolution.
    """
    for layer in graph.layers():
        integer = layer.weight_dq is not None and graph.quantized_sources(layer.data) is not None
        if layer.node.op != 'Conv' or not integer:
            continue
        last = layer.node
        readers = graph.consumers(last.outputs[0])
        while len(readers) == 1 and readers[0].op in ('Relu', 'Clip') and last.outputs[0] not in graph.outputs:
            last = readers[0]
            readers = graph.consumers(last.outputs[0])
        if _leaves(graph, last):
            continue
        others = [reader for reader in readers if reader.op != 'QuantizeLinear']
        if others or len(readers) != 1:
            found = ', '.join(title(reader) for reader in others or readers) or 'nothing'
            yield layer.node.name, f'expected a QuantizeLinear after it, but got {found}'


def _leaves(graph: OnnxGraph, node: Node) -> bool:
    """Returns whether the result of a node is an output of the network, or only moved to one."""
    readers = graph.consumers(node.outputs[0])
    moves = len(readers) == 1 and readers[0].op in MOVE_OPS
    return node.outputs[0] in graph.outputs or (moves and _leaves(graph, readers[0]))


def check_relu_grids(graph: OnnxGraph) -> Faults:
    """O2: after a ReLU the grid is uint8 with zero-point 0; an int8 zero-point 0 leaves the convolution in float."""
    for node in graph.activation_quantizers():
        clip = graph.producer(node.input(0))
        if not _non_negative(graph, clip):
            continue
        zero_point = graph.zero_point(node)
        if graph.zero_point_range(node) != (0, 255) or zero_point.any():
            kind = graph.constant(node.input(2))
            found = f'{"no type" if kind is None else kind.dtype.name} and {zero_point.flat[0]}'
            yield node.name, f'expected uint8 and zero-point 0 after {title(clip)}, but got {found}'


def _non_negative(graph: OnnxGraph, node: Node | None) -> bool:
    """Whether the node is a ReLU, or a Clip that starts at 0 or reads such a node."""
    while node is not None and node.op == 'Clip':
        bounds = graph.clip_bounds(node)
        if bounds is not None and bounds[0] >= 0:
            return True
        node = graph.producer(node.input(0))
    return node is not None and node.op == 'Relu'


def check_pools(graph: OnnxGraph) -> Faults:
    """O3: a max-pool between a DQ and a Q has one scale and zero-point on both sides."""
    for pool in graph.of_type('MaxPool'):
        before = graph.producer(pool.input(0))
        if before is None or before.op != 'DequantizeLinear':
            continue
        for after in graph.consumers(pool.outputs[0]):
            if after.op != 'QuantizeLinear' or graph.same_grid(before, after):
                continue
            first, second = graph.scale(before), graph.scale(after)
            if first is not None and second is not None and not np.isnan([first.min(), second.min()]).any():
                scales = f'{first.flat[0]:g} and {second.flat[0]:g}'
                yield pool.name, f'expected one scale and zero-point before and after it, but got scales {scales}'
