"""Moving average of minima and maxima."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from mmbrecq.errors import ConfigError
from mmbrecq.functional import affine_from_range
from mmbrecq.observers.base import BaseObserver
from mmbrecq.qtype import QType
from mmbrecq.registry import OBSERVERS

Self = TypeVar('Self', bound='MovingAverageObserver')


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
        if not 0 <= momentum < 1:
            raise ConfigError(f'expected momentum of MovingAverageObserver in [0, 1), but got {momentum!r}')
        super().__init__(qtype)
        self.momentum = momentum

    def reset(self) -> None:
        """Forgets everything observed."""
        super().reset()
        self._ends: list[tuple[Tensor, Tensor]] = []

    def _update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        self._ends.append((low, high))
        self._average()

    def _average(self) -> None:
        self.low, self.high = self._ends[0]
        for low, high in self._ends[1:]:
            self.low = torch.lerp(low, self.low, self.momentum)
            self.high = torch.lerp(high, self.high, self.momentum)

    def _solve(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return affine_from_range(low, high, self.qtype)

    def _merge(self: Self, other: Self) -> None:
        assert self.low is not None
        device = self.low.device
        ends = [(low.to(device), high.to(device)) for low, high in other._ends]
        shift = len(self._ends)
        if self.first is not None and other.first is not None:
            shift = other.first - self.first
            if not 0 <= shift <= len(self._ends):
                raise ConfigError(
                    f'expected batches from {self.first} to {self.first + len(self._ends)} on to merge, '
                    f'but got those from {other.first} on'
                )
        shared = min(len(self._ends) - shift, len(ends))
        for index in range(shared):
            (low, high), (other_low, other_high) = self._ends[shift + index], ends[index]
            self._ends[shift + index] = torch.minimum(low, other_low), torch.maximum(high, other_high)
        self._ends += ends[shared:]
        self._average()

    def state(self) -> dict[str, Any]:
        """Returns the statistics, see :meth:`BaseObserver.state`."""
        return {**super().state(), 'ends': list(self._ends)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` of an observer with the same options gave."""
        super().load_state(state)
        self._ends = list(state['ends'])
