"""What a view of an OpenVINO IR is made of: operations, quantizers, quantized weights and layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Type of a layer -> axis of the output channels in its weight; a MatMul's depends on its attributes.
CONV_AXES = {'Convolution': 0, 'GroupConvolution': 1, 'ConvolutionBackpropData': 1, 'GroupConvolutionBackpropData': 2}
SHAPE_OPS = frozenset({'Reshape', 'Squeeze', 'Transpose', 'Unsqueeze'})
# Their output holds only values of their inputs, or zeros: what lies on a grid stays on it.
MOVE_OPS = SHAPE_OPS | {
    'Concat', 'DepthToSpace', 'Gather', 'MaxPool', 'Pad', 'ShuffleChannels', 'SpaceToDepth', 'Split', 'StridedSlice',
    'Slice', 'VariadicSplit', 'Broadcast', 'Tile',
}  # fmt: skip
INTEGER_TYPES = frozenset({'i2', 'i4', 'i8', 'i16', 'i32', 'u2', 'u4', 'u8', 'u16', 'u32'})


@dataclass(eq=False)
class IRNode:
    """An operation: friendly name, type, what it reads and what reads it, a Constant's value, shape (-1 where free)."""

    name: str
    op: str
    dtype: str
    attributes: Mapping[str, Any]
    inputs: list[IRNode] = field(default_factory=list)
    readers: list[IRNode] = field(default_factory=list)
    value: Array | None = None
    shape: tuple[int, ...] = ()

    def constant(self) -> Array | None:
        """Value as float64 where the operation is a Constant, converted or reshaped or not; else None."""
        if self.op == 'Constant':
            return None if self.value is None else self.value.astype(np.float64)
        return self.inputs[0].constant() if self.op in {'Convert'} | SHAPE_OPS and self.inputs else None


@dataclass(frozen=True, eq=False)
class FakeQuant:
    """``levels`` steps from ``low`` to ``high``, on the way in and out; computed bounds are NaN.

    The two ranges may differ: OpenVINO folds a constant factor or summand before a FakeQuantize into the
    input range, and a factor behind it into the output range. What the next layer sees is the output.

    Args:
        node: The FakeQuantize.
        end: Operation whose output is dequantized: the FakeQuantize, or the Multiply of
            ``FakeQuantize -> Convert -> [Clamp] -> Convert -> [Subtract] -> Multiply``.
        levels: Number of integers.
        low: Smallest input value, float64.
        high: Largest input value.
        out_low: Smallest output value.
        out_high: Largest output value.
        clamps: Clamps of the integers on the way to ``end``, which narrow the grid.
    """

    node: IRNode
    end: IRNode
    levels: int
    low: Array
    high: Array
    out_low: Array
    out_high: Array
    clamps: tuple[IRNode, ...] = ()

    @property
    def step(self) -> Array:
        """Distance of two neighbouring values on the way in."""
        return np.asarray((self.high - self.low) / (self.levels - 1))

    @property
    def out_step(self) -> Array:
        """Distance of two neighbouring values on the way out, the scale."""
        return np.asarray((self.out_high - self.out_low) / (self.levels - 1))

    @property
    def usable(self) -> bool:
        """Whether the ranges are constant, finite and not empty, so that the grid can be judged."""
        widths = (self.high - self.low, self.out_high - self.out_low)
        return self.levels > 1 and all(bool((np.isfinite(width) & (width > 0)).all()) for width in widths)


@dataclass(frozen=True, eq=False)
class Weight:
    """A quantized weight: ``(integers - zero_point) * scale``, or a FakeQuantize on a float constant.

    Args:
        end: Operation that yields the real values.
        source: The Constant.
        values: Its values, integers or floats, as float64.
        scale: Scale, None where it is computed.
        zero_point: Zero-point, None if there is none.
        fake_quant: The FakeQuantize on a float constant, else None.
    """

    end: IRNode
    source: IRNode
    values: Array
    scale: Array | None
    zero_point: Array | None
    fake_quant: FakeQuant | None


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer, its input, and its weight if that is quantized."""

    node: IRNode
    data: IRNode
    weight: Weight | None
