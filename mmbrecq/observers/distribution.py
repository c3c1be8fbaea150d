"""Base of the observers that need to know how the values are distributed."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmbrecq.errors import ConfigError
from mmbrecq.observers.base import BaseObserver
from mmbrecq.observers.histogram import StreamingHistogram
from mmbrecq.qtype import QType

Self = TypeVar('Self', bound='DistributionObserver')


class DistributionObserver(BaseObserver):
    """Keeps the values of a single batch, and a streaming histogram of many.

    A weight is one tensor, seen once: its values are kept (as a copy) and searched exactly. Activations come in many
    batches: per tensor they go into a :class:`StreamingHistogram`, and the copy is dropped with the second batch.
    Per channel only one batch is accepted, since a histogram per channel would cost more than it is worth.

    Args:
        qtype: The grid.
        bins: Number of bins of the histogram, at least 2,048.
    """

    #: Largest batch whose values are kept per tensor; bounds the memory while the first batch visits all layers.
    MAX_KEPT = 2**20

    def __init__(self, qtype: QType, bins: int = 8192) -> None:
        self.bins = bins
        super().__init__(qtype)

    def reset(self) -> None:
        """Forgets everything observed."""
        super().reset()
        self.values: Tensor | None = None
        self.histogram = StreamingHistogram(self.bins)

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        if self.qtype.ch_axis is None:
            self.histogram.add(rows, float(low), float(high))
        elif self.batches > 0:
            raise ConfigError(self._refusal())
        keep = self.batches == 0 and (self.qtype.ch_axis is not None or rows.numel() <= self.MAX_KEPT)
        self.values = rows.clone() if keep else None
        self._widen(low, high)

    def _merge(self: Self, other: Self) -> None:
        if self.qtype.ch_axis is not None:
            raise ConfigError(self._refusal())
        assert other.low is not None and other.high is not None
        self.histogram.merge(other.histogram)
        self.values = self._values_of_one_batch(other)
        self._widen(other.low, other.high)

    def _values_of_one_batch(self: Self, other: Self) -> Tensor | None:
        """The values of a single batch of which two processes have seen a part each."""
        same = self.first is not None and self.first == other.first and self.batches == other.batches == 1
        if not same or self.values is None or other.values is None:
            return None
        # in the order of the processes, which is that of the images
        values = torch.cat([self.values, other.values.to(self.values.device)], dim=1)
        return values if values.numel() <= self.MAX_KEPT else None

    def _refusal(self) -> str:
        return (
            f'expected a single batch for {type(self).__name__} with one scale per channel, but got another; '
            'use MinMaxObserver or MovingAverageObserver, or one scale per tensor'
        )

    def state(self) -> dict[str, Any]:
        """Returns the statistics, see :meth:`BaseObserver.state`."""
        return {**super().state(), 'values': self.values, 'histogram': self.histogram.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` of an observer with the same options gave."""
        super().load_state(state)
        self.values = state['values']
        self.histogram.load_state(state['histogram'])

    def _solve(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.values is not None:
            return self._solve_values(self.values, low, high)
        return self._solve_histogram(low, high)

    @abstractmethod
    def _solve_values(self, values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(scale, zero_point)`` for ``values`` ``(R, N)`` with ends ``(R,)``."""

    @abstractmethod
    def _solve_histogram(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(scale, zero_point)`` for :attr:`histogram`, whose values have the ends ``(1,)``."""
