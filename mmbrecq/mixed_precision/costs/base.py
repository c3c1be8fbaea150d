"""The contract of all cost models."""

from __future__ import annotations

import math
from abc import ABCMeta, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmbrecq.errors import TableError
from mmbrecq.mixed_precision.costs.layers import Bits, LayerShape


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
