"""C6 to C9: the numbers in a Q/DQ ONNX file: weights and clip bounds on their grids, biases in float32 and in range.

Source: the ONNX operator specification of QuantizeLinear, DequantizeLinear and Clip.
"""

import numpy as np

from mmbrecq.deploy.verify.onnx_graph import Array, Faults, Node, OnnxGraph, integer_range
from mmbrecq.deploy.verify.onnx_structure import title

# A float weight counts as on its grid within this part of a step.
GRID_TOLERANCE = 1e-3
# Bounds are computed in float32 by whoever wrote the file; a few roundings of it are no fault.
TOLERANCE = 8 * float(np.finfo(np.float32).eps)


def check_weights(graph: OnnxGraph) -> Faults:
    """C6: weights lie on their grid, integers or floats that quantization leaves as they are, of the bits expected."""
    for dq in dict.fromkeys(layer.weight_dq for layer in graph.layers() if layer.weight_dq is not None):
        if (fault := _weight_fault(graph, dq)) is not None:
            yield dq.name, fault


def _weight_fault(graph: OnnxGraph, dq: Node) -> str | None:
    integers, container = graph.constant(dq.input(0)), graph.zero_point_range(dq)
    if integers is None:
        quantizer = graph.producer(dq.input(0))
        weight = None if quantizer is None else graph.constant(quantizer.input(0))
        scale = None if quantizer is None else graph.scale(quantizer)
        if quantizer is None or weight is None or scale is None or not (scale > 0).all():
            return None
        axis = quantizer.attributes.get('axis', 1)
        steps = weight / _expand(scale, weight.ndim, axis) + _expand(graph.zero_point(quantizer), weight.ndim, axis)
        integers = np.round(steps)
        off = float(np.abs(steps - integers).max(initial=0.0))
        if not off <= GRID_TOLERANCE:
            return f'expected a weight on its grid, but a value lies {off:.3g} steps off it'
    elif integer_range(integers.dtype) is None or integers.dtype.itemsize > 1:
        return f'expected a weight of 8-bit integers or narrower, but got {integers.dtype.name}'
    if graph.expected is not None and graph.expected.weights is not None:
        container = graph.expected.weights.get(dq.input(0).partition('.parametrizations.')[0])
        if container is None:
            return f'expected the weight of a quantized layer of the model, but got {dq.input(0)!r}'
    low, high = integers.min(initial=0), integers.max(initial=0)
    if container is not None and not container[0] <= low <= high <= container[1]:
        return f'expected integers in {container[0]}..{container[1]}, but got {low:g}..{high:g}'
    return None


def _expand(values: Array, ndim: int, axis: int) -> Array:
    """Gives ``(C,)`` the shape that broadcasts along ``axis``."""
    return values if values.size == 1 else values.reshape([-1 if i == axis % ndim else 1 for i in range(ndim)])


def check_grids(graph: OnnxGraph) -> Faults:
    """C7: a grid is one of the model's, holds 0, and is cut at integers of its container.

    Bounds of a Clip between Q and DQ are such integers, bounds of one before a Q are
    ``(integer - zero_point) * scale``.
    """
    for node in graph.activation_quantizers():
        clip = graph.integer_clip(node) or graph.grid_clip(node)
        message, before = _grid_fault(graph, node, clip), graph.producer(node.input(0))
        if message and clip is None and before is not None and before.op == 'Clip':
            # a grid may end where an activation function does
            clip, message = before, _grid_fault(graph, node, before)
        if message:
            yield node.name if clip is None else clip.name, message


def _grid_fault(graph: OnnxGraph, node: Node, clip: Node | None) -> str | None:
    container, scale = graph.zero_point_range(node), graph.scale(node)
    if container is None or scale is None or not (np.isfinite(scale) & (scale > 0)).all():
        return None
    zero_point = graph.zero_point(node)
    integers = container if clip is None else _clip_integers(graph, node, clip, container)
    if isinstance(integers, str):
        return integers
    if not integers[0] <= zero_point.min() <= zero_point.max() <= integers[1]:
        return f'expected a zero-point in {integers[0]}..{integers[1]}, but got {zero_point.flat[0]}'
    grids = None if graph.expected is None else graph.expected.activations
    if grids is None:
        return None
    grid = graph.grid(node, integers)
    if grid in grids:
        return None
    meant = ' or '.join(f'{g.low}..{g.high}' for g in grids if g[:2] == grid[:2])
    found = f'{grid.low}..{grid.high} (scale {scale.flat[0]:g}, zero-point {zero_point.flat[0]})'
    return f'expected {f"the integers {meant}" if meant else "a grid of the model"}, but got {found}'


def _clip_integers(graph: OnnxGraph, node: Node, clip: Node, container: tuple[int, int]) -> tuple[int, int] | str:
    """Integers that a Clip leaves to the grid of a Q, or what is wrong with them."""
    bounds, scale = graph.clip_bounds(clip), graph.scale(node)
    if bounds is None or scale is None:
        return 'expected a Clip with one constant lower and upper bound'
    if not bounds[0] < bounds[1]:
        return f'expected a lower bound below the upper, but got {bounds[0]:g} and {bounds[1]:g}'
    step, zero = 1.0, 0
    if clip is graph.integer_clip(node):
        for value in (graph.constant(tensor) for tensor in clip.inputs[1:] if tensor):
            if value is None or integer_range(value.dtype) != container:
                found = 'a cast' if value is None else value.dtype.name
                return f'expected constant bounds in the container {container[0]}..{container[1]}, but got {found}'
    elif scale.size != 1:
        return f'expected a Q per tensor behind a Clip of real values, but it has {scale.size} scales'
    else:
        step, zero = float(scale.flat[0]), int(graph.zero_point(node).flat[0])
    low, high = (end if np.isinf(b) else round(b / step) + zero for b, end in zip(bounds, container, strict=True))
    exact = [(integer - zero) * step for integer in (low, high)]
    near = all(np.isinf(b) or abs(b - e) <= TOLERANCE * max(abs(e), step) for b, e in zip(bounds, exact, strict=True))
    if near and container[0] <= low and high <= container[1]:
        return low, high
    grid = f'integers of {container[0]}..{container[1]} (scale {step:g}, zero-point {zero})'
    return f'expected bounds that are {grid}, but got {bounds[0]:g} and {bounds[1]:g}'


def check_biases(graph: OnnxGraph) -> Faults:
    """C8: biases are float32 constants."""
    for layer in graph.layers():
        tensor = layer.node.input(2) or _added_bias(graph, layer.node)
        if not tensor:
            continue
        value, maker = graph.constant(tensor), graph.producer(tensor)
        if value is not None and value.dtype != np.float32:
            yield layer.node.name, f'expected a float32 bias, but got {value.dtype.name}'
        elif value is None and maker is not None and maker.op in ('QuantizeLinear', 'DequantizeLinear', 'Cast'):
            yield layer.node.name, f'expected a float32 bias, but it comes from {title(maker)}'


def _added_bias(graph: OnnxGraph, node: Node) -> str:
    """The other operand of an Add right after a linear layer or convolution without bias, if it is no activation."""
    readers = graph.consumers(node.outputs[0])
    if len(readers) != 1 or readers[0].op != 'Add':
        return ''
    other = [tensor for tensor in readers[0].inputs if tensor != node.outputs[0]]
    if len(other) != 1:
        return ''
    maker = graph.producer(other[0])
    stored = graph.constant(other[0]) is not None
    if maker is not None and maker.op in ('DequantizeLinear', 'Cast'):
        stored = graph.constant(maker.input(0)) is not None
    return other[0] if stored else ''


def check_bias_range(graph: OnnxGraph) -> Faults:
    """C9: a bias fits int32 in units of input scale times weight scale, to which runtimes round it."""
    for layer in graph.layers():
        bias, dq = graph.constant(layer.node.input(2)), layer.weight_dq
        weights = None if dq is None else graph.scale(dq)
        scales = [graph.scale(source) for source in graph.quantized_sources(layer.data) or []]
        inputs = [scale.max() for scale in scales if scale is not None]
        if bias is None or weights is None or not inputs or weights.size not in (1, bias.size):
            continue
        step = np.ravel(weights) * min(inputs)
        # what C1 reports is not reported again
        if (step > 0).all() and (units := np.abs(bias / step).max()) >= 2**31:
            yield layer.node.name, f'expected a bias below 2^31 units of its scales, but got {units:.3g}'
