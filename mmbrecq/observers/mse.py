"""Observer that minimises the quantization error."""

from __future__ import annotations

from torch import Tensor

from mmbrecq.errors import ConfigError
from mmbrecq.observers.distribution import DistributionObserver
from mmbrecq.observers.search import mse_search
from mmbrecq.qtype import QType
from mmbrecq.registry import OBSERVERS


@OBSERVERS.register_module()
class MSEObserver(DistributionObserver):
    """Chooses the scale and zero-point with the least ``sum |x - q(x)|^p``; see :func:`mse_search`.

    Args:
        qtype: The grid, per tensor or (for a single batch, as a weight is) per channel.
        p: Exponent of the error, above 0; BRECQ uses 2.4.
        steps: Number of linear steps by which the range shrinks to a fifth, at least 1.
        bins: Number of bins of the histogram that many batches go into, at least 2,048.
    """

    def __init__(self, qtype: QType, p: float = 2.4, steps: int = 80, bins: int = 8192) -> None:
        if not p > 0:
            raise ConfigError(f'expected p of MSEObserver to be above 0, but got {p!r}')
        if not isinstance(steps, int) or steps < 1:
            raise ConfigError(f'expected steps of MSEObserver to be an integer of at least 1, but got {steps!r}')
        super().__init__(qtype, bins)
        self.p, self.steps = p, steps

    def _solve_values(self, values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return mse_search(values, low, high, self.qtype, self.p, self.steps)

    def _solve_histogram(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        filled = self.histogram.counts.nonzero().squeeze(1)
        centers = self.histogram.centers(low.dtype)[filled]
        counts = self.histogram.counts[filled].to(low.dtype)
        return mse_search(centers[None], low, high, self.qtype, self.p, self.steps, counts[None])
