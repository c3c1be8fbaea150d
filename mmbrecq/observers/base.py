"""Observers turn batches of values into one scale and zero-point per channel or tensor; the simplest take the ends."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmbrecq.building import build, check_number, expect
from mmbrecq.errors import ConfigError, DataError, NonFiniteError
from mmbrecq.functional import affine_from_range, shared_affine_from_range
from mmbrecq.qtype import QType
from mmbrecq.registry import OBSERVERS

Self = TypeVar('Self', bound='BaseObserver')
Average = TypeVar('Average', bound='MovingAverageObserver')


class BaseObserver:
    """Collects statistics of a tensor over batches and turns them into a scale and a zero-point.

    This class checks the values, lays them out as rows, one per scale, and keeps the ends of every row. A subclass may
    keep more (:meth:`_update`, :meth:`_merge`), and may choose another range than all that was seen (:meth:`_solve`).
    The statistics live on the device of the values; processes send each other their observers whole.

    Args:
        qtype: The grid; one scale per index of ``ch_axis``, or one per tensor when it is None.

    Attributes:
        first (int | None): Number of the first batch among all that the processes of a run see; None where that is
            not known, and batches that are merged follow those that are there.
        batches (int): Number of batches observed.
        low (Tensor | None): ``(R,)`` lower end of every row; ``R`` is 1 per tensor.
        high (Tensor | None): ``(R,)`` upper end of every row.
    """

    def __init__(self, qtype: QType) -> None:
        self.qtype = qtype
        self.first: int | None = None
        self.batches = 0
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """Observes one batch; an empty one changes nothing.

        Args:
            x (Tensor): Values of any shape and device; ``x`` is neither kept nor changed.

        Raises:
            NonFiniteError: If a value is NaN or infinite; the statistics stay as they were.
            ConfigError: If ``x`` has no axis ``ch_axis``, or another number of channels than before.
        """
        if x.numel() == 0:
            return
        rows = self._rows(x.detach())
        low, high = _ends(rows)
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            bad = int((~torch.isfinite(rows)).sum())
            raise NonFiniteError(f'expected finite values, but got {bad} NaN or infinite ones among {rows.numel()}')
        if self.low is not None and self.low.shape != low.shape:
            raise ConfigError(f'expected {self.low.numel()} channels as before, but got {low.numel()}')
        self._update(rows, low, high)
        self.batches += 1

    def compute(self) -> tuple[Tensor, Tensor]:
        """Returns ``(scale, zero_point)``, float tensors of shape ``()`` or ``(C,)``; ``scale > 0`` and finite.

        DataError is raised if nothing was observed.
        """
        if self.low is None or self.high is None:
            raise DataError(f'expected {type(self).__name__} to have observed values, but it has seen none')
        scale, zero_point = self._solve(self.low, self.high)
        shape = (-1,) if self.qtype.ch_axis is not None else ()
        return scale.reshape(shape), zero_point.reshape(shape)

    def merge(self: Self, other: Self) -> None:
        """Adds what ``other``, built alike, has observed, so that this observer has seen the batches of both."""
        assert type(other) is type(self) and other.qtype == self.qtype
        if other.low is None or other.high is None:
            return
        if self.low is None or self.high is None:
            vars(self).update(copy.deepcopy(vars(other)))
            return
        self._merge(other)
        if self.first is None or other.first is None:
            self.batches += other.batches
        else:
            # a batch on the border of two shares is seen by both
            first, end = min(self.first, other.first), max(self.first + self.batches, other.first + other.batches)
            self.first, self.batches = first, end - first

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """Adds finite ``rows`` ``(R, N)`` with their ends ``(R,)``; sets :attr:`low` and :attr:`high`."""
        self.low = low if self.low is None else torch.minimum(self.low, low.to(self.low.device))
        self.high = high if self.high is None else torch.maximum(self.high, high.to(self.high.device))

    def _merge(self: Self, other: Self) -> None:
        """Adds the statistics of ``other``, which is of the same type and number of rows; both hold some."""
        assert other.low is not None and other.high is not None
        BaseObserver._update(self, other.low, other.low, other.high)

    def _solve(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(scale, zero_point)``, each of ``R`` elements, for the statistics with these ends."""
        return affine_from_range(low, high, self.qtype)

    def _rows(self, x: Tensor) -> Tensor:
        """Lays ``x`` out as ``(R, N)`` in float32, or in float64 if it is that already."""
        x = x if x.dtype == torch.float64 else x.float()
        axis = self.qtype.ch_axis
        if axis is None:
            return x.reshape(1, -1)
        if not -x.dim() <= axis < x.dim():
            raise ConfigError(f'expected ch_axis {axis} to be an axis of the tensor, but got {x.dim()} axes')
        return x.movedim(axis, 0).flatten(1) if x.dim() > 1 else x.reshape(-1, 1)


@OBSERVERS.register_module()
class MinMaxObserver(BaseObserver):
    """Covers every value seen: the range is the minimum and maximum over all batches."""


class SharedZeroPointObserver(MinMaxObserver):
    """Covers every value seen, with one zero-point for all channels."""

    def _solve(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return shared_affine_from_range(low, high, self.qtype)


@OBSERVERS.register_module()
class MovingAverageObserver(BaseObserver):
    """Averages the minimum and maximum of the batches: ``v = momentum * v + (1 - momentum) * batch``.

    The first batch sets the average (Jacob et al., CVPR 2018, section 3.1). Later batches count for more, so the
    result depends on their order; the ends of every batch are kept, so that what several processes have seen is
    averaged in the order in which one would have seen it.

    Args:
        qtype: The grid, per tensor or per channel.
        momentum: Weight of the past, at least 0 and below 1.
    """

    def __init__(self, qtype: QType, momentum: float = 0.9) -> None:
        check_number(momentum, '[0, 1)', 'momentum of MovingAverageObserver')
        super().__init__(qtype)
        self.momentum = momentum
        self._ends: list[tuple[Tensor, Tensor]] = []

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        self._ends.append((low, high))
        super()._update(rows, low, high)

    def _merge(self: Average, other: Average) -> None:
        assert self.low is not None
        count, shift = len(self._ends), len(self._ends)
        if self.first is not None and other.first is not None:
            shift = other.first - self.first
            expect(0 <= shift <= count, f'batches from {self.first} to {self.first + count} on to merge', other.first)
        for index, ends in enumerate(other._ends, shift):
            low, high = (end.to(self.low.device) for end in ends)
            if index < count:
                own = self._ends[index]
                self._ends[index] = torch.minimum(own[0], low), torch.maximum(own[1], high)
            else:
                self._ends.append((low, high))
        super()._merge(other)

    def _solve(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self._ends[0]
        for next_low, next_high in self._ends[1:]:
            low, high = torch.lerp(next_low, low, self.momentum), torch.lerp(next_high, high, self.momentum)
        return super()._solve(low, high)


def build_observer(cfg: Any, qtype: QType) -> BaseObserver:
    """Builds the observer that ``cfg`` names, for the grid ``qtype``; ConfigError if a type or an option is invalid."""
    return build(OBSERVERS, cfg, qtype=qtype)


def _ends(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every row, ``(R,)`` each; NaN where a row holds one."""
    if rows.shape[0] == 1:
        # Many times as fast on a CPU as the reduction along an axis.
        low, high = torch.aminmax(rows)
        return low.reshape(1), high.reshape(1)
    return rows.amin(dim=1), rows.amax(dim=1)
