"""V1 to V7 on the Q/DQ ONNX file that OpenVINO's IR is converted from.

Source: OpenVINO's specification of FakeQuantize and its pages on low-precision transformations.
"""

import numpy as np

from mmbrecq.deploy.verify.onnx_graph import LAYER_OPS, MOVE_OPS, Faults, Node, OnnxGraph
from mmbrecq.deploy.verify.onnx_tensorrt import check_inputs

# They move values within their channels.
CHANNEL_OPS = frozenset({'Identity', 'MaxPool', 'Pad', 'Resize'})


def check_levels(graph: OnnxGraph) -> Faults:
    """V1: 8-bit containers, so that the converted FakeQuantize has 256 levels."""
    weights = {layer.weight_dq for layer in graph.layers() if layer.weight_dq is not None}
    for node in [*graph.activation_quantizers(), *sorted(weights, key=lambda dq: dq.name)]:
        container = graph.zero_point_range(node)
        levels = None if container is None else container[1] - container[0] + 1
        if levels != 256:
            yield node.name, f'expected 256 levels, but got {levels or "a type without levels"}'


def check_signed(graph: OnnxGraph) -> Faults:
    """V2: int8 activations have zero-point 0, their range is -128..127 steps."""
    for node in graph.activation_quantizers():
        low = -128 - int(graph.zero_point(node).flat[0])
        if graph.zero_point_range(node) == (-128, 127) and low not in (-128, 0):
            yield node.name, f'expected a range of -128..127 steps, but got {low}..{low + 255}'


def check_layer_inputs(graph: OnnxGraph) -> Faults:
    """V4: both inputs of a convolution or linear layer are quantized, or neither, and weights are symmetric."""
    yield from check_inputs(graph)
    for dq in dict.fromkeys(layer.weight_dq for layer in graph.layers()):
        container = None if dq is None else graph.zero_point_range(dq)
        if dq is None or container is None:
            continue
        # uint8 around 128 holds the same values as int8 around 0.
        middle = (container[0] + container[1] + 1) // 2
        offset = graph.zero_point(dq) - middle
        if np.any(offset):
            worst = offset[offset != 0].flat[0]
            yield dq.name, f'expected a symmetric weight, but its zero-point lies at {worst}'


def check_per_tensor(graph: OnnxGraph) -> Faults:
    """V5: activations have one scale per tensor, or one per channel where of all layers depthwise convolutions read."""
    for node in graph.activation_quantizers():
        scale = graph.scale(node)
        if scale is not None and scale.size != 1 and not _is_read_by_channel(graph, node, scale.size):
            message = 'expected one scale per tensor, or depthwise convolutions that read its channels'
            yield node.name, f'{message}, but got {scale.size} scales'


def _is_read_by_channel(graph: OnnxGraph, quantizer: Node, channels: int) -> bool:
    readers = graph.readers_behind(quantizer)
    for reader in readers:
        if reader.op in MOVE_OPS | {'Resize'}:
            if reader.op not in CHANNEL_OPS:
                return False
            readers += graph.consumers(reader.outputs[0])
        elif reader.op in LAYER_OPS and (reader.op != 'Conv' or reader.attributes.get('group', 1) != channels):
            return False
    return quantizer.attributes.get('axis', 1) == 1


def check_network_outputs(graph: OnnxGraph) -> Faults:
    """V6: network outputs are not quantized."""
    for tensor in graph.outputs:
        for dq in graph.quantized_sources(tensor) or []:
            yield dq.name, f'expected a float network output, but it quantizes output {tensor!r}'
