"""Rewrites of an exported ONNX graph into the forms that a runtime computes in integers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mmbrecq.deploy.exporters.onnx_channels import fold_channel_scales
from mmbrecq.errors import ExportError
from mmbrecq.presets import Preset

_COUNTED = ('ceil_mode', 'count_include_pad', 'pads')


def rewrite_for(proto: Any, preset: Preset) -> None:
    """Changes ``proto`` in place; the function it computes stays the same.

    ONNX Runtime computes a linear layer with a float result in integers only where the bias is added apart. It does
    not look through what moves values from a DequantizeLinear to a layer (Concat, Pad, Slice, Split, Flatten). Where a
    CPU has no VNNI it moves int8 weights that need all 8 bits to uint8, one by one, and refuses a file in which two of
    them share a zero-point.
    """
    _check_pooling(proto.graph)
    _drop_aliases(proto.graph)
    if preset.folds_channel_scales:
        fold_channel_scales(proto)
    if not preset.integer_clip:
        clip_signed_values(proto)
    _store_transposed(proto.graph)
    _own_zero_points(proto.graph)
    if preset.name == 'openvino':
        _keep_rank(proto)
        _give_biases(proto)
        clip_signed_values(proto)
    if preset.bias_apart == 'all':
        _split_bias(proto.graph, ('Conv', 'ConvTranspose', 'Gemm'))
    if preset.bias_apart == 'linear':
        _split_bias(proto.graph, ('Gemm',))
        _quantize_behind_moves(proto)


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


def _keep_rank(proto: Any) -> None:
    """Writes every Gather of one index, and every reduction that drops axes, as one that keeps them and a Squeeze.

    OpenVINO's low-precision transformations (seen with 2026.4) take scales per channel through a Gather and leave them
    the axis that it drops, after which shapes do not fit, or fit by chance. Its CPU plugin fuses scales per channel
    into a reduction, and applies those of tokens ``(N, L, C)`` along ``L``.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    from mmbrecq.deploy.verify.onnx_graph import OnnxGraph

    view, graph = OnnxGraph(proto, 'the exported graph'), proto.graph

    def constant(name: str, value: Any) -> str:
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64).reshape(-1), name))
        return name

    for node, found in zip(list(graph.node), view.nodes, strict=True):
        axes: Any = None
        if found.op == 'Gather':
            index, source = view.constant(found.input(1)), view.producer(found.input(0))
            if index is not None and not index.ndim and (source is None or source.op != 'Shape'):
                axes = found.attributes.get('axis', 0)
                node.input[1] = constant(f'{node.name}/index', index)
        elif found.op.startswith('Reduce') and not found.attributes.get('keepdims', 1):
            axes = found.attributes.get('axes', view.constant(found.input(1)))
            next(a for a in node.attribute if a.name == 'keepdims').i = int(axes is not None)
        if axes is not None:
            names = [f'{node.name}/kept', constant(f'{node.name}/axes', axes)]
            squeeze = helper.make_node('Squeeze', names, list(node.output), name=f'{node.name}/Squeeze')
            node.output[0] = names[0]
            graph.node.insert(list(graph.node).index(node) + 1, squeeze)
    _drop_unread(graph)


def _check_pooling(graph: Any) -> None:
    """Refuses average pooling of which OpenVINO and, in integers, ONNX Runtime count what lies beyond the padding."""
    for node in graph.node:
        counts = {a.name: a.i or any(a.ints) for a in node.attribute if a.name in _COUNTED}
        if node.op_type == 'AveragePool' and len(counts) == len(_COUNTED) and all(counts.values()):
            raise ExportError(
                f'expected average pooling with padding without ceil_mode or count_include_pad, but {node.name} has '
                'both, which runtimes compute differently'
            )


def _give_biases(proto: Any) -> None:
    """Gives every quantized convolution without a bias one of the smallest float, which changes no sum.

    Where several operations read such a convolution, OpenVINO (seen with 2026.4) returns wrong numbers: its scales are
    applied to some of them only. It takes a bias of zeros for none.
    """
    import numpy as np
    from onnx import numpy_helper

    from mmbrecq.deploy.verify.onnx_graph import CONV_OPS, OnnxGraph

    view = OnnxGraph(proto, 'the exported graph')
    makers = {node.output[0]: node for node in proto.graph.node}
    for layer in view.layers():
        node, bias = layer.node, view.constant(layer.node.input(2))
        weight = None if layer.weight_dq is None else view.constant(layer.weight_dq.input(0))
        has_bias = bool(node.input(2)) if bias is None else bias.any()
        if weight is None or node.op not in CONV_OPS or has_bias:
            continue
        shape = weight.shape
        channels = shape[0] if node.op == 'Conv' else shape[1] * node.attributes.get('group', 1)
        name = f'{node.name}/bias'
        proto.graph.initializer.append(
            numpy_helper.from_array(np.full(channels, np.finfo(np.float32).tiny, np.float32), name)
        )
        made = makers[node.outputs[0]]
        made.input[:] = [*made.input[:2], name]
    _drop_unread(proto.graph)


def _drop_aliases(graph: Any) -> None:
    """Lets the readers of a copy read what was copied.

    Torch shares equal initializers by an Identity, and a quantizer that is called twice reads its scale the second time
    through a Cast to the type that it has. A Dropout of no value, which OpenVINO refuses in training mode, is a copy.
    """
    types, outputs = {t.name: t.data_type for t in graph.initializer}, {value.name for value in graph.output}
    zeros = {n.output[0] for n in graph.node if n.op_type == 'Constant' and _is_zero(n.attribute[0])}
    aliases: dict[str, str] = {}
    for node in list(graph.node):
        source = aliases.get(node.input[0], node.input[0]) if node.input else ''
        casts = [a.i for a in node.attribute if node.op_type == 'Cast' and a.name == 'to']
        same = source in types and (node.op_type == 'Identity' or casts == [types[source]])
        if (same or (node.op_type == 'Dropout' and node.input[1] in zeros)) and node.output[0] not in outputs:
            aliases[node.output[0]] = source
            graph.node.remove(node)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = aliases.get(name, name)


def _is_zero(attribute: Any) -> bool:
    from onnx import numpy_helper

    return attribute.name == 'value' and not numpy_helper.to_array(attribute.t).any()


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


def _store_transposed(graph: Any) -> None:
    """Stores integer weights as their layer reads them, not with a Transpose behind their DequantizeLinear."""
    import numpy as np
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    for index, node in enumerate(list(graph.node)):
        source = makers.get(node.input[0]) if node.op_type == 'Transpose' else None
        if source is None or source.op_type != 'DequantizeLinear' or source.input[0] not in constants:
            continue
        integers = numpy_helper.to_array(constants[source.input[0]])
        perms = [list(a.ints) for a in node.attribute if a.name == 'perm']
        perm = perms[0] if perms else list(range(integers.ndim))[::-1]
        axes = [perm.index(a.i % integers.ndim) for a in source.attribute if a.name == 'axis']
        name = f'{source.input[0]}/{"".join(map(str, perm))}'
        if name not in constants:
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(integers.transpose(perm)), name))
            constants[name] = graph.initializer[-1]
        new = helper.make_node(
            'DequantizeLinear', [name, *source.input[1:]], list(node.output), name=f'{node.name}/weight'
        )  # fmt: skip
        new.attribute.extend(helper.make_attribute('axis', axis) for axis in axes)
        graph.node.remove(node)
        graph.node.insert(index, new)
    _drop_unread(graph)


def _quantize_behind_moves(proto: Any) -> None:
    """Quantizes what a layer reads right before it, where other nodes moved it there; it lies on that grid already."""
    from onnx import helper

    from mmbrecq.deploy.verify.onnx_graph import OnnxGraph

    view = OnnxGraph(proto, 'the exported graph')
    makers = {name: node for node in proto.graph.node for name in node.output}
    for tensor in dict.fromkeys(layer.data for layer in view.layers() if layer.weight_dq is not None):
        maker = view.producer(tensor)
        sources = view.quantized_sources(tensor)
        if maker is None or maker.op == 'DequantizeLinear' or not sources:
            continue
        scale = view.scale(sources[0])
        if scale is None or scale.size != 1 or not all(view.same_grid(sources[0], other) for other in sources):
            continue
        grid, values, codes = sources[0].inputs[1:], f'{tensor}/values', f'{tensor}/codes'
        quantizer = view.quantizer(sources[0])
        clip = None if quantizer is None else view.integer_clip(quantizer)
        bounds = [] if clip is None else clip.inputs[1:]
        cut = f'{codes}/cut' if bounds else codes
        new = [('QuantizeLinear', [tensor, *grid], codes), ('DequantizeLinear', [cut, *grid], values)]
        if bounds:
            new.insert(1, ('Clip', [codes, *bounds], cut))
        for reader in [layer.node for layer in view.layers() if layer.data == tensor and layer.weight_dq is not None]:
            makers[reader.outputs[0]].input[0] = values
        index = list(proto.graph.node).index(makers[tensor]) + 1
        for op, inputs, output in reversed(new):
            proto.graph.node.insert(index, helper.make_node(op, inputs, [output], name=f'{tensor}/{op}'))


def _drop_unread(graph: Any) -> None:
    """Removes the initializers that no node reads, and before them the DequantizeLinear nodes."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for node in [n for n in graph.node if n.op_type == 'DequantizeLinear' and n.output[0] not in read]:
        graph.node.remove(node)
    read = {name for node in graph.node for name in node.input}
    for tensor in [t for t in graph.initializer if t.name not in read]:
        graph.initializer.remove(tensor)


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
    _drop_unread(graph)


def _weight(graph: Any, node: Any) -> str:
    """The initializer that holds the weight of ``node``, behind its DequantizeLinear where it has one."""
    makers = {output: n for n in graph.node for output in n.output}
    name = node.input[1]
    return str(makers[name].input[0]) if name in makers else str(name)
