"""Schedules map the elapsed fraction of a training, in [0, 1), to a value; a plateau ends a training early."""

from __future__ import annotations

import math


def linear_beta(t: float, start: float, end: float, warmup: float) -> float | None:
    """Returns the exponent of AdaRound's regulariser: None during the warm-up, then linear from ``start`` to ``end``.

    Args:
        t: Elapsed fraction of the training.
        start: Exponent after the warm-up; a high one lets variables near 1/2 move freely.
        end: Exponent at the end; 2 pulls every variable to 0 or 1.
        warmup: Fraction of the training without regulariser, in [0, 1).

    Example:
        >>> [linear_beta(t, 20.0, 2.0, warmup=0.2) for t in (0.1, 0.2, 0.6)]
        [None, 20.0, 11.0]
    """
    progress = min(1.0, (t - warmup) / (1 - warmup))
    return None if t < warmup else end + (start - end) * (1 - progress)


def cosine(t: float) -> float:
    """Returns the factor of a learning rate that falls from 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, t)))


def constant(t: float) -> float:
    """Returns 1: the learning rate does not change."""
    return 1.0


class Plateau:
    """Watches a loss that should fall.

    Args:
        fraction: By how much of the best so far a loss must be below it; 0 never ends a training.

    Example:
        >>> plateau = Plateau(0.1)
        >>> [plateau.reached(loss) for loss in (1.0, 0.8, 0.75)]
        [False, False, True]
    """

    def __init__(self, fraction: float) -> None:
        self.fraction, self.best = fraction, math.inf

    def reached(self, loss: float) -> bool:
        """Returns whether ``loss``, the next one, is not below the best so far by the fraction."""
        reached = self.fraction > 0 and loss > (1 - self.fraction) * self.best
        self.best = min(self.best, loss)
        return reached
