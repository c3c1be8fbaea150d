"""Activations with one scale per channel, written for targets that compute with one scale per tensor.

``Q(s) -> DQ(s)`` is ``/ s -> Q(1) -> DQ(1) -> * s``, to the same integers. A convolution in front takes the division
into the scales of its weight and its bias, depthwise convolutions behind take the product into those of their weights.
"""

from typing import Any

import numpy as np

from mmbrecq.deploy.exporters.onnx_editor import OnnxEditor
from mmbrecq.deploy.verify.onnx_graph import Array, Node, OnnxGraph
from mmbrecq.deploy.verify.onnx_openvino import CHANNEL_OPS


def fold_channel_scales(edit: OnnxEditor) -> None:
    """Gives every quantizer of activations that has a scale per channel, and one zero-point, the scale 1, in place."""
    constants, makers = edit.constants, edit.makers

    def put(op: str, inputs: list[str], name: str, readers: list[Any], **attributes: Any) -> str:
        """Writes ``op`` of a tensor before the nodes that shall read it."""
        return edit.insert(min(map(edit.index, readers)), op, inputs, name, name, **attributes)

    def scale_weight(node: Any, factors: Array, name: str) -> None:
        """Multiplies the scales of a weight; another layer that shares its integers keeps its own."""
        dq = makers.get(node.input[1])
        codes, *grid = [node.input[1]] if dq is None else dq.input
        weight = constants[codes]
        factors = np.repeat(factors, len(weight) // len(factors))
        if dq is None:
            factors = factors.reshape(-1, *[1] * (weight.ndim - 1))
            node.input[1] = edit.store(f'{name}/weight', (weight * factors).astype(weight.dtype))
            return
        scales = (constants[grid[0]] * factors).astype(np.float32)
        zeros = np.zeros(scales.shape, constants[grid[1]].dtype)
        inputs = [codes, edit.store(f'{name}/scales', scales), edit.store(f'{name}/zero_points', zeros)]
        node.input[1] = put('DequantizeLinear', inputs, f'{name}/weight', [node], axis=0)

    for found in edit.activation_quantizers():
        scale, zero_point = edit.scale(found), edit.constant(found.input(2))
        if scale is None or zero_point is None or not scale.ndim:
            continue
        quantizer, dq = (makers[node.outputs[0]] for node in (found, *edit.dequantizers(found)))
        name, writer, layers = found.name, _writer(edit, found), _readers(edit, dq.output[0], scale.size)
        rank = len((writer or layers[0]).attributes['kernel_shape'])
        divisor = edit.store(f'{name}/scales', scale.astype(np.float32).reshape(-1, *[1] * rank))
        if writer is None:
            quantizer.input[0] = put('Div', [quantizer.input[0], divisor], f'{name}/Div', [quantizer])
        else:
            node = makers[writer.outputs[0]]
            scale_weight(node, 1 / scale, f'{node.name}/output')
            if writer.input(2):
                bias = (constants[node.input[2]] / scale).astype(np.float32)
                node.input[2] = edit.store(f'{node.name}/output/bias', bias)
        for layer in layers:
            scale_weight(makers[layer.outputs[0]], scale, f'{layer.name}/input')
        if not layers:
            readers = [node for node in edit.proto.node if dq.output[0] in node.input]
            put('Mul', [dq.output[0], divisor], f'{name}/Mul', readers)
            for node in readers:
                node.input[:] = [f'{name}/Mul' if tensor == dq.output[0] else tensor for tensor in node.input]
        grid = [edit.store(f'{name}/scale', np.float32(1)), edit.store(f'{name}/zero_point', zero_point[0])]
        for node in (quantizer, dq):
            node.input[1:] = grid
            node.attribute.remove(next(a for a in node.attribute if a.name == 'axis'))


def _writer(view: OnnxGraph, quantizer: Node) -> Node | None:
    """The convolution whose output nothing but ``quantizer`` reads."""
    values = quantizer.input(0)
    node = view.producer(values)
    alone = view.consumers(values) == [quantizer] and values not in view.outputs
    return node if alone and node is not None and node.op == 'Conv' else None


def _readers(view: OnnxGraph, values: str, channels: int) -> list[Node]:
    """The depthwise convolutions that read a tensor, where nothing else does; else none."""
    layers, readers = [], list(view.consumers(values))
    for reader in readers:
        if reader.op in CHANNEL_OPS:
            readers += view.consumers(reader.outputs[0])
        elif reader.op == 'Conv' and reader.attributes.get('group', 1) == channels:
            layers.append(reader)
        elif reader.op != 'Shape':
            return []
    return layers
