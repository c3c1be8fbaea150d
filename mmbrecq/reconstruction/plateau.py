"""When a training may stop early."""

from __future__ import annotations

import math


class Plateau:
    """Watches a loss that should fall.

    Args:
        fraction: By how much of the best so far a loss must be below it; 0 for no end.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction, self.best = fraction, math.inf

    def reached(self, loss: float) -> bool:
        """Whether ``loss``, the next one, is not below the best so far by the fraction."""
        reached = self.fraction > 0 and loss > (1 - self.fraction) * self.best
        self.best = min(self.best, loss)
        return reached
