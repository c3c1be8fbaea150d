"""C1 and V1 to V6 on an OpenVINO IR, for files from elsewhere; ours are converted from ONNX that all rules have seen.

Source: OpenVINO's specification of FakeQuantize and its pages on low-precision transformations.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmbrecq.dependencies import require
from mmbrecq.deploy.verify.onnx_graph import Array
from mmbrecq.errors import ExportError

Faults = Iterator[tuple[str, str, str]]
"""Broken rules, as :class:`~mmbrecq.deploy.verify.Violation` has them."""

# Operations of the IR that have integer kernels; all take their weight as input 1
LAYERS = ('Convolution', 'GroupConvolution', 'ConvolutionBackpropData', 'GroupConvolutionBackpropData', 'MatMul')
SHAPE_OPS = ('Reshape', 'Squeeze', 'Transpose', 'Unsqueeze')
MOVE_OPS = (*SHAPE_OPS, 'MaxPool', 'Pad', 'Slice', 'StridedSlice', 'Split', 'VariadicSplit')
CHANNEL_OPS = ('MaxPool', 'Pad')
INTEGER_OPS = ('Convert', 'Clamp', 'Subtract', 'Multiply')
UNROUNDED = 2**24
"""Levels of a FakeQuantize that cuts and does not round: float32 tells no more apart."""
# Steps that the end of a range may lie off an integer: ranges are rounded to float32.
TOLERANCE = 0.01


def read_ir(path: Path) -> list[Any]:
    """Operations of an OpenVINO IR; DependencyError without OpenVINO, ExportError where the file cannot be read."""
    openvino = require('openvino')
    try:
        operations: list[Any] = openvino.Core().read_model(path).get_ordered_ops()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ExportError(f'{path}: expected an OpenVINO IR, but could not read it ({reason})') from error
    return operations


def verify_ir(operations: list[Any]) -> Faults:
    """Applies the rules that an IR can be held against."""
    for op in (op for op in operations if op.get_type_name() == 'FakeQuantize' and not _is_constant(_inputs(op)[0])):
        name = op.get_friendly_name()
        if op.get_attributes()['levels'] == UNROUNDED:
            continue
        yield from _range_faults(op, is_weight=False)
        integers = any(_dtype(reader)[0] in 'iu' for reader in _readers(op))
        for result in (reader for reader in _reached(op, integers, MOVE_OPS) if reader.get_type_name() == 'Result'):
            output = result.get_friendly_name()
            yield 'V6', name, f'expected a float network output, but it quantizes output {output!r}'
        # OpenVINO folds what is multiplied and added before it into the range that it reads
        largest = max((_constant(end) for end in _inputs(op)[3:5]), key=np.size)
        size, readers = largest.size, list(_reached(op, integers, CHANNEL_OPS))
        by_channel = largest.shape[1:2] == (size,) or not any(r.get_type_name() in LAYERS for r in readers)
        if size != 1 and not (by_channel and all(map(_keeps_channels, readers))):
            message = 'expected one range per tensor, or depthwise convolutions that read its channels'
            yield 'V5', name, f'{message}, but got {size}'
    layers = (op for op in operations if op.get_type_name() in LAYERS)
    for source in {source.get_name(): source for layer in layers for source in _inputs(layer)[:2]}.values():
        yield from _weight_faults(source)


def _range_faults(op: Any, is_weight: bool) -> Faults:
    name, levels = op.get_friendly_name(), int(op.get_attributes()['levels'])
    first, last, low, high = (_constant(source) for source in _inputs(op)[1:5])
    for a, b in ((first, last), (low, high)):
        if not (np.isfinite(b - a) & (a < b)).all():
            found = f'{np.ravel(a)[0]:g}..{np.ravel(b)[0]:g}'
            yield 'C1', name, f'expected a constant finite range with low < high, but got {found}'
            return
    steps = low * (levels - 1) / (high - low)
    symmetric = (np.abs(steps + levels // 2) <= TOLERANCE).all()
    on_levels = (np.abs(steps - np.rint(steps)) <= TOLERANCE).all() and (steps > 0.5 - levels).all()
    if levels not in (255, 256):
        yield 'V1', name, f'expected 255 or 256 levels, but got {levels}'
    elif is_weight and not symmetric:
        yield 'V4', name, 'expected a symmetric weight, but its zero-point is not 0'
    elif (low > 0).any():
        yield 'V3', name, f'expected a range that starts at 0, but it starts at {low.max():g}'
    elif (low < 0).any() and not symmetric and (levels == 255 or not on_levels):
        found = f'{np.ravel(low)[0]:g}..{np.ravel(high)[0]:g} in {levels}'
        message = 'expected 0 among the levels of the range, or a symmetric one in 255 levels'
        yield 'V2', name, f'{message}, but got {found}'


def _weight_faults(op: Any) -> Faults:
    """Faults of a quantized constant, ``(integers - zero_point) * scale`` or a FakeQuantize; none of other values."""
    name, scale, zero_point = '', np.ones(()), np.zeros(())
    while (kind := op.get_type_name()) in (*SHAPE_OPS, *INTEGER_OPS):
        data, *others = _inputs(op)
        if kind == 'Multiply':
            # OpenVINO folds a factor behind a layer into its weight, as one more Multiply; the scale is the last one
            data, other = (data, others[0]) if _is_constant(others[0]) else (others[0], data)
            name, scale = op.get_friendly_name(), _constant(other)
        elif kind == 'Subtract':
            zero_point = _constant(others[0])
        op = data
    if kind == 'FakeQuantize' and _is_constant(_inputs(op)[0]):
        yield from _range_faults(op, is_weight=True)
    elif kind == 'Constant' and name and _dtype(op)[0] in 'iu':
        if not (np.isfinite(scale) & (scale > 0)).all():
            yield 'C1', name, f'expected constant finite scales > 0, but got {scale.min():g}'
        if _dtype(op) not in ('i8', 'u8'):
            yield 'V1', name, f'expected an 8-bit weight, but got {_dtype(op)}'
        # u8 around 128 holds the same values as i8 around 0
        elif (zero_point != (128 if _dtype(op) == 'u8' else 0)).any():
            yield 'V4', name, 'expected a symmetric weight, but its zero-point is not 0'


def _reached(op: Any, integers: bool, moves: tuple[str, ...]) -> Iterator[Any]:
    """Operations that read a quantized value, behind its dequantization and ``moves``."""
    for reader in _readers(op):
        kind = reader.get_type_name()
        if kind in moves or (integers and kind in INTEGER_OPS):
            yield from _reached(reader, integers and kind != 'Multiply', moves)
        elif kind != 'ShapeOf':
            yield reader


def _keeps_channels(reader: Any) -> bool:
    """Returns whether a reader moves no channels, and if it is a layer, is a depthwise convolution."""
    depthwise = reader.get_type_name() == 'GroupConvolution' and reader.get_input_shape(1)[2] == 1
    return depthwise or reader.get_type_name() not in (*LAYERS, *MOVE_OPS)


def _inputs(op: Any) -> list[Any]:
    return [source.get_source_output().get_node() for source in op.inputs()]


def _readers(op: Any) -> list[Any]:
    return [target.get_node() for output in op.outputs() for target in output.get_target_inputs()]


def _dtype(op: Any) -> str:
    return str(op.get_output_element_type(0).get_type_name())


def _is_constant(op: Any) -> bool:
    """Returns whether a value is stored, reshaped and converted or not."""
    moved = op.get_type_name() in (*SHAPE_OPS, 'Convert')
    return op.get_type_name() == 'Constant' or (moved and _is_constant(_inputs(op)[0]))


def _constant(op: Any) -> Array:
    """Value of a constant as float64; NaN for what is computed, 0 for what is packed."""
    if not _is_constant(op):
        return np.full((), np.nan)
    if op.get_type_name() != 'Constant':
        return _constant(_inputs(op)[0])
    packed = op.get_output_element_type(0).bitwidth < 8
    return np.zeros(()) if packed else np.array(op.get_data(), np.float64)
