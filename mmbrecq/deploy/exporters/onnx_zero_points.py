"""Activations with a zero-point, written for targets whose integers have none.

``Q(s, z) -> DQ(s, z)`` is ``+ s z -> Q(s, 0) -> DQ(s, 0) -> - s z``, to the same integers. Layers without padding take
the subtraction into their biases, by ``W`` times a constant; what else reads the values has it before itself.
"""

from collections.abc import Collection
from typing import Any

import numpy as np

from mmbrecq.deploy.exporters.onnx_editor import OnnxEditor
from mmbrecq.deploy.verify.onnx_graph import MOVE_OPS, Array, Layer, Node


def fold_zero_points(edit: OnnxEditor) -> None:
    """Gives every quantizer of activations that has one scale the zero-point 0, in place."""
    layers = {layer.node: layer for layer in edit.layers() if layer.weight_dq is not None}
    shifts: dict[Node, Array] = {}
    for found in edit.activation_quantizers():
        scale, zero_point = edit.scale(found), edit.zero_point(found)
        is_int8 = edit.zero_point_range(found) == (-128, 127)
        if scale is None or scale.size != 1 or not zero_point.any() or not is_int8:
            continue
        quantizer, dq = (edit.makers[node.outputs[0]] for node in (found, *edit.dequantizers(found)))
        offset = (scale * zero_point).astype(np.float32)
        shift = edit.store(f'{found.name}/shift', offset)
        zero = edit.store(f'{found.name}/zero_point', np.zeros_like(edit.constants[found.input(2)]))
        quantizer.input[2] = dq.input[2] = zero
        _shift_before(edit, quantizer, shift, int(zero_point), float(scale))
        others, values = [], dq.output[0]
        for reader in edit.consumers(values):
            behind = _layers_behind(reader, edit, layers)
            if behind is None:
                others.append(edit.makers[reader.outputs[0]])
            # a layer may read a concatenation of several values on one grid
            shifts.update(dict.fromkeys(behind or (), offset))
        if others:
            moved = f'{found.name}/values'
            edit.insert(min(map(edit.index, others)), 'Sub', [values, shift], moved, f'{found.name}/Sub')
        for node in others:
            node.input[:] = [moved if tensor == values else tensor for tensor in node.input]
    for node, offset in shifts.items():
        _shift_bias(edit, layers[node], offset)
    edit.drop_unread()


def _shift_before(edit: OnnxEditor, quantizer: Any, shift: str, zero_point: int, scale: float) -> None:
    """Adds the shift before a Q, and before the Clip of real values that cuts its grid."""
    first, clip = quantizer, edit.makers.get(quantizer.input[0])
    if clip is not None and clip.op_type == 'Clip' and len(edit.consumers(clip.output[0])) == 1:
        bounds = edit.clip_bounds(next(node for node in edit.nodes if clip.output[0] in node.outputs))
        codes = [] if bounds is None else [bound / scale for bound in bounds]
        if codes and np.allclose(codes, np.round(codes), atol=1e-3):
            names = [f'{quantizer.name}/low', f'{quantizer.name}/high']
            ends = [np.float32((round(code) + zero_point) * scale) for code in codes]
            clip.input[1:] = [edit.store(name, end) for name, end in zip(names, ends, strict=True)]
            first = clip
    name = f'{quantizer.name}/Add'
    first.input[0] = edit.insert(edit.index(first), 'Add', [first.input[0], shift], name, name)


def _layers_behind(node: Node, edit: OnnxEditor, layers: Collection[Node]) -> list[Node] | None:
    """Returns the layers to which a node moves what it reads; None where it computes something of it."""
    if node in layers or node.op == 'Shape':
        return [node] if node in layers else []
    if node.op not in MOVE_OPS and not (node.op == 'Resize' and node.attributes.get('mode', 'nearest') == 'nearest'):
        return None
    found = [_layers_behind(reader, edit, layers) for tensor in node.outputs for reader in edit.consumers(tensor)]
    leaves = not found or any(tensor in edit.outputs for tensor in node.outputs)
    return None if leaves or None in found else [layer for behind in found for layer in behind or ()]


def _shift_bias(edit: OnnxEditor, layer: Layer, shift: Array) -> None:
    """Takes what a layer makes of a constant from its bias, which a MatMul has in an Add behind it."""
    node, sums = edit.makers[layer.node.outputs[0]], shift * _sums(edit, layer)
    name, place = f'{node.name}/shifted', 2
    if layer.node.op == 'MatMul':
        output, readers = node.output[0], edit.consumers(node.output[0])
        alone = len(readers) == 1 and readers[0].op == 'Add' and output not in edit.outputs
        constants = [i for i, tensor in enumerate(readers[0].inputs) if tensor in edit.constants] if alone else []
        if constants:
            node, place = edit.makers[readers[0].outputs[0]], constants[0]
        else:
            node.output[0] = f'{node.name}/unshifted'
            inputs = [node.output[0], edit.store(name, (-sums).astype(np.float32))]
            edit.insert(edit.index(node) + 1, 'Add', inputs, output, f'{node.name}/Add')
            return
    bias = edit.constants[node.input[place]] if len(node.input) > place and node.input[place] else np.float32(0)
    values = edit.store(name, (bias - sums).astype(np.float32))
    node.input[:] = [*node.input[:place], values, *node.input[place + 1 :]]


def _sums(edit: OnnxEditor, layer: Layer) -> Array:
    """Returns the sum of the weights of every output channel, in the shape of a bias."""
    assert layer.weight_dq is not None
    codes, scale = edit.constants[layer.weight_dq.input(0)], edit.constants[layer.weight_dq.input(1)]
    axis = layer.weight_dq.attributes.get('axis', 1)
    along = scale.reshape([-1 if a == axis % codes.ndim else 1 for a in range(codes.ndim)]) if scale.size > 1 else scale
    weight, node = codes.astype(np.float64) * along, layer.node
    if node.op == 'MatMul':
        return weight.sum(-2) if layer.weight == node.input(1) else weight.sum(-1, keepdims=True)
    if node.op == 'Gemm':
        return weight.sum(1 if node.attributes.get('transB', 0) else 0)
    return weight.reshape(len(weight), -1).sum(1)
