"""Rewrites of an exported ONNX graph into the forms that a runtime computes in integers."""

from typing import Any

import numpy as np

from mmbrecq.deploy.exporters.onnx_channels import fold_channel_scales
from mmbrecq.deploy.exporters.onnx_editor import OnnxEditor
from mmbrecq.deploy.exporters.onnx_phases import join_phases
from mmbrecq.deploy.exporters.onnx_zero_points import fold_zero_points
from mmbrecq.deploy.verify.onnx_graph import CONV_OPS, Node
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
    _drop_aliases(OnnxEditor(proto))
    if preset.folds_channel_scales:
        fold_channel_scales(OnnxEditor(proto))
    if not preset.integer_clip:
        clip_signed_values(proto)
    _store_transposed(OnnxEditor(proto))
    if preset.folds_zero_points:
        fold_zero_points(OnnxEditor(proto))
    _own_zero_points(OnnxEditor(proto))
    if preset.name == 'openvino':
        join_phases(OnnxEditor(proto))
        _keep_rank(OnnxEditor(proto))
        _give_biases(OnnxEditor(proto))
        clip_signed_values(proto)
        _quantize_behind_moves(OnnxEditor(proto), of_constants=True)
        _fold_constant_grids(OnnxEditor(proto))
    if preset.bias_apart == 'all':
        _split_bias(OnnxEditor(proto), 'Conv', 'ConvTranspose', 'Gemm')
    if preset.bias_apart == 'linear':
        _split_bias(OnnxEditor(proto), 'Gemm')
        _quantize_behind_moves(OnnxEditor(proto))


def clip_signed_values(proto: Any) -> None:
    """Moves every Clip of int8 integers in front of its QuantizeLinear, as a Clip of real values; both cut alike.

    OpenVINO's CPU plugin (seen with 2026.4) returns wrong numbers for a convolution that reads clipped int8 integers;
    clipped uint8 ones it computes right. A grid per channel keeps its Clip: a Clip of real values has two scalars.
    """
    edit = OnnxEditor(proto)
    for found in edit.activation_quantizers():
        clip, scale = edit.integer_clip(found), edit.scale(found)
        bounds = None if clip is None else edit.clip_bounds(clip)
        signed = edit.zero_point_range(found) == (-128, 127)
        if clip is None or bounds is None or scale is None or scale.size != 1 or not signed:
            continue
        quantizer, old = edit.makers[found.outputs[0]], edit.makers[clip.outputs[0]]
        reals = [np.float32((bound - int(edit.zero_point(found).flat[0])) * float(scale.flat[0])) for bound in bounds]
        ends = [edit.store(f'{old.name}/{end}', real) for end, real in zip(('low', 'high'), reals, strict=True)]
        for reader in edit.dequantizers(found):
            edit.makers[reader.outputs[0]].input[0] = quantizer.output[0]
        edit.proto.node.remove(old)
        inputs = [quantizer.input[0], *ends]
        quantizer.input[0] = edit.insert(edit.index(quantizer), 'Clip', inputs, f'{old.name}/values', old.name)
    edit.drop_unread()


def _keep_rank(edit: OnnxEditor) -> None:
    """Writes every Gather of one index, and every reduction that drops axes, as one that keeps them and a Squeeze.

    OpenVINO's low-precision transformations (seen with 2026.4) take scales per channel through a Gather and leave them
    the axis that it drops, after which shapes do not fit, or fit by chance. Its CPU plugin fuses scales per channel
    into a reduction, and applies those of tokens ``(N, L, C)`` along ``L``.
    """
    for found in edit.nodes:
        node, axes = edit.makers[found.outputs[0]], None
        if found.op == 'Gather':
            index, source = edit.constant(found.input(1)), edit.producer(found.input(0))
            if index is not None and not index.ndim and (source is None or source.op != 'Shape'):
                axes = found.attributes.get('axis', 0)
                node.input[1] = edit.store(f'{node.name}/index', _list_of(index))
        elif found.op.startswith('Reduce') and not found.attributes.get('keepdims', 1):
            axes = found.attributes.get('axes', edit.constant(found.input(1)))
            next(a for a in node.attribute if a.name == 'keepdims').i = int(axes is not None)
        if axes is not None:
            node.output[0] = f'{node.name}/kept'
            inputs = [node.output[0], edit.store(f'{node.name}/axes', _list_of(axes))]
            edit.insert(edit.index(node) + 1, 'Squeeze', inputs, found.outputs[0], f'{node.name}/Squeeze')
    edit.drop_unread()


def _list_of(integers: Any) -> Any:
    return np.array(integers, np.int64).reshape(-1)


def _check_pooling(graph: Any) -> None:
    """Refuses average pooling of which OpenVINO and, in integers, ONNX Runtime count what lies beyond the padding."""
    for node in graph.node:
        counts = {a.name: a.i or any(a.ints) for a in node.attribute if a.name in _COUNTED}
        if node.op_type == 'AveragePool' and len(counts) == len(_COUNTED) and all(counts.values()):
            raise ExportError(
                f'expected average pooling with padding without ceil_mode or count_include_pad, but {node.name} has '
                'both, which runtimes compute differently'
            )


def _give_biases(edit: OnnxEditor) -> None:
    """Gives every quantized convolution without a bias one of the smallest float, which changes no sum.

    Where several operations read such a convolution, OpenVINO (seen with 2026.4) returns wrong numbers: its scales are
    applied to some of them only. It takes a bias of zeros for none.
    """
    for layer in edit.layers():
        node, bias = layer.node, edit.constant(layer.node.input(2))
        weight = None if layer.weight_dq is None else edit.constant(layer.weight_dq.input(0))
        has_bias = bool(node.input(2)) if bias is None else bias.any()
        if weight is None or node.op not in CONV_OPS or has_bias:
            continue
        channels = len(weight) if node.op == 'Conv' else weight.shape[1] * node.attributes.get('group', 1)
        name = edit.store(f'{node.name}/bias', np.full(channels, np.finfo(np.float32).tiny, np.float32))
        edit.makers[node.outputs[0]].input[:] = [*node.inputs[:2], name]
    edit.drop_unread()


def _drop_aliases(edit: OnnxEditor) -> None:
    """Lets the readers of a copy read what was copied.

    Torch shares equal initializers by an Identity, and a quantizer that is called twice reads its scale the second time
    through a Cast to the type that it has. A Dropout of no value, which OpenVINO refuses in training mode, is a copy.
    """
    types = {tensor.name: tensor.data_type for tensor in edit.proto.initializer}
    aliases: dict[str, str] = {}
    for node in edit.nodes:
        source = aliases.get(node.input(0), node.input(0))
        cast = node.op == 'Cast' and node.attributes['to'] == types.get(source)
        ratio = edit.constant(node.input(1)) if node.op == 'Dropout' else None
        same = source in types and (node.op == 'Identity' or cast)
        if (same or (ratio is not None and not ratio.any())) and node.outputs[0] not in edit.outputs:
            aliases[node.outputs[0]] = source
            edit.proto.node.remove(edit.makers[node.outputs[0]])
    for proto in edit.proto.node:
        for index, name in enumerate(proto.input):
            proto.input[index] = aliases.get(name, name)


def _own_zero_points(edit: OnnxEditor) -> None:
    """Gives a weight a zero-point of its own where it shares one with another weight or an activation."""
    weights = {dq for dq in edit.of_type('DequantizeLinear') if edit.constant(dq.input(0)) is not None}
    owners = {name: '' for node in edit.nodes if node not in weights for name in node.inputs}
    for dq in (node for node in edit.nodes if node in weights):
        weight, zero_point = dq.input(0), dq.input(2)
        if owners.setdefault(zero_point, weight) != weight:
            name = edit.makers[dq.outputs[0]].input[2] = f'{weight}/zero_point'
            if name not in edit.constants:
                edit.store(name, edit.constants[zero_point])


def _store_transposed(edit: OnnxEditor) -> None:
    """Stores integer weights as their layer reads them, not with a Transpose behind their DequantizeLinear."""
    for found in edit.of_type('Transpose'):
        source = edit.producer(found.input(0))
        integers = edit.constant(source.input(0)) if source is not None and source.op == 'DequantizeLinear' else None
        if source is None or integers is None:
            continue
        perm = found.attributes.get('perm', list(range(integers.ndim))[::-1])
        name = f'{source.input(0)}/{"".join(map(str, perm))}'
        if name not in edit.constants:
            edit.store(name, np.ascontiguousarray(integers.transpose(perm)))
        axis = {key: perm.index(value % integers.ndim) for key, value in source.attributes.items() if key == 'axis'}
        old, inputs = edit.makers[found.outputs[0]], [name, *source.inputs[1:]]
        edit.insert(edit.index(old), 'DequantizeLinear', inputs, found.outputs[0], f'{old.name}/weight', **axis)
        edit.proto.node.remove(old)
    edit.drop_unread()


def _fold_constant_grids(edit: OnnxEditor) -> None:
    """Stores every constant that is brought to a grid, such as learned queries, as the values that this gives.

    OpenVINO's low-precision transformations (seen with 2026.4) take a constant on a grid for a weight, and compute
    wrong numbers from the parts into which it is split.
    """
    for found in edit.of_type('DequantizeLinear'):
        quantizer = edit.quantizer(found)
        values = None if quantizer is None else edit.constant(quantizer.input(0))
        scale, bounds = edit.scale(found), edit.zero_point_range(found)
        if quantizer is None or values is None or scale is None or scale.size != 1 or bounds is None:
            continue
        zero_point = int(edit.zero_point(found).flat[0])
        codes = np.clip(np.rint(values / scale) + zero_point, *bounds)
        old = edit.makers[found.outputs[0]]
        name = edit.store(f'{old.name}/values', ((codes - zero_point) * scale).astype(np.float32))
        for node in edit.proto.node:
            node.input[:] = [name if tensor == found.outputs[0] else tensor for tensor in node.input]
        edit.proto.node.remove(old)
        edit.proto.node.remove(edit.makers[quantizer.outputs[0]])
    edit.drop_unread()


def _quantize_behind_moves(edit: OnnxEditor, of_constants: bool = False) -> None:
    """Quantizes what a layer reads right before it, where other nodes moved it there; it lies on that grid already."""
    readers: dict[str, list[Node]] = {}
    for layer in edit.layers():
        if layer.weight_dq is not None:
            readers.setdefault(layer.data, []).append(layer.node)
    for tensor, nodes in readers.items():
        maker, sources = edit.producer(tensor), edit.quantized_sources(tensor)
        if maker is None or maker.op == 'DequantizeLinear' or not sources:
            continue
        scale = edit.scale(sources[0])
        if scale is None or scale.size != 1 or not all(edit.same_grid(sources[0], other) for other in sources):
            continue
        quantizer, *others = map(edit.quantizer, sources)
        if of_constants and all(q is None or edit.constant(q.input(0)) is None for q in (quantizer, *others)):
            continue
        clip = None if quantizer is None else edit.integer_clip(quantizer)
        grid, codes = sources[0].inputs[1:], f'{tensor}/codes'
        new = [('QuantizeLinear', [tensor, *grid], codes)]
        if clip is not None and clip.inputs[1:]:
            new.append(('Clip', [codes, *clip.inputs[1:]], f'{codes}/cut'))
        new.append(('DequantizeLinear', [new[-1][2], *grid], f'{tensor}/values'))
        for index, (op, inputs, output) in enumerate(new, edit.index(edit.makers[tensor]) + 1):
            edit.insert(index, op, inputs, output, f'{tensor}/{op}')
        for node in nodes:
            reader = edit.makers[node.outputs[0]]
            reader.input[:] = [f'{tensor}/values' if name == tensor else name for name in reader.input]


def _split_bias(edit: OnnxEditor, *ops: str) -> None:
    """Adds the bias of every node of these types by an Add behind it."""
    for found in edit.of_type(*ops):
        bias, dq = edit.constant(found.input(2)), edit.producer(found.input(1))
        if bias is None:
            continue
        if found.op != 'Gemm':
            weight = edit.constants[found.input(1) if dq is None else dq.input(0)]
            bias = bias.reshape(-1, *[1] * (weight.ndim - 2))
        node, name = edit.makers[found.outputs[0]], found.name
        del node.input[2:]
        node.output[0] = f'{name}/product'
        inputs = [node.output[0], edit.store(f'{name}/apart', np.ascontiguousarray(bias))]
        edit.insert(edit.index(node) + 1, 'Add', inputs, found.outputs[0], f'{name}/bias')
    edit.drop_unread()
