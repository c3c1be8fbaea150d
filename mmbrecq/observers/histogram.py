"""A histogram that grows with its data, and the observers that need to know how values are distributed."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from mmbrecq.building import check_integer, check_number, expect
from mmbrecq.errors import ConfigError
from mmbrecq.functional import affine_from_range, quantize
from mmbrecq.observers.base import BaseObserver
from mmbrecq.qtype import QType
from mmbrecq.registry import OBSERVERS

MIN_BINS = 2048
# Keeps 2**exponent and its inverse within float32's normal numbers.
MIN_EXPONENT = -120
MAX_SHIFT = 62
# Values counted at once, so that the temporaries stay small: less than half the time for a large batch on a CPU.
CHUNK = 2**20


class StreamingHistogram:
    """Counts of values in bins whose width is a power of two and whose edges are multiples of it.

    When the range grows, pairs of bins become one: the counts are then exactly those which the wider bins would have
    counted from the start. So the result depends on the values alone, not on their order or on how they were split
    into batches or among processes.

    Args:
        bins: Number of bins, at least 2,048; between half and all of them span ``[min(low, 0), max(high, 0)]``.

    Attributes:
        low (float): Smallest value so far; infinity before the first.
        high (float): Largest value so far; minus infinity before the first.
        exponent (int): The bins are ``2**exponent`` wide.
        start (int): The first bin begins at ``start * 2**exponent``.
        counts (Tensor): ``(bins,)`` int64, on the device of the values.
    """

    def __init__(self, bins: int = 8192) -> None:
        check_integer(bins, MIN_BINS, 'bins')
        self.bins = bins
        self.low, self.high = math.inf, -math.inf
        self.exponent, self.start = MIN_EXPONENT, 0
        self.counts = torch.zeros(bins, dtype=torch.int64)

    @property
    def width(self) -> float:
        """Width of a bin, in the unit of the values."""
        return math.ldexp(1.0, self.exponent)

    @property
    def zero_bin(self) -> int:
        """Index of the bin that begins at 0."""
        return -self.start

    def add(self, x: Tensor, low: float, high: float) -> None:
        """Counts every value of ``x``, finite floats of any shape between ``low`` and ``high``."""
        self.counts = self.counts.to(x.device)
        self._cover(low, high)
        for chunk in torch.split(x.reshape(-1), CHUNK):
            # Division by a power of two is exact, so a value's bin is the same in every batch.
            index = (chunk / self.width).floor_().sub_(self.start).to(torch.int32)
            self.counts += torch.bincount(index, minlength=self.bins)

    def merge(self, other: StreamingHistogram) -> None:
        """Adds the counts of ``other``, which has as many bins, exactly."""
        assert other.bins == self.bins
        self._cover(other.low, other.high)
        counts = _regrid(other.counts, other.start, other.exponent, self.start, self.exponent)
        self.counts = self.counts.to(counts.device) + counts

    def centers(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the middle of every bin, kept within the observed values; ``(bins,)``."""
        index = torch.arange(self.start, self.start + self.bins, device=self.counts.device)
        return ((index.to(dtype) + 0.5) * self.width).clamp(self.low, self.high)

    def percentile(self, q: float) -> float:
        """Returns the ``q``-th percentile (0 to 100), linear between values, to within a bin's width."""
        total = self.counts.cumsum(0)
        rank = q / 100 * (int(total[-1]) - 1)
        index = int(torch.searchsorted(total, torch.tensor(math.floor(rank), device=total.device), right=True))
        before = int(total[index - 1]) if index else 0
        inside = (rank - before + 0.5) / int(self.counts[index])
        value = (self.start + index + inside) * self.width
        return min(max(value, self.low), self.high)

    def _cover(self, low: float, high: float) -> None:
        """Widens the bins by the least power of two that spans ``low``, ``high``, 0 and all earlier values."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        bottom, top = min(self.low, 0.0), max(self.high, 0.0)
        exponent = MIN_EXPONENT
        if top > bottom:
            exponent = max(exponent, math.frexp((top - bottom) / self.bins)[1] - 1)
        while _bin(top, exponent) - _bin(bottom, exponent) >= self.bins:
            exponent += 1
        start = _bin(bottom, exponent)
        if (start, exponent) != (self.start, self.exponent):
            self.counts = _regrid(self.counts, self.start, self.exponent, start, exponent)
            self.start, self.exponent = start, exponent


def _bin(value: float, exponent: int) -> int:
    """Returns the index of the bin of width ``2**exponent`` that holds ``value``."""
    return math.floor(math.ldexp(value, -exponent))


def _regrid(counts: Tensor, start: int, exponent: int, new_start: int, new_exponent: int) -> Tensor:
    """Moves ``counts`` to a grid that is as wide or wider and spans all bins that are not empty."""
    held = counts.nonzero().squeeze(1)
    index = (held + start) >> min(new_exponent - exponent, MAX_SHIFT)
    return torch.zeros_like(counts).index_add_(0, index - new_start, counts[held])


Self = TypeVar('Self', bound='DistributionObserver')


class DistributionObserver(BaseObserver):
    """Base of the observers that need the distribution: the values of a single batch, a histogram of many.

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
        super().__init__(qtype)
        self.values: Tensor | None = None
        self.histogram = StreamingHistogram(bins)

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        if self.qtype.ch_axis is None:
            self.histogram.add(rows, float(low), float(high))
        else:
            self._refuse_channels(self.batches > 0)
        keep = self.batches == 0 and (self.qtype.ch_axis is not None or rows.numel() <= self.MAX_KEPT)
        self.values = rows.clone() if keep else None
        super()._update(rows, low, high)

    def _merge(self: Self, other: Self) -> None:
        self._refuse_channels(self.qtype.ch_axis is not None)
        self.histogram.merge(other.histogram)
        # of a single batch of which two processes have seen a part each
        same = self.first is not None and self.first == other.first and self.batches == other.batches == 1
        values = None
        if same and self.values is not None and other.values is not None:
            # in the order of the processes, which is that of the images
            values = torch.cat([self.values, other.values.to(self.values.device)], dim=1)
        self.values = values if values is not None and values.numel() <= self.MAX_KEPT else None
        super()._merge(other)

    def _refuse_channels(self, another: bool) -> None:
        if another:
            raise ConfigError(
                f'expected a single batch for {type(self).__name__} with one scale per channel, but got another; '
                'use MinMaxObserver or MovingAverageObserver, or one scale per tensor'
            )


@OBSERVERS.register_module()
class PercentileObserver(DistributionObserver):
    """Covers the values between two percentiles, ``100 - percentile`` and ``percentile``, linear between values.

    Args:
        qtype: The grid, per tensor or (for a single batch) per channel.
        percentile: Upper percentile, above 50, at most 100.
        bins: Number of bins of the histogram that many batches go into, at least 2,048.
    """

    def __init__(self, qtype: QType, percentile: float = 99.99, bins: int = 8192) -> None:
        check_number(percentile, '(50, 100]', 'percentile of PercentileObserver')
        super().__init__(qtype, bins)
        self.percentile = percentile

    def _solve(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        percentiles = (100 - self.percentile, self.percentile)
        if self.values is None:
            ends = [torch.full_like(low, self.histogram.percentile(q)) for q in percentiles]
        else:
            ordered = self.values.sort(dim=1).values
            ends = [_at_percentile(ordered, q) for q in percentiles]
        return affine_from_range(ends[0], ends[1], self.qtype)


def _at_percentile(ordered: Tensor, q: float) -> Tensor:
    """``q``-th percentile of rising rows ``(R, N)``, linear between values; ``(R,)``."""
    # torch.quantile refuses more than 16 million values.
    rank = q / 100 * (ordered.shape[1] - 1)
    below, above = math.floor(rank), math.ceil(rank)
    return torch.lerp(ordered[:, below], ordered[:, above], rank - below)


# Stands for an empty bin of the candidate distribution, whose logarithm would be infinite.
EMPTY = 1e-12


def fill_zero_bin(counts: Tensor, zero_bin: int) -> Tensor:
    """Replaces the bin that begins at 0 by the larger of its neighbours.

    The zeros that ReLU makes are exact on every grid; left in, their spike would decide the range alone (NVIDIA's
    entropy calibrator sets ``bin[0] = bin[1]`` for this reason).
    """
    neighbours = [counts[i] for i in (zero_bin - 1, zero_bin + 1) if 0 <= i < counts.numel()]
    filled = counts.clone()
    filled[zero_bin] = torch.stack(neighbours).amax()
    return filled


def kl_divergence(counts: Tensor, levels: Tensor, inside: Tensor) -> Tensor:
    """``KL(P || Q)`` of one candidate range (Migacz, 8-bit inference with TensorRT, GTC 2017).

    P holds the bins inside the range, the outliers added to its end bins; Q spreads what each level holds evenly
    over the bins of that level in which P is not empty.

    Args:
        counts (Tensor): ``(K,)`` counts, not negative.
        levels (Tensor): ``(K,)`` int64, level of every bin, from 0.
        inside (Tensor): ``(K,)`` bool, one contiguous run; the divergence is infinite when no value lies inside.
    """
    held = counts[inside]
    if held.sum() == 0:
        return torch.full_like(counts.sum(), torch.inf)
    first = int(inside.to(torch.int8).argmax())
    reference = held.clone()
    reference[0] += counts[:first].sum()
    reference[-1] += counts[first + held.numel() :].sum()
    filled = (reference > 0).to(counts.dtype)
    level = levels[inside]
    size = int(level.max()) + 1
    mass = torch.zeros(size, dtype=counts.dtype, device=counts.device).index_add_(0, level, held)
    share = torch.zeros_like(mass).index_add_(0, level, filled)
    candidate = (mass / share.clamp(min=1))[level] * filled
    reference = reference / reference.sum()
    candidate = (candidate / candidate.sum()).clamp(min=EMPTY)
    return (reference * torch.log(reference.clamp(min=EMPTY) / candidate)).sum()


def kl_search(
    centers: Tensor, counts: Tensor, low: Tensor, high: Tensor, width: float, qtype: QType, steps: int = 128
) -> tuple[Tensor, Tensor]:
    """Finds the scale and zero-point of the range with the least divergence.

    The candidates are ``[low, high]`` times ``1 - i / steps``, symmetric about 0 for symmetric signed grids, as far
    as a level is no narrower than a bin. ``low`` and ``high`` are the ends of the values; like the results they are
    ``()``.

    ``centers`` are the middles of the bins of this ``width``, rising, and ``counts`` their counts in a float dtype;
    both are ``(K,)``.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if qtype.symmetric and qtype.signed:
        high = torch.maximum(-low, high)
        low = -high
    best = affine_from_range(low, high, qtype)
    least = torch.full_like(counts.sum(), torch.inf)
    for i in range(steps):
        bottom, top = low * (1 - i / steps), high * (1 - i / steps)
        scale, zero_point = affine_from_range(bottom, top, qtype)
        if i > 0 and scale < width:
            break
        levels = (quantize(centers, scale, zero_point, qtype) - qtype.quant_min).long()
        loss = kl_divergence(counts, levels, (centers >= bottom) & (centers <= top))
        if loss < least:
            least, best = loss, (scale, zero_point)
    return best


@OBSERVERS.register_module()
class HistogramObserver(DistributionObserver):
    """Chooses the range whose quantized histogram has the least KL divergence; see :func:`kl_search`.

    Args:
        qtype: The grid, per tensor.
        bins: Number of bins of the histogram, at least 2,048; 4,096 over both signs are TensorRT's 2,048 over ``|x|``.
        steps: Number of candidate ranges, at least 1.
    """

    #: The divergence is defined on bins, so a copy of the values would not be read.
    MAX_KEPT = 0

    def __init__(self, qtype: QType, bins: int = 4096, steps: int = 128) -> None:
        expect(qtype.ch_axis is None, 'one scale per tensor, ch_axis None, for HistogramObserver', qtype.ch_axis)
        check_integer(steps, 1, 'steps of HistogramObserver')
        super().__init__(qtype, bins)
        self.steps = steps

    def _solve(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        histogram = self.histogram
        counts = fill_zero_bin(histogram.counts.to(low.dtype), histogram.zero_bin)
        centers = histogram.centers(low.dtype)
        return kl_search(centers, counts, low[0], high[0], histogram.width, self.qtype, self.steps)
