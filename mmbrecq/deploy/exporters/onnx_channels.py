"""Activations with one scale per channel, written for targets that compute with one scale per tensor.

``Q(s) -> DQ(s)`` is ``/ s -> Q(1) -> DQ(1) -> * s``, to the same integers. A convolution in front takes the division
into the scales of its weight and its bias, depthwise convolutions behind take the product into those of their weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmbrecq.deploy.verify.onnx_graph import Array, Node, OnnxGraph
from mmbrecq.deploy.verify.onnx_openvino import CHANNEL_OPS

_ONE = 'channel_scales/one'


def fold_channel_scales(proto: Any) -> None:
    """Gives every activation quantizer of ``proto`` that has a scale per channel the scale 1, in place.

    The channels of a quantizer have one zero-point.
    """
    view = OnnxGraph(proto, 'the exported graph')
    makers = {name: node for node in proto.graph.node for name in node.output}
    weights: dict[str, Array] = {}
    biases: dict[str, Array] = {}
    for quantizer in list(view.activation_quantizers()):
        scale, zero_point = view.scale(quantizer), view.constant(quantizer.input(2))
        if scale is None or zero_point is None or not scale.ndim:
            continue
        assert (zero_point == zero_point[0]).all(), 'channels with zero-points of their own'
        (dq,), writer = view.dequantizers(quantizer), _writer(view, quantizer)
        layers = _depthwise_readers(view, dq, scale.size)
        for layer in layers:
            multiplier = _channels(view, layer) // scale.size
            weights[layer.outputs[0]] = weights.get(layer.outputs[0], 1.0) * np.repeat(scale, multiplier)
        if writer is not None:
            weights[writer.outputs[0]] = weights.get(writer.outputs[0], 1.0) / scale
            biases[writer.outputs[0]] = 1.0 / scale
        shape = (-1, *[1] * len((writer or layers[0]).attributes['kernel_shape']))
        given = _store(proto.graph, f'{quantizer.name}/scales', scale.reshape(shape).astype(np.float32))
        if writer is None:
            _insert(proto.graph, 'Div', quantizer.input(0), given, [makers[quantizer.outputs[0]]])
        if not layers:
            _insert(
                proto.graph, 'Mul', dq.outputs[0], given, [makers[n.outputs[0]] for n in view.consumers(dq.outputs[0])]
            )
        zero = _store(proto.graph, f'{quantizer.name}/zero_point', zero_point[0])
        for node in (makers[quantizer.outputs[0]], makers[dq.outputs[0]]):
            node.input[1:] = [_store(proto.graph, _ONE, np.ones((), np.float32)), zero]
            node.attribute.remove(next(a for a in node.attribute if a.name == 'axis'))
    for output, factor in weights.items():
        _scale_layer(proto.graph, view, makers, output, factor, biases.get(output))


def _writer(view: OnnxGraph, quantizer: Node) -> Node | None:
    """The convolution whose output nothing but ``quantizer`` reads."""
    values = quantizer.input(0)
    node = view.producer(values)
    alone = view.consumers(values) == [quantizer] and values not in view.outputs
    return node if alone and node is not None and node.op == 'Conv' else None


def _depthwise_readers(view: OnnxGraph, dq: Node, channels: int) -> list[Node]:
    """The depthwise convolutions that read what ``dq`` writes, where nothing else does; else none."""
    layers: list[Node] = []
    readers = list(view.consumers(dq.outputs[0]))
    for reader in readers:
        if reader.op in CHANNEL_OPS:
            readers += view.consumers(reader.outputs[0])
        elif reader.op == 'Conv' and reader.attributes.get('group', 1) == channels:
            layers.append(reader)
        elif reader.op != 'Shape':
            return []
    return layers


def _channels(view: OnnxGraph, layer: Node) -> int:
    maker, name = view.producer(layer.input(1)), layer.input(1)
    return len(view.constants[name if maker is None else maker.input(0)])


def _scale_layer(
    graph: Any, view: OnnxGraph, makers: dict[str, Any], output: str, weight: Array, bias: Array | None
) -> None:
    """Multiplies the output channels of a convolution's weight and bias by factors; its integers stay."""
    from onnx import helper

    node = makers[output]
    dq = makers.get(node.input[1])
    if dq is None:
        values = view.constants[node.input[1]]
        factor = weight.reshape(-1, *[1] * (values.ndim - 1))
        node.input[1] = _store(graph, f'{node.name}/weight', (values * factor).astype(values.dtype))
    else:
        scale = (view.constants[dq.input[1]] * weight).astype(np.float32)
        zero = np.broadcast_to(view.constants[dq.input[2]], scale.shape)
        inputs = [dq.input[0], _store(graph, f'{node.name}/scale', scale), dq.input[2]]
        if zero.shape != view.constants[dq.input[2]].shape:
            inputs[2] = _store(graph, f'{node.name}/zero_point', zero)
        name = f'{node.name}/dequantized'
        new = helper.make_node('DequantizeLinear', inputs, [name], name=name, axis=0)
        graph.node.insert(list(graph.node).index(node), new)
        node.input[1] = name
    if bias is not None and len(node.input) > 2:
        values = view.constants[node.input[2]]
        node.input[2] = _store(graph, f'{node.name}/bias', (values * bias).astype(values.dtype))


def _store(graph: Any, name: str, values: Array) -> str:
    """Adds an initializer, once, and returns its name."""
    from onnx import numpy_helper

    if all(tensor.name != name for tensor in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values).reshape(np.shape(values)), name))
    return name


def _insert(graph: Any, op: str, values: str, scales: str, readers: list[Any]) -> None:
    """Puts ``op`` between a tensor and ``readers`` of it."""
    from onnx import helper

    new = helper.make_node(op, [values, scales], [f'{scales}/{op}'], name=f'{scales}/{op}')
    graph.node.insert(min(list(graph.node).index(reader) for reader in readers), new)
    for reader in readers:
        reader.input[:] = [new.output[0] if name == values else name for name in reader.input]
