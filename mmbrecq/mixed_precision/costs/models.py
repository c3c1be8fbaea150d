"""The contract of all cost models."""

from __future__ import annotations

import json
import math
from abc import ABCMeta, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmbrecq.byte_size import weight_bytes
from mmbrecq.errors import ConfigError, TableError
from mmbrecq.mixed_precision.costs.layers import Bits, LayerShape
from mmbrecq.registry import COST_MODELS


class BaseCostModel(metaclass=ABCMeta):
    """What the bits of a network cost: a sum over its layers."""

    name: str
    """By which budgets name the cost."""
    unit: str

    @abstractmethod
    def layer_cost(self, layer: LayerShape, bits: Bits) -> float:
        """Cost of one layer, for one image.

        Args:
            layer: Its shapes.
            bits: Of its weight and of its input, None for float.
        """

    def prepare(self, layers: Sequence[LayerShape]) -> None:  # noqa: B027, most have nothing to prepare
        """Does at once what all layers of a network need before their costs are asked for; by default nothing."""

    def table(self, layers: Sequence[LayerShape], candidates: Sequence[Bits]) -> NDArray[np.float64]:
        """Costs of all layers at all candidates, ``(layers, candidates)``.

        Raises:
            TableError: A cost is negative or not finite; its layer is named.
        """
        self.prepare(layers)
        return np.array([[self.cost(layer, bits) for bits in candidates] for layer in layers])

    def cost(self, layer: LayerShape, bits: Bits) -> float:
        """Cost of one layer, see :meth:`layer_cost`; TableError where it is negative or not finite."""
        cost = float(self.layer_cost(layer, bits))
        if not 0 <= cost < math.inf:
            raise TableError(f"expected the {self.name} of layer '{layer.name}' at {show(bits)} to be >= 0, got {cost}")
        return cost


def show(bits: Bits) -> str:
    """Bits as tables name them: ``W4A8``, with 32 for float."""
    return f'W{bits[0] or 32}A{bits[1] or 32}'


FLOAT_BITS = 32


@COST_MODELS.register_module()
class ModelSize(BaseCostModel):
    """Bytes of the weights, as ``summary.json`` counts them, see :func:`~mmbrecq.byte_size.weight_bytes`."""

    name, unit = 'size', 'bytes'

    def layer_cost(self, layer: LayerShape, bits: Bits) -> float:
        return weight_bytes(layer.weights, layer.scales, bits[0], layer.symmetric)


@COST_MODELS.register_module()
class BitOperations(BaseCostModel):
    """Multiplications times the bits of both factors, for one image (Li et al., ICLR 2021, and others)."""

    name, unit = 'bitops', 'bit operations'

    def layer_cost(self, layer: LayerShape, bits: Bits) -> float:
        weight_bits, activation_bits = bits
        return float(layer.macs * (weight_bits or FLOAT_BITS) * (activation_bits or FLOAT_BITS))


@COST_MODELS.register_module()
class LatencyTable(BaseCostModel):
    """Milliseconds of one image, layer by layer, from a file.

    It holds ::

        {"device": "...", "layers": {"backbone.conv1": {"W8A8": 0.12, "W4A8": 0.12, "W32A32": 0.31}, ...}}

    Args:
        path: The file; other keys than ``layers`` are for the reader.
    """

    name, unit = 'latency', 'ms'

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            content: Any = json.loads(Path(path).read_text(encoding='utf-8'))
        except (OSError, ValueError) as error:
            raise TableError(f'{path}: expected a JSON file with a table of latencies, but got {error}') from error
        layers = content.get('layers') if isinstance(content, dict) else None
        if not isinstance(layers, dict) or not all(isinstance(row, dict) for row in layers.values()):
            raise TableError(f"{path}: expected a table of latencies by layer and bits under the key 'layers'")
        self.layers: Mapping[str, Mapping[str, Any]] = layers

    def layer_cost(self, layer: LayerShape, bits: Bits) -> float:
        row = self.layers.get(layer.name)
        if row is None:
            raise TableError(f"{self.path}: expected latencies of layer '{layer.name}', but the table has none")
        value = row.get(show(bits))
        if value is None:
            raise TableError(
                f"{self.path}: expected the latency of layer '{layer.name}' at {show(bits)}, but the table has only "
                f'{", ".join(sorted(row)) or "nothing"}'
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise TableError(
                f"{self.path}: expected the latency of layer '{layer.name}' at {show(bits)} to be a number >= 0, "
                f'but got {value!r}'
            )
        return float(value)


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
