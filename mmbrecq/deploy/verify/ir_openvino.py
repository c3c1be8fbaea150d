"""V1 to V7: what OpenVINO asks of an IR to run it in int8.

Source: OpenVINO's specification of FakeQuantize and its pages on low-precision transformations.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mmbrecq.deploy.verify.ir_common import quantized_weights
from mmbrecq.deploy.verify.ir_graph import IRGraph
from mmbrecq.deploy.verify.ir_nodes import CONV_AXES, MOVE_OPS, Array, FakeQuant, Weight
from mmbrecq.deploy.verify.violation import Violation

# Steps that the end of a range may lie off an integer: ranges are rounded to float32.
RANGE_TOLERANCE = 0.01
# They move values within their channels.
CHANNEL_OPS = frozenset({'Interpolate', 'MaxPool', 'Pad'})
# Levels -> steps from the smallest value of a signed range to 0.
SIGNED_LOW = {256: 128, 255: 127}


def check_levels(graph: IRGraph) -> Iterator[Violation]:
    """V1: 255 or 256 levels; a low-bit grid lives in an 8-bit container."""
    quants = [weight.fake_quant for weight in quantized_weights(graph) if weight.fake_quant is not None]
    for quant in [*graph.fake_quants(), *quants]:
        if quant.levels not in SIGNED_LOW:
            yield Violation('V1', quant.end.name, f'expected 255 or 256 levels, but got {quant.levels}')
    for weight in quantized_weights(graph):
        if weight.fake_quant is None and weight.source.dtype not in ('i8', 'u8'):
            yield Violation('V1', weight.end.name, f'expected an 8-bit weight, but got {weight.source.dtype}')


def check_signed(graph: IRGraph) -> Iterator[Violation]:
    """V2: a range below 0 has 0 among its 256 levels, or is symmetric in 255."""
    for quant in _judged(graph):
        if (quant.out_low < 0).any() and not (_has_zero(quant) if quant.levels == 256 else _is_signed(quant)):
            low, high = float(np.ravel(quant.out_low)[0]), float(np.ravel(quant.out_high)[0])
            message = 'expected 0 among the levels of the range, or a symmetric one in 255 levels'
            yield Violation('V2', quant.end.name, f'{message}, but got {low:g}..{high:g} in {quant.levels}')


def check_unsigned(graph: IRGraph) -> Iterator[Violation]:
    """V3: a range without negative values starts at 0."""
    for quant in _judged(graph):
        if (quant.out_low > 0).any():
            low = float(np.max(quant.out_low))
            yield Violation('V3', quant.end.name, f'expected a range that starts at 0, but it starts at {low:g}')


def _judged(graph: IRGraph) -> Iterator[FakeQuant]:
    """Activation quantizers that neither C1 nor V1 reports."""
    return (quant for quant in graph.fake_quants() if quant.usable and quant.levels in SIGNED_LOW)


def _is_signed(quant: FakeQuant) -> bool:
    return bool((np.abs(quant.out_low / quant.out_step + SIGNED_LOW[quant.levels]) <= RANGE_TOLERANCE).all())


def _has_zero(quant: FakeQuant) -> bool:
    steps = quant.out_low / quant.out_step
    within = (steps >= 1 - quant.levels - RANGE_TOLERANCE).all()
    return bool(within and (np.abs(steps - np.rint(steps)) <= RANGE_TOLERANCE).all())


def check_layer_inputs(graph: IRGraph) -> Iterator[Violation]:
    """V4: both inputs of a convolution or linear layer are quantized, or neither, and weights are symmetric."""
    for layer in graph.layers():
        data = graph.quantized_sources(layer.data) is not None
        if data != (layer.weight is not None):
            found = 'the input' if data else 'the weight'
            message = f'expected quantization on input and weight, but only {found} has it'
            yield Violation('V4', layer.node.name, message)
    for weight in quantized_weights(graph):
        if not _is_symmetric(weight):
            yield Violation('V4', weight.end.name, 'expected a symmetric weight, but its zero-point is not 0')


def _is_symmetric(weight: Weight) -> bool:
    if weight.fake_quant is not None:
        # What C1 and V1 report is not reported again.
        judged = weight.fake_quant.usable and weight.fake_quant.levels in SIGNED_LOW
        return not judged or _is_signed(weight.fake_quant)
    # u8 around 128 holds the same values as i8 around 0.
    zero_point = np.zeros(1) if weight.zero_point is None else weight.zero_point
    return not (zero_point != (128 if weight.source.dtype == 'u8' else 0)).any()


def check_per_tensor(graph: IRGraph) -> Iterator[Violation]:
    """V5: activations have one range per tensor, or one per channel where of all layers depthwise convolutions read."""
    for quant in graph.fake_quants():
        widest = max((quant.low, quant.high, quant.out_low, quant.out_high), key=lambda bound: bound.size)
        if widest.size != 1 and not _is_read_by_channel(quant, widest):
            message = 'expected one range per tensor, or depthwise convolutions that read its channels'
            yield Violation('V5', quant.end.name, f'{message}, but got {widest.size} ranges')


def _is_read_by_channel(quant: FakeQuant, bound: Array) -> bool:
    readers = list(quant.end.readers)
    for reader in readers:
        if reader.op in MOVE_OPS | {'Interpolate'}:
            if reader.op not in CHANNEL_OPS:
                return False
            readers += reader.readers
        # The weight of groups is (groups, outputs of a group, inputs of a group, ...).
        elif reader.op == 'GroupConvolution' and reader.inputs[1].shape[0] == bound.size:
            continue
        elif reader.op in {*CONV_AXES, 'MatMul'}:
            return False
    return [axis for axis, size in enumerate(bound.shape) if size != 1] == [1]


def check_network_outputs(graph: IRGraph) -> Iterator[Violation]:
    """V6: network outputs are not quantized."""
    for result in graph.of_type('Result'):
        for quant in graph.quantized_sources(result.inputs[0]) or []:
            message = f'expected a float network output, but it quantizes output {result.name!r}'
            yield Violation('V6', quant.end.name, message)


def check_concats(graph: IRGraph) -> Iterator[Violation]:
    """V7: the quantized inputs of a Concat have one range: OpenVINO takes them to one, whatever the file says."""
    for concat in graph.of_type('Concat'):
        judged = [quant for maker in concat.inputs for quant in graph.quantized_sources(maker) or [] if quant.usable]
        if not all(_same_range(quant, judged[0]) for quant in judged):
            ranges = ', '.join(f'{np.ravel(q.out_low)[0]:g}..{np.ravel(q.out_high)[0]:g}' for q in judged)
            yield Violation('V7', concat.name, f'expected one range on all quantized inputs, but got {ranges}')


def _same_range(first: FakeQuant, second: FakeQuant) -> bool:
    if first.levels != second.levels or first.out_step.size != second.out_step.size:
        return False
    offsets = (np.ravel(first.out_low - second.out_low), np.ravel(first.out_high - second.out_high))
    return all(bool((np.abs(offset) <= RANGE_TOLERANCE * np.ravel(second.out_step)).all()) for offset in offsets)
