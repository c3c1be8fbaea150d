"""Percentile observer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmbrecq.errors import ConfigError
from mmbrecq.functional import affine_from_range
from mmbrecq.observers.distribution import DistributionObserver
from mmbrecq.qtype import QType
from mmbrecq.registry import OBSERVERS


@OBSERVERS.register_module()
class PercentileObserver(DistributionObserver):
    """Covers the values between two percentiles, ``100 - percentile`` and ``percentile``, linear between values.

    Args:
        qtype: The grid, per tensor or (for a single batch) per channel.
        percentile: Upper percentile, above 50, at most 100.
        bins: Number of bins of the histogram that many batches go into, at least 2,048.
    """

    def __init__(self, qtype: QType, percentile: float = 99.99, bins: int = 8192) -> None:
        if not 50 < percentile <= 100:
            raise ConfigError(f'expected percentile of PercentileObserver in (50, 100], but got {percentile!r}')
        super().__init__(qtype, bins)
        self.percentile = percentile

    def _solve_values(self, values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        ordered = values.sort(dim=1).values
        ends = (_at_percentile(ordered, 100 - self.percentile), _at_percentile(ordered, self.percentile))
        return affine_from_range(*ends, self.qtype)

    def _solve_histogram(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        bottom = self.histogram.percentile(100 - self.percentile)
        top = self.histogram.percentile(self.percentile)
        return affine_from_range(torch.full_like(low, bottom), torch.full_like(high, top), self.qtype)


def _at_percentile(ordered: Tensor, q: float) -> Tensor:
    """``q``-th percentile of rising rows ``(R, N)``, linear between values; ``(R,)``."""
    # torch.quantile refuses more than 16 million values.
    rank = q / 100 * (ordered.shape[1] - 1)
    below, above = math.floor(rank), math.ceil(rank)
    return torch.lerp(ordered[:, below], ordered[:, above], rank - below)
