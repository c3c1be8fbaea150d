"""C6 to C8: the numbers in a Q/DQ ONNX file: weights and clip bounds on their grids, biases in float32.

Source: the ONNX operator specification of QuantizeLinear, DequantizeLinear and Clip.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mmbrecq.deploy.verify.onnx_graph import RELATIVE_TOLERANCE, Array, Node, OnnxGraph, integer_range
from mmbrecq.deploy.verify.onnx_structure import title
from mmbrecq.deploy.verify.violation import Violation

# A float weight counts as on its grid within this part of a step.
GRID_TOLERANCE = 1e-3


def check_weights(graph: OnnxGraph) -> Iterator[Violation]:
    """C6: weights lie on their grid: integers, or floats that quantization leaves as they are."""
    bits = dict(graph.expected.weight_bits) if graph.expected is not None else {}
    seen: set[str] = set()
    for layer in graph.layers():
        width = bits.pop(layer.node.name, None)
        if layer.weight_dq is None:
            if width is not None:
                message = f'expected a weight of {width} bits, but it has no DequantizeLinear'
                yield Violation('C6', layer.node.name, message)
            continue
        fault = _weight_fault(graph, layer.weight_dq, width)
        if fault is not None and layer.weight_dq.name not in seen:
            seen.add(layer.weight_dq.name)
            yield Violation('C6', layer.weight_dq.name, fault)
    for name in bits:
        yield Violation('C6', name, f'expected a layer with a weight of {bits[name]} bits, but there is none')


def _weight_fault(graph: OnnxGraph, dq: Node, bits: int | None) -> str | None:
    integers = graph.constant(dq.input(0))
    if integers is None:
        quantizer = graph.producer(dq.input(0))
        weight = None if quantizer is None else graph.constant(quantizer.input(0))
        scale = None if quantizer is None else graph.scale(quantizer)
        if quantizer is None or weight is None or scale is None or not (scale > 0).all():
            return None
        axis, container = quantizer.attributes.get('axis', 1), graph.zero_point_range(quantizer)
        integers = weight.astype(np.float64) / _expand(scale, weight.ndim, axis)
        integers = integers + _expand(graph.zero_point(quantizer), weight.ndim, axis)
        off = float(np.abs(integers - np.round(integers)).max(initial=0.0))
        if not off <= GRID_TOLERANCE:
            return f'expected a weight on its grid, but a value lies {off:.3g} steps off it'
        integers = np.round(integers)
        if container is not None and not (container[0] <= integers.min() and integers.max() <= container[1]):
            found = f'{integers.min():g}..{integers.max():g}'
            return f'expected integers in {container[0]}..{container[1]}, but got {found}'
    elif integer_range(integers.dtype) is None or integers.dtype.itemsize > 1:
        return f'expected a weight of 8-bit integers or narrower, but got {integers.dtype.name}'
    span = int(integers.max()) - int(integers.min()) + 1 if integers.size else 0
    if bits is not None and span > 2**bits:
        return f'expected a weight of {bits} bits, at most {2**bits} integers, but they span {span}'
    return None


def _expand(values: Array, ndim: int, axis: int) -> Array:
    """Gives ``(C,)`` the shape that broadcasts along ``axis``."""
    return values if values.size == 1 else values.reshape([-1 if i == axis % ndim else 1 for i in range(ndim)])


def check_clips(graph: OnnxGraph) -> Iterator[Violation]:
    """C7: a Clip cuts a grid at integers of its container.

    Bounds of a Clip between Q and DQ are such integers, bounds of one before a Q are
    ``(integer - zero_point) * scale``.
    """
    ranges = dict(graph.expected.activation_ranges) if graph.expected is not None else {}
    for node in graph.activation_quantizers():
        expected = ranges.pop(node.name, None)
        clip = graph.integer_clip(node) or graph.grid_clip(node)
        if expected is not None and clip is None:
            maker = graph.producer(node.input(0))
            clip = maker if maker is not None and maker.op == 'Clip' else None
        message = _clip_fault(graph, node, clip, expected)
        if message:
            yield Violation('C7', node.name if clip is None else clip.name, message)
    for name, (low, high) in ranges.items():
        yield Violation('C7', name, f'expected a QuantizeLinear clipped to {low}..{high}, but there is none')


def _clip_fault(graph: OnnxGraph, node: Node, clip: Node | None, expected: tuple[int, int] | None) -> str | None:
    container, scale = graph.zero_point_range(node), graph.scale(node)
    if container is None or scale is None or not (np.isfinite(scale) & (scale > 0)).all():
        return None
    if clip is None:
        missing = expected is not None and expected != container
        return f'expected a Clip to the integers {expected} for it, but there is none' if missing else None
    bounds = graph.clip_bounds(clip)
    if bounds is None:
        return 'expected a Clip with one constant lower and upper bound'
    if not bounds[0] < bounds[1]:
        return f'expected a lower bound below the upper, but got {bounds[0]:g} and {bounds[1]:g}'
    if clip is graph.integer_clip(node):
        integers = _integer_bounds(graph, clip, bounds, container)
    else:
        integers = _real_bounds(bounds, scale, graph.zero_point(node), container)
    if isinstance(integers, str):
        return integers
    if expected is not None and integers != expected:
        return f'expected a Clip to the integers {expected}, but got {integers}'
    return None


def _integer_bounds(
    graph: OnnxGraph, clip: Node, bounds: tuple[float, float], container: tuple[int, int]
) -> tuple[int, int] | str:
    """Integers that a Clip between Q and DQ leaves, or what is wrong with them."""
    for tensor in filter(None, clip.inputs[1:]):
        value = graph.constant(tensor)
        if value is None or integer_range(value.dtype) != container:
            found = 'a cast' if value is None else value.dtype.name
            return f'expected constant bounds in the container {container[0]}..{container[1]}, but got {found}'
    low, high = (container[side] if np.isinf(bound) else int(bound) for side, bound in enumerate(bounds))
    return low, high


def _real_bounds(
    bounds: tuple[float, float], scale: Array, zero_point: Array, container: tuple[int, int]
) -> tuple[int, int] | str:
    """Integers that a Clip before a Q leaves, or what is wrong with them."""
    if scale.size != 1:
        return f'expected a Q per tensor behind a Clip of real values, but it has {scale.size} scales'
    step, zero = float(scale.reshape(())), int(zero_point.reshape(-1)[0])
    low, high = (_on_grid(b, step, zero, container, side) for side, b in enumerate(bounds))
    if low is None or high is None:
        grid = f'integers of {container[0]}..{container[1]} (scale {step:g}, zero-point {zero})'
        return f'expected bounds that are {grid}, but got {bounds[0]:g} and {bounds[1]:g}'
    return low, high


def _on_grid(bound: float, step: float, zero: int, container: tuple[int, int], side: int) -> int | None:
    """Integer of ``bound`` on the grid, None if it lies beside it or outside the container."""
    if np.isinf(bound):
        return container[side]
    integer = round(bound / step) + zero if np.isfinite(bound) else container[0] - 1
    exact = (integer - zero) * step
    near = abs(bound - exact) <= RELATIVE_TOLERANCE * max(abs(exact), step)
    return integer if near and container[0] <= integer <= container[1] else None


def check_biases(graph: OnnxGraph) -> Iterator[Violation]:
    """C8: biases are float32 constants."""
    for layer in graph.layers():
        tensor = layer.node.input(2) or _added_bias(graph, layer.node)
        if not tensor:
            continue
        value, maker = graph.constant(tensor), graph.producer(tensor)
        if value is not None and value.dtype != np.float32:
            yield Violation('C8', layer.node.name, f'expected a float32 bias, but got {value.dtype.name}')
        elif value is None and maker is not None and maker.op in ('QuantizeLinear', 'DequantizeLinear', 'Cast'):
            yield Violation('C8', layer.node.name, f'expected a float32 bias, but it comes from {title(maker)}')


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
