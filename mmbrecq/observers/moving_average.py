"""Moving average of minima and maxima."""

from __future__ import annotations

import torch
from torch import Tensor

from mmbrecq.errors import ConfigError
from mmbrecq.functional import affine_from_range
from mmbrecq.observers.base import BaseObserver
from mmbrecq.qtype import QType
from mmbrecq.registry import OBSERVERS


@OBSERVERS.register_module()
class MovingAverageObserver(BaseObserver):
    """Averages the minimum and maximum of the batches: ``v = momentum * v + (1 - momentum) * batch``.

    The first batch sets the average (Jacob et al., CVPR 2018, section 3.1). Later batches count for more, so the
    result depends on their order; merged observers average their ends by their numbers of batches.

    Args:
        qtype: The grid, per tensor or per channel.
        momentum: Weight of the past, at least 0 and below 1.
    """

    def __init__(self, qtype: QType, momentum: float = 0.9) -> None:
        if not 0 <= momentum < 1:
            raise ConfigError(f'expected momentum of MovingAverageObserver in [0, 1), but got {momentum!r}')
        super().__init__(qtype)
        self.momentum = momentum

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        self.low = low if self.low is None else torch.lerp(low, self.low, self.momentum)
        self.high = high if self.high is None else torch.lerp(high, self.high, self.momentum)

    def _solve(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return affine_from_range(low, high, self.qtype)

    def _merge(self, other: BaseObserver) -> None:
        assert self.low is not None and self.high is not None and other.low is not None and other.high is not None
        share = other.batches / (self.batches + other.batches)
        self.low = torch.lerp(self.low, other.low.to(self.low.device), share)
        self.high = torch.lerp(self.high, other.high.to(self.high.device), share)
