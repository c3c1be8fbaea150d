"""An ONNX graph of one layer alone, to be timed in a runtime."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmbrecq.mixed_precision.costs.layers import Call, LayerShape

OPSET = 17
COPIES = 16
"""So many times a graph has the layer: what a call of the runtime costs by itself is shared by them."""
COPIED_BYTES = 64e6
"""A layer whose copies would take more weights and outputs than these has fewer."""

ACTIVATION_SCALE, WEIGHT_SCALE, OUTPUT_SCALE = 0.02, 0.01, 0.05


def copies_of(layer: LayerShape, call: Call) -> int:
    """How often the graph of :func:`layer_graph` has the layer."""
    own = 4 * (layer.weights + prod(call.outputs) * call.times)
    return int(max(1, min(COPIES, COPIED_BYTES // own)))


def layer_graph(layer: LayerShape, call: Call, integer: bool) -> Any:
    """Copies of the layer, each with weights of its own, all of them reading one input.

    Args:
        layer: A convolution, transposed convolution or linear layer.
        call: Its input ``(...)`` without the batch axis; the batch is ``call.times``.
        integer: Input, weights and outputs of 8 bits by QuantizeLinear and DequantizeLinear, with outputs that stay
            integers, as they do between two layers of a network; else all is float.

    Returns:
        An ``onnx.ModelProto`` with the float input ``input``.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    nodes, constants, outputs = [], [], []
    generator = np.random.default_rng(0)
    shape = [call.times, *call.inputs]
    op, attributes, axis = _operator(layer, len(shape))

    def constant(name: str, values: NDArray[Any] | np.generic) -> str:
        constants.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def add(op_type: str, inputs: list[str], output: str, **options: Any) -> str:
        nodes.append(helper.make_node(op_type, inputs, [output], name=output, **options))
        return output

    source = 'input'
    if integer:
        grid = [constant('scale', np.float32(ACTIVATION_SCALE)), constant('zero', np.uint8(128))]
        source = add('DequantizeLinear', [add('QuantizeLinear', ['input', *grid], 'codes'), *grid], 'values')
        output_grid = [constant('output_scale', np.float32(OUTPUT_SCALE)), constant('output_zero', np.uint8(128))]
    weight_shape = layer.weight if op != 'MatMul' else layer.weight[::-1]
    for i in range(copies_of(layer, call)):
        if integer:
            codes = generator.integers(-64, 64, weight_shape).astype(np.int8)
            scales = np.full(weight_shape[axis], WEIGHT_SCALE, np.float32)
            weight_grid = [constant(f'scale{i}', scales), constant(f'zero{i}', np.zeros(len(scales), np.int8))]
            weight = add('DequantizeLinear', [constant(f'codes{i}', codes), *weight_grid], f'weight{i}', axis=axis)
        else:
            weight = constant(f'weight{i}', generator.normal(0, 0.3, weight_shape).astype(np.float32))
        result = add(op, [source, weight], f'layer{i}', **attributes)
        if integer:
            result = add('QuantizeLinear', [result, *output_grid], f'output{i}')
        kind = TensorProto.UINT8 if integer else TensorProto.FLOAT
        outputs.append(helper.make_tensor_value_info(result, kind, [call.times, *call.outputs]))
    graph = helper.make_graph(
        nodes, 'layer', [helper.make_tensor_value_info('input', TensorProto.FLOAT, shape)], outputs, constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=8)
    checker.check_model(model)
    return model


def _operator(layer: LayerShape, rank: int) -> tuple[str, dict[str, Any], int]:
    """ONNX operator of a layer, its attributes, and the axis of its weight's output channels."""
    options = dict(layer.options)
    if 'Linear' in layer.kind:
        return ('Gemm', {'transB': 1}, 0) if rank == 2 else ('MatMul', {}, 1)
    spatial = len(layer.weight) - 2
    strides, dilations = (_per_axis(options.get(name, 1), spatial) for name in ('stride', 'dilation'))
    attributes = {'strides': strides, 'dilations': dilations, 'group': options.get('groups', 1)}
    if options.get('padding') == 'same':
        attributes['auto_pad'] = 'SAME_LOWER'
    elif options.get('padding') != 'valid':
        padding = _per_axis(options.get('padding', 0), spatial)
        attributes['pads'] = [*padding, *padding]
    transposed = 'Transpose' in layer.kind
    return ('ConvTranspose' if transposed else 'Conv'), attributes, int(transposed)


def _per_axis(value: Any, axes: int) -> list[int]:
    return list(value) if isinstance(value, (tuple, list)) else [value] * axes
