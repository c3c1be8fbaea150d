"""An analytic model of a precision-scalable accelerator."""

from __future__ import annotations

import math
from math import prod

from mmbrecq.errors import ConfigError
from mmbrecq.mixed_precision.costs.base import BaseCostModel
from mmbrecq.mixed_precision.costs.layers import Bits, LayerShape
from mmbrecq.registry import COST_MODELS


@COST_MODELS.register_module()
class BitSerialAccelerator(BaseCostModel):
    """Milliseconds of one image on an array of bit-serial multipliers, layer after layer.

    A layer takes the longest of three, each of which could hide the others::

        compute  = macs * weight_bits * activation_bits / (bit_operations_per_cycle * frequency)
        off-chip = (weight bytes + what of input and output does not fit on the chip) / off_chip_bandwidth
        on-chip  = (weight bytes + input bytes + output bytes) / on_chip_bandwidth

    plus ``overhead``. Bits are rounded up to a multiple of ``bit_granularity``, what is float counts 32; an output
    has the bits of the layer's input. It is a roofline, so it bounds the time from below.

    Args:
        bit_operations_per_cycle: Products of single bits that the array computes in a cycle; a 64 x 64 array of
            2 x 2 bit multipliers has 16,384.
        frequency: Cycles per second.
        off_chip_bandwidth: Bytes per second from memory.
        on_chip_bandwidth: Bytes per second from the buffer.
        on_chip_bytes: Size of the buffer; activations that fit stay there.
        bit_granularity: Bits that a multiplier takes at once.
        overhead: Seconds to start a layer.
    """

    name, unit = 'latency', 'ms'

    def __init__(
        self,
        bit_operations_per_cycle: float = 16384,
        frequency: float = 200e6,
        off_chip_bandwidth: float = 4e9,
        on_chip_bandwidth: float = 64e9,
        on_chip_bytes: float = 1 << 20,
        bit_granularity: int = 2,
        overhead: float = 0.0,
    ) -> None:
        positive = {
            'bit_operations_per_cycle': bit_operations_per_cycle, 'frequency': frequency,
            'off_chip_bandwidth': off_chip_bandwidth, 'on_chip_bandwidth': on_chip_bandwidth,
        }  # fmt: skip
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ConfigError(f'expected {name} of an accelerator to be a finite number > 0, but got {value!r}')
        for name, value in {'on_chip_bytes': on_chip_bytes, 'overhead': overhead}.items():
            if not 0 <= value < math.inf:
                raise ConfigError(f'expected {name} of an accelerator to be a finite number >= 0, but got {value!r}')
        if type(bit_granularity) is not int or bit_granularity < 1:
            raise ConfigError(f'expected bit_granularity to be an integer >= 1, but got {bit_granularity!r}')
        self.bit_operations_per_cycle, self.frequency = bit_operations_per_cycle, frequency
        self.off_chip_bandwidth, self.on_chip_bandwidth = off_chip_bandwidth, on_chip_bandwidth
        self.on_chip_bytes, self.bit_granularity, self.overhead = on_chip_bytes, bit_granularity, overhead

    def layer_cost(self, layer: LayerShape, bits: Bits) -> float:
        weight_bits, activation_bits = (self._served(value) for value in bits)
        compute = layer.macs * weight_bits * activation_bits / (self.bit_operations_per_cycle * self.frequency)
        weights = layer.weights * weight_bits / 8
        off_chip = on_chip = weights
        for call in layer.calls:
            moved = [prod(shape) * activation_bits / 8 for shape in (call.inputs, call.outputs)]
            on_chip += sum(moved) * call.times
            off_chip += sum(max(part - self.on_chip_bytes, 0) for part in moved) * call.times
        traffic = max(off_chip / self.off_chip_bandwidth, on_chip / self.on_chip_bandwidth)
        return 1e3 * (max(compute, traffic) + self.overhead)

    def _served(self, bits: int | None) -> int:
        """Bits that the array works on in the place of ``bits``."""
        return math.ceil((bits or 32) / self.bit_granularity) * self.bit_granularity
