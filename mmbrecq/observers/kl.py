"""Observer that minimises the divergence of the quantized distribution."""

from __future__ import annotations

from torch import Tensor

from mmbrecq.errors import ConfigError
from mmbrecq.observers.distribution import DistributionObserver
from mmbrecq.observers.divergence import fill_zero_bin, kl_search
from mmbrecq.qtype import QType
from mmbrecq.registry import OBSERVERS


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
        if qtype.ch_axis is not None:
            raise ConfigError(f'expected one scale per tensor for HistogramObserver, but got ch_axis {qtype.ch_axis}')
        if not isinstance(steps, int) or steps < 1:
            raise ConfigError(f'expected steps of HistogramObserver to be an integer of at least 1, but got {steps!r}')
        super().__init__(qtype, bins)
        self.steps = steps

    def _solve_values(self, values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self._solve_histogram(low, high)

    def _solve_histogram(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        histogram = self.histogram
        counts = fill_zero_bin(histogram.counts.to(low.dtype), histogram.zero_bin)
        centers = histogram.centers(low.dtype)
        return kl_search(centers, counts, low[0], high[0], histogram.width, self.qtype, self.steps)
