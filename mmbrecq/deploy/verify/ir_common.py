"""C rules on an OpenVINO IR, as far as an IR can break them.

C4 is OpenVINO's own matter. Q and DQ of one pair become one FakeQuantize, whose two ranges may differ for good
reason, so that only the ONNX file shows whether the pair agrees (C5).


Source: OpenVINO's specification of FakeQuantize, and what ``openvino.convert_model`` makes of a Q/DQ ONNX file.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mmbrecq.deploy.verify.ir_graph import IRGraph
from mmbrecq.deploy.verify.ir_nodes import CONV_AXES, Array, FakeQuant, IRNode, Layer, Weight
from mmbrecq.deploy.verify.onnx_graph import ACTIVATION_BOUNDS
from mmbrecq.deploy.verify.violation import Violation

# Steps that a value may lie off the grid; ranges are float32 and written as low and high, not as scale.
GRID_TOLERANCE = 1e-3


def quantized_weights(graph: IRGraph) -> list[Weight]:
    """Quantized weights, each once, in the order of their layers."""
    return list({layer.weight.end: layer.weight for layer in graph.layers() if layer.weight is not None}.values())


def check_scales(graph: IRGraph) -> Iterator[Violation]:
    """C1: ranges and scales are constant and finite, and a range is not empty."""
    for quant in graph.fake_quants():
        yield from _range_faults(quant)
    for weight in quantized_weights(graph):
        if weight.fake_quant is not None:
            yield from _range_faults(weight.fake_quant)
        elif weight.scale is None:
            yield Violation('C1', weight.end.name, 'expected a constant scale, but it is computed')
        elif not (np.isfinite(weight.scale).all() and (weight.scale > 0).all()):
            worst = weight.scale[~(np.isfinite(weight.scale) & (weight.scale > 0))].flat[0]
            yield Violation('C1', weight.end.name, f'expected finite scales > 0, but got {worst:g}')


def _range_faults(quant: FakeQuant) -> Iterator[Violation]:
    if quant.usable:
        return
    for low, high in ((quant.low, quant.high), (quant.out_low, quant.out_high)):
        lows, highs = np.broadcast_arrays(np.ravel(low), np.ravel(high))
        bad = ~(np.isfinite(highs - lows) & (lows < highs))
        if bad.any():
            found = f'{lows[bad][0]:g}..{highs[bad][0]:g}'
            message = f'expected a constant finite range with low < high, but got {found}'
            yield Violation('C1', quant.end.name, message)
            return


def check_zero_points(graph: IRGraph) -> Iterator[Violation]:
    """C2: a zero-point that is given has one value per scale."""
    for weight in quantized_weights(graph):
        zero_point, scale = weight.zero_point, weight.scale
        # Packed 4-bit values are not read: an empty array.
        if zero_point is not None and scale is not None and zero_point.size and zero_point.size != scale.size:
            message = f'expected {scale.size} zero-points, one per scale, but got {zero_point.size}'
            yield Violation('C2', weight.end.name, message)


def check_axes(graph: IRGraph) -> Iterator[Violation]:
    """C3: scales of a weight lie along its output channels, or there is one."""
    for layer in graph.layers():
        scale = None if layer.weight is None else layer.weight.scale
        if layer.weight is None or scale is None or scale.size == 1:
            continue
        axes = [axis for axis, size in enumerate(scale.shape) if size != 1]
        allowed = _channel_axes(layer, scale)
        if len(axes) != 1 or axes[0] not in allowed:
            message = f'expected scales along axis {allowed[0]} of the weight of {layer.node.name!r}'
            yield Violation('C3', layer.weight.end.name, f'{message}, but their shape is {scale.shape}')


def _channel_axes(layer: Layer, scale: Array) -> tuple[int, ...]:
    node = layer.node
    if node.op == 'MatMul':
        second = node.inputs[0] is layer.data
        transposed = bool(node.attributes.get('transpose_b' if second else 'transpose_a', False))
        return (scale.ndim - 2,) if second == transposed else (scale.ndim - 1,)
    # convert_model scales the weight before it splits off the groups: axis 0 is groups times channels.
    return (CONV_AXES[node.op], 0) if node.op.startswith('Group') else (CONV_AXES[node.op],)


def check_pairs(graph: IRGraph) -> Iterator[Violation]:
    """C5: all integers are dequantized, no quantization is doubled, and every quantized layer is there."""
    for start, reader in graph.used_integers():
        message = 'expected its integers to be clamped, moved and converted to real values only'
        yield Violation('C5', start.name, f'{message}, but got {reader.op} {reader.name!r}')
    for quant in graph.fake_quants():
        earlier = graph.as_fake_quant(quant.node.inputs[0])
        if earlier is not None and quant.usable and earlier.usable and _repeats(earlier, quant):
            message = f'expected one quantization, but {earlier.end.name!r} before it has the same grid'
            yield Violation('C5', quant.end.name, message)
    if graph.expected is not None:
        found = sum(layer.weight is not None for layer in graph.layers())
        if found != graph.expected.layers:
            message = f'expected {graph.expected.layers} quantized convolution and linear layers, but got {found}'
            yield Violation('C5', graph.name, message)


def _repeats(first: FakeQuant, second: FakeQuant) -> bool:
    ends = ((first.out_low, second.low), (first.out_high, second.high))
    # Ends are products of integers and scale on one side, float32 constants on the other.
    same = all(bool((np.abs(a - b) <= GRID_TOLERANCE * second.step).all()) for a, b in ends)
    narrows = second.clamps and _clamp_bounds(first) != _clamp_bounds(second)
    return same and first.levels == second.levels and not narrows


def _clamp_bounds(quant: FakeQuant) -> set[tuple[float, float]]:
    return {bounds_of(clamp) for clamp in quant.clamps}


def check_weights(graph: IRGraph) -> Iterator[Violation]:
    """C6: weights are integers of at most 8 bits, or floats that their FakeQuantize leaves as they are."""
    for weight in quantized_weights(graph):
        if weight.fake_quant is None:
            if weight.source.dtype not in ('i2', 'i4', 'i8', 'u2', 'u4', 'u8'):
                message = f'expected a weight of 8-bit integers or narrower, but got {weight.source.dtype}'
                yield Violation('C6', weight.end.name, message)
        elif weight.fake_quant.usable:
            off = _steps_moved(weight.values, weight.fake_quant)
            if off > GRID_TOLERANCE:
                message = f'expected a weight on its grid, but a value lies {off:.3g} steps off it'
                yield Violation('C6', weight.end.name, message)


def _steps_moved(values: Array, quant: FakeQuant) -> float:
    """Largest distance, in steps, by which the FakeQuantize moves a value of its constant."""
    integers = np.clip(np.round((values - quant.low) / quant.step), 0, quant.levels - 1)
    moved = quant.out_low + integers * quant.out_step - values
    return float(np.abs(moved / quant.out_step).max(initial=0.0))


def check_clips(graph: IRGraph) -> Iterator[Violation]:
    """C7: bounds of a Clamp before a FakeQuantize lie on its grid, those of one behind it are integers."""
    for quant in graph.fake_quants():
        for clamp in quant.clamps:
            if message := _integer_clamp_fault(clamp):
                yield Violation('C7', clamp.name, message)
        clamp = quant.node.inputs[0]
        # Where the integers are clamped, a Clamp before is an activation function.
        if not quant.clamps and clamp.op == 'Clamp' and quant.usable and (message := _clamp_fault(clamp, quant)):
            yield Violation('C7', clamp.name, message)


def bounds_of(clamp: IRNode) -> tuple[float, float]:
    """Lower and upper bound of a Clamp."""
    return float(clamp.attributes['min']), float(clamp.attributes['max'])


def _integer_clamp_fault(clamp: IRNode) -> str | None:
    low, high = bounds_of(clamp)
    bits = int(clamp.dtype[1:])
    container = (0, 2**bits - 1) if clamp.dtype[0] == 'u' else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if not low < high:
        return f'expected a lower bound below the upper, but got {low:g} and {high:g}'
    if not (low.is_integer() and high.is_integer() and container[0] <= low and high <= container[1]):
        return f'expected integers of {container[0]}..{container[1]}, but got {low:g} and {high:g}'
    return None


def _clamp_fault(clamp: IRNode, quant: FakeQuant) -> str | None:
    bounds = bounds_of(clamp)
    if bounds in ACTIVATION_BOUNDS:
        return None
    if not bounds[0] < bounds[1]:
        return f'expected a lower bound below the upper, but got {bounds[0]:g} and {bounds[1]:g}'
    integers = (np.asarray(bounds).reshape(2, 1) - quant.low.reshape(1, -1)) / quant.step.reshape(1, -1)
    off = np.abs(integers - np.clip(np.round(integers), 0, quant.levels - 1))
    if not off.max() <= GRID_TOLERANCE:
        return f'expected bounds on the grid of {quant.end.name!r}, but got {bounds[0]:g} and {bounds[1]:g}'
    return None


def check_biases(graph: IRGraph) -> Iterator[Violation]:
    """C8: biases are float32 constants."""
    for layer in graph.layers():
        readers = layer.node.readers
        if len(readers) != 1 or readers[0].op != 'Add':
            continue
        for other in readers[0].inputs:
            stored = graph.weight(other)
            source = other if stored is None else stored.source
            while source.op in ('Convert', 'Reshape') and source.inputs:
                source = source.inputs[0]
            if other is not layer.node and source.op == 'Constant' and source.dtype != 'f32':
                yield Violation('C8', layer.node.name, f'expected a float32 bias, but got {source.dtype}')
