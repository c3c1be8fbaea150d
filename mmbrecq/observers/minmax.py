"""Min-max observer."""

from __future__ import annotations

from torch import Tensor

from mmbrecq.functional import affine_from_range
from mmbrecq.observers.base import BaseObserver
from mmbrecq.registry import OBSERVERS


@OBSERVERS.register_module()
class MinMaxObserver(BaseObserver):
    """Covers every value seen: the range is the minimum and maximum over all batches.

    Args:
        qtype: The grid, per tensor or per channel.
    """

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        self._widen(low, high)

    def _solve(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return affine_from_range(low, high, self.qtype)

    def _merge(self, other: BaseObserver) -> None:
        assert other.low is not None and other.high is not None
        self._widen(other.low, other.high)
