"""Writes a convolution over the four phases of a value as one over the value itself.

YOLOX's stem takes every second row and column, from the first or the second on, and puts these four phases beside each
other as channels. A convolution over them is one of twice the kernel with stride 2, to the same products. OpenVINO's
slices (seen with 2026.4) take as long as a good part of such a network.
"""

import numpy as np

from mmbrecq.deploy.exporters.onnx_editor import OnnxEditor
from mmbrecq.deploy.verify.onnx_graph import Array, Layer

Phases = list[tuple[int, int]]
"""First row and first column of every phase."""

_PLAIN = {'strides': [1, 1], 'dilations': [1, 1], 'group': 1, 'auto_pad': 'NOTSET'}


def join_phases(edit: OnnxEditor) -> None:
    """Rewrites every quantized convolution that alone reads such a concatenation, in place."""
    for layer in edit.layers():
        node, codes = layer.node, None if layer.weight_dq is None else edit.constant(layer.weight_dq.input(0))
        source, phases = _phases(edit, layer)
        if codes is None or codes.ndim != 4 or sorted(phases) != [(0, 0), (0, 1), (1, 0), (1, 1)]:
            continue
        conv, dq = edit.makers[node.outputs[0]], edit.makers[layer.weight]
        dq.input[0] = edit.store(f'{dq.input[0]}/phases', _interleaved(codes, phases))
        twice = {'kernel_shape': list(codes.shape[2:]), 'strides': [1, 1], 'pads': node.attributes.get('pads', [0] * 4)}
        attributes = {**node.attributes, **{name: [2 * n for n in values] for name, values in twice.items()}}
        edit.insert(edit.index(conv), 'Conv', [source, *conv.input[1:]], conv.output[0], conv.name, **attributes)
        edit.proto.node.remove(conv)
        edit.drop_unread('Concat', 'Slice', 'Unsqueeze')


def _phases(edit: OnnxEditor, layer: Layer) -> tuple[str, Phases]:
    """Returns the value whose phases a convolution reads, and them; none where it reads anything else."""
    node, concat = layer.node, edit.producer(layer.data)
    plain = all(node.attributes.get(key, value) == value for key, value in _PLAIN.items())
    alone = all(edit.consumers(tensor) == [node] for tensor in (layer.data, layer.weight))
    if node.op != 'Conv' or not plain or not alone or concat is None or concat.op != 'Concat':
        return '', []
    found = [_phase(edit, tensor) for tensor in concat.inputs if concat.attributes['axis'] == 1]
    sources = {source for source, _ in found}
    return (sources.pop(), [phase for _, phase in found]) if len(sources) == 1 else ('', [])


def _phase(edit: OnnxEditor, tensor: str) -> tuple[str, tuple[int, int]]:
    """Returns the value of which ``tensor`` has every second row and column, and the first of each; else -1."""
    firsts: dict[int, int] = {}
    while (node := edit.producer(tensor)) is not None and node.op == 'Slice':
        starts, ends, axes, steps = (_integers(edit, node.input(index)) for index in range(1, 5))
        one = len(starts) == len(ends) == len(axes) == 1 and steps == [2]
        if not one or starts[0] not in (0, 1) or axes[0] in firsts or ends[0] < 2**31 - 1:
            break
        firsts[axes[0]], tensor = starts[0], node.inputs[0]
    return tensor, (firsts.pop(2, -1), firsts.pop(3, -1)) if len(firsts) == 2 else (-1, -1)


def _integers(edit: OnnxEditor, tensor: str) -> list[int]:
    """Returns the integers of a constant, unsqueezed or not; none of what is computed."""
    node = edit.producer(tensor)
    value = edit.constant(node.input(0) if node is not None and node.op == 'Unsqueeze' else tensor)
    integers: list[int] = [] if value is None else value.reshape(-1).tolist()
    return integers


def _interleaved(codes: Array, phases: Phases) -> Array:
    """Returns weights ``(O, C, 2 kH, 2 kW)`` of those over the phases, ``(O, 4 C, kH, kW)``."""
    outputs, channels, height, width = codes.shape
    parts = codes.reshape(outputs, 4, channels // 4, height, width)
    joined = np.zeros((outputs, channels // 4, 2 * height, 2 * width), codes.dtype)
    for index, (row, column) in enumerate(phases):
        joined[:, :, row::2, column::2] = parts[:, index]
    return joined
