"""Computes the axes of the report's charts, which the templates draw."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mmbrecq.mixed_precision.search.bits import SearchResult
from mmbrecq.reconstruction.results import UnitResult


@dataclass(frozen=True)
class Axis:
    """Maps values from ``low`` to ``high`` to the pixels from ``start`` to ``end``."""

    start: float
    end: float
    low: float
    high: float

    def pixel(self, value: float) -> float:
        """Returns the pixel of a value."""
        return self.start + (value - self.low) * (self.end - self.start) / (self.high - self.low or 1)


class LogAxis(Axis):
    """Maps whole decades ``10**low .. 10**high``; values that are not above 0 have the pixel of the low end."""

    def pixel(self, value: float) -> float:
        """Returns the pixel of a value."""
        return super().pixel(math.log10(value) if value > 0 else self.low)

    def ticks(self) -> list[float]:
        """Returns the labelled values: more than the decades on a short axis, and fewer on a long one."""
        low, high = int(self.low), int(self.high)
        values = [10.0**exponent for exponent in range(low, high + 1, max(1, math.ceil((high - low) / 8)))]
        if high - low <= 2:
            values += [factor * 10.0**exponent for exponent in range(low, high) for factor in (2, 5)]
        return sorted(values)


def share(value: float, largest: float) -> float:
    """Returns ``value`` in percent of ``largest``, from 0 to 100; 0 where that is undefined."""
    return 100 * min(max(value / largest, 0.0), 1.0) if largest > 0 and math.isfinite(value) else 0.0


def drawable(unit: UnitResult) -> bool:
    """Returns whether both losses of a unit are positive and finite, as a log axis needs them."""
    return all(math.isfinite(loss) and loss > 0 for loss in (unit.loss_before, unit.loss_after))


def log_axis(values: Iterable[Iterable[float]], start: float, end: float) -> LogAxis:
    """Returns the axis of the fewest decades that hold all ``values`` above 0."""
    logs = [math.log10(value) for row in values for value in row if value > 0]
    low, high = (math.floor(min(logs)), math.ceil(max(logs))) if logs else (-1, 0)
    return LogAxis(start, end, low, max(high, low + 1))


def front(chosen: SearchResult) -> list[tuple[float, float]]:
    """Returns cost and loss of the choices that can be drawn."""
    return [(cost, loss) for cost, loss in chosen.front if loss > 0]


def front_axes(chosen: SearchResult) -> tuple[Axis, LogAxis, list[float]]:
    """Returns the axes of cost and loss, and the labelled costs."""
    points, spent = front(chosen), chosen.spent[chosen.front_cost]
    costs = [spent, *(cost for cost, _ in points)]
    losses = [chosen.predicted, chosen.measured or 0.0, *(loss for _, loss in points)]
    least, most = min(costs), max(costs)
    labelled = [least + i * (most - least) / 5 for i in range(6)]
    return Axis(92, 812, least, most), log_axis([losses], 274, 12), labelled
