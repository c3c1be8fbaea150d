"""Rewrites of an exported ONNX graph into the forms that a runtime computes in integers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mmbrecq.presets import Preset


def rewrite_for(proto: Any, preset: Preset) -> None:
    """Changes ``proto`` in place; the function it computes stays the same.

    ONNX Runtime computes a linear layer with a float result in integers only where the bias is added apart, and does
    not look through Flatten, which is a Reshape when it keeps the batch axis. Where a CPU has no VNNI it moves int8
    weights that need all 8 bits to uint8, one by one, and refuses a file in which two of them share a zero-point.
    """
    _drop_aliases(proto.graph)
    _own_zero_points(proto.graph)
    if preset.name == 'openvino':
        clip_signed_values(proto)
    if preset.bias_apart == 'all':
        _split_bias(proto.graph, ('Conv', 'ConvTranspose', 'Gemm'))
    if preset.bias_apart == 'linear':
        _flatten_to_reshape(proto.graph)
        _split_bias(proto.graph, ('Gemm',))


def clip_signed_values(proto: Any) -> None:
    """Moves every Clip of int8 integers in front of its QuantizeLinear, as a Clip of real values; both cut alike.

    OpenVINO's CPU plugin (seen with 2026.4) returns wrong numbers for a convolution that reads clipped int8 integers;
    clipped uint8 ones it computes right. A grid per channel keeps its Clip: a Clip of real values has two scalars.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    from mmbrecq.deploy.verify.onnx_graph import OnnxGraph

    view = OnnxGraph(proto, 'the exported graph')
    makers = {node.output[0]: node for node in proto.graph.node}
    for found in list(view.activation_quantizers()):
        clip, scale = view.integer_clip(found), view.scale(found)
        bounds = None if clip is None else view.clip_bounds(clip)
        signed = view.zero_point_range(found) == (-128, 127)
        if clip is None or bounds is None or scale is None or scale.size != 1 or not signed:
            continue
        quantizer, old = makers[found.outputs[0]], makers[clip.outputs[0]]
        names = [f'{old.name}/{end}' for end in ('low', 'high')]
        for name, bound in zip(names, bounds, strict=True):
            value = np.float32((bound - int(view.zero_point(found).flat[0])) * float(scale.flat[0]))
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        for reader in view.dequantizers(found):
            makers[reader.outputs[0]].input[0] = quantizer.output[0]
        new = helper.make_node('Clip', [quantizer.input[0], *names], [f'{old.name}/values'], name=old.name)
        quantizer.input[0] = new.output[0]
        proto.graph.node.remove(old)
        proto.graph.node.insert(list(proto.graph.node).index(quantizer), new)
    read = {name for node in proto.graph.node for name in node.input} | {value.name for value in proto.graph.output}
    for node in list(proto.graph.node):
        if node.op_type == 'Constant' and node.output[0] not in read:
            proto.graph.node.remove(node)


def _drop_aliases(graph: Any) -> None:
    """Lets the readers of a copy of an initializer read the initializer.

    Torch shares equal initializers by an Identity, and a quantizer that is called twice reads its scale the second time
    through a Cast to the type that it has.
    """
    types, outputs = {t.name: t.data_type for t in graph.initializer}, {value.name for value in graph.output}
    aliases: dict[str, str] = {}
    for node in list(graph.node):
        source = aliases.get(node.input[0], node.input[0]) if node.input else ''
        if source not in types or node.output[0] in outputs:
            continue
        casts = [a.i for a in node.attribute if node.op_type == 'Cast' and a.name == 'to']
        if node.op_type == 'Identity' or casts == [types[source]]:
            aliases[node.output[0]] = source
            graph.node.remove(node)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = aliases.get(name, name)


def _own_zero_points(graph: Any) -> None:
    """Gives a weight a zero-point of its own where it shares one with another weight or an activation."""
    constants = {t.name: t for t in graph.initializer}
    dequantizers = [n for n in graph.node if n.op_type == 'DequantizeLinear' and n.input[0] in constants]
    weights = {n.output[0] for n in dequantizers}
    owners = {name: '' for n in graph.node if n.output[0] not in weights for name in n.input}
    for node in dequantizers:
        weight, zero_point = node.input[0], node.input[2]
        if owners.setdefault(zero_point, weight) == weight:
            continue
        node.input[2] = f'{weight}/zero_point'
        if node.input[2] not in constants:
            copy = graph.initializer.add()
            copy.CopyFrom(constants[zero_point])
            copy.name = node.input[2]
            constants[copy.name] = copy


def _flatten_to_reshape(graph: Any) -> None:
    import numpy as np
    from onnx import helper, numpy_helper

    for index, node in enumerate(list(graph.node)):
        if node.op_type != 'Flatten' or any(a.name == 'axis' and a.i != 1 for a in node.attribute):
            continue
        shape = f'{node.name}/shape'
        graph.initializer.append(numpy_helper.from_array(np.array([0, -1], np.int64), shape))
        new = helper.make_node('Reshape', [node.input[0], shape], list(node.output), name=node.name)
        graph.node.remove(node)
        graph.node.insert(index, new)


def _split_bias(graph: Any, op_types: Collection[str]) -> None:
    """Adds the bias of every node of these types by an Add behind it."""
    import numpy as np
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        if node.op_type not in op_types or len(node.input) < 3 or node.input[2] not in constants:
            continue
        bias = numpy_helper.to_array(constants[node.input[2]])
        if node.op_type != 'Gemm':
            spatial = len(constants[_weight(graph, node)].dims) - 2
            bias = bias.reshape(-1, *[1] * spatial)
        apart = f'{node.name}/apart'
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(bias), apart))
        index, output, product = list(graph.node).index(node), node.output[0], f'{node.name}/product'
        del node.input[2:]
        node.output[0] = product
        graph.node.insert(index + 1, helper.make_node('Add', [product, apart], [output], name=f'{node.name}/bias'))
    read = {name for node in graph.node for name in node.input}
    for tensor in [t for t in graph.initializer if t.name not in read]:
        graph.initializer.remove(tensor)


def _weight(graph: Any, node: Any) -> str:
    """The initializer that holds the weight of ``node``, behind its DequantizeLinear where it has one."""
    makers = {output: n for n in graph.node for output in n.output}
    name = node.input[1]
    return str(makers[name].input[0]) if name in makers else str(name)
