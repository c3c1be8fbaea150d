"""C1 to C5: how quantization is written down in every Q/DQ ONNX file, whatever runs it.

Source: the ONNX operator specification of QuantizeLinear and DequantizeLinear, and their version history.
"""

import numpy as np

from mmbrecq.deploy.verify.onnx_graph import QUANTIZATION_OPS, STANDARD_DOMAINS, Array, Faults, Layer, Node, OnnxGraph


def check_scales(graph: OnnxGraph) -> Faults:
    """C1: scales are constant, finite and positive."""
    for node in graph.of_type(*QUANTIZATION_OPS):
        scale = graph.scale(node)
        if scale is None:
            yield node.name, f'expected a constant scale, but {node.input(1)!r} is computed'
        elif not (np.isfinite(scale).all() and (scale > 0).all()):
            worst = scale[~(np.isfinite(scale) & (scale > 0))].flat[0]
            yield node.name, f'expected finite scales > 0, but got {worst:g}'


def check_zero_points(graph: OnnxGraph) -> Faults:
    """C2: a constant zero-point of the scale's shape is given."""
    for node in graph.of_type(*QUANTIZATION_OPS):
        scale, zero_point = graph.constant(node.input(1)), graph.constant(node.input(2))
        if not node.input(2):
            yield node.name, 'expected a zero-point, but it is left out'
        elif zero_point is None:
            yield node.name, f'expected a constant zero-point, but {node.input(2)!r} is computed'
        elif scale is not None and zero_point.shape != scale.shape:
            shapes = f'{scale.shape} of the scale, but got {zero_point.shape}'
            yield node.name, f'expected a zero-point of the shape {shapes}'


def check_axes(graph: OnnxGraph) -> Faults:
    """C3: per-channel axis explicit, its length the scale's, the axis of a weight its output channels."""
    for node in graph.of_type(*QUANTIZATION_OPS):
        scale = graph.constant(node.input(1))
        if scale is not None and (message := _axis_fault(node, scale, graph.constant(node.input(0)))):
            yield node.name, message
    for layer in graph.layers():
        dq = layer.weight_dq
        scale = None if dq is None else graph.constant(dq.input(1))
        if dq is None or scale is None or scale.ndim != 1 or 'axis' not in dq.attributes:
            continue
        ndim, axis = _weight_ndim(graph, dq), dq.attributes['axis']
        axes = None if ndim is None else _channel_axes(graph, layer, dq, ndim)
        if ndim is not None and axes is not None and axis % ndim not in axes:
            message = f'expected the output channels (axis {axes[0]}) of {layer.node.op} {layer.node.name!r}'
            yield dq.name, f'{message}, but got axis {axis}'


def _axis_fault(node: Node, scale: Array, data: Array | None) -> str | None:
    axis = node.attributes.get('axis')
    if scale.ndim == 0 or (scale.size == 1 and axis is None):
        return None
    if scale.ndim > 1:
        return f'expected one scale per tensor or per channel, but got scales of shape {scale.shape}'
    if axis is None:
        return f'expected an explicit axis for {scale.size} scales, but it is left out'
    if data is None:
        return None
    if not -data.ndim <= axis < data.ndim:
        return f'expected an axis of a tensor of shape {data.shape}, but got {axis}'
    if data.shape[axis] != scale.size:
        return f'expected {data.shape[axis]} scales along axis {axis}, but got {scale.size}'
    return None


def _channel_axes(graph: OnnxGraph, layer: Layer, dq: Node, ndim: int) -> list[int] | None:
    """Axes of the DQ's output that hold output channels; None where a reshape hides them."""
    node = layer.node
    if node.op == 'Conv':
        axes = [0]
    elif node.op == 'ConvTranspose':
        # Weight (C_in, C_out / groups, ..): groups lie along axis 0.
        axes = [1] if node.attributes.get('group', 1) == 1 else [1, 0]
    elif node.op == 'Gemm':
        axes = [0] if node.attributes.get('transB', 0) else [1]
    else:
        axes = [-1] if layer.weight == node.input(1) else [-2]
    tensor = layer.weight
    while (maker := graph.producer(tensor)) is not None and maker is not dq:
        if maker.op == 'Transpose':
            perm = maker.attributes.get('perm', list(range(ndim))[::-1])
            axes = [perm[axis] for axis in axes]
        elif maker.op != 'Identity':
            return None
        tensor = maker.input(0)
    return [axis % ndim for axis in axes]


def _weight_ndim(graph: OnnxGraph, dq: Node) -> int | None:
    data, maker = graph.constant(dq.input(0)), graph.producer(dq.input(0))
    if data is None and maker is not None and maker.op == 'QuantizeLinear':
        data = graph.constant(maker.input(0))
    return None if data is None else data.ndim


def check_opset(graph: OnnxGraph) -> Faults:
    """C4: the opset knows the types and attributes that Q, DQ and a Clip between them use."""
    from onnx import defs

    clips = [graph.integer_clip(node) for node in graph.activation_quantizers()]
    quantization = [node for node in graph.nodes if node.op in QUANTIZATION_OPS]
    for node in [*quantization, *(clip for clip in clips if clip is not None)]:
        if node.domain not in STANDARD_DOMAINS or not defs.has(node.op, graph.opset):
            yield node.name, f'expected an ONNX operator of opset {graph.opset}, but got {node.op} of {node.domain!r}'
            continue
        schema = defs.get_schema(node.op, graph.opset)
        of_opset = f'of {node.op} in opset {graph.opset}'
        for accepted, value in zip(schema.inputs, map(graph.constant, node.inputs), strict=False):
            if value is not None and f'tensor({_onnx_type(value)})' not in accepted.types:
                yield node.name, f'expected a type {of_opset}, but got {value.dtype.name}'
        for name in sorted(set(node.attributes) - set(schema.attributes)):
            yield node.name, f'expected an attribute {of_opset}, but got {name!r}'


def _onnx_type(value: Array) -> str:
    from onnx import TensorProto, helper

    return str(TensorProto.DataType.Name(helper.np_dtype_to_tensor_dtype(value.dtype))).lower()


def check_pairs(graph: OnnxGraph) -> Faults:
    """C5: every Q feeds one DQ of the same grid, none is right behind another pair, every quantized layer is there."""
    for node in graph.of_type('QuantizeLinear'):
        yield from _pair_faults(graph, node)
    for node in graph.of_type('DequantizeLinear'):
        if graph.constant(node.input(0)) is None and graph.quantizer(node) is None:
            before = title(graph.producer(node.input(0)))
            yield node.name, f'expected a QuantizeLinear or a constant before it, but got {before}'
    if graph.expected is not None:
        found = sum(layer.weight_dq is not None for layer in graph.layers())
        if found != graph.expected.layers:
            layers = f'{graph.expected.layers} quantized convolution and linear layers'
            yield graph.name, f'expected {layers}, but got {found}'


def _pair_faults(graph: OnnxGraph, node: Node) -> Faults:
    clip, readers = graph.integer_clip(node), graph.dequantizers(node)
    leaves = any(maker.outputs[0] in graph.outputs for maker in (node, clip) if maker is not None)
    if len(readers) != 1 or readers[0].op != 'DequantizeLinear' or leaves:
        found = ', '.join([*map(title, readers), *['a graph output'] * leaves]) or 'nothing'
        yield node.name, f'expected one DequantizeLinear to read it, but got {found}'
    elif _known(graph, node, readers[0]) and not graph.same_grid(node, readers[0]):
        yield node.name, f'expected the scale and zero-point of {readers[0].name!r}, but they differ'
    earlier = graph.producer((graph.grid_clip(node) or node).input(0))
    while earlier is not None and earlier.op == 'Identity':
        earlier = graph.producer(earlier.input(0))
    if earlier is not None and earlier.op == 'DequantizeLinear':
        yield node.name, f'expected one quantization, but {earlier.name!r} is right before it'


def _known(graph: OnnxGraph, first: Node, second: Node) -> bool:
    """Returns whether scales can be compared: C1 reports those that are computed, and NaN differs from itself."""
    a, b = graph.scale(first), graph.scale(second)
    return a is not None and not any(np.isnan(scale).any() for scale in (a, b) if scale is not None)


def title(node: Node | None) -> str:
    """How messages speak of a node; None is a graph input."""
    return 'a graph input' if node is None else f'{node.op} {node.name!r}'


def check_concat_grids(graph: OnnxGraph) -> Faults:
    """V7 and T6: the quantized inputs of a Concat have one grid: OpenVINO takes them to one, whatever the file says."""
    for concat in graph.of_type('Concat'):
        sources = [dq for tensor in concat.inputs for dq in graph.quantized_sources(tensor) or []]
        scales = {dq: scale for dq in sources if (scale := graph.scale(dq)) is not None and np.isfinite(scale).all()}
        if not all(graph.same_grid(dq, next(iter(scales))) for dq in scales):
            values = ', '.join(f'{np.ravel(scale)[0]:g}' for scale in scales.values())
            yield concat.name, f'expected one grid on all quantized inputs, but got scales {values}'
