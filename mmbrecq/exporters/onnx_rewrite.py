"""Rewrites of an exported ONNX graph into the forms that a runtime computes in integers."""

from __future__ import annotations

from typing import Any

from mmbrecq.presets import Preset


def rewrite_for(proto: Any, preset: Preset) -> None:
    """Changes ``proto`` in place; the function it computes stays the same.

    ONNX Runtime computes a linear layer with a float result in integers only where the bias is added apart, and does
    not look through Flatten, which is a Reshape when it keeps the batch axis.
    """
    if preset.bias_apart:
        _flatten_to_reshape(proto.graph)
        _split_bias(proto.graph)


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


def _split_bias(graph: Any) -> None:
    from onnx import helper

    for node in list(graph.node):
        if node.op_type != 'Gemm' or len(node.input) < 3 or not node.input[2]:
            continue
        index = list(graph.node).index(node)
        bias, output = node.input[2], node.output[0]
        product = f'{node.name}/product'
        del node.input[2:]
        node.output[0] = product
        graph.node.insert(index + 1, helper.make_node('Add', [product, bias], [output], name=f'{node.name}/bias'))
