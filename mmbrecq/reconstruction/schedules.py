"""Schedules are plain callables from a fraction of the training, in [0, 1), to a value."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearBeta:
    """Exponent of AdaRound's regulariser: none during the warm-up, then linear from ``start`` to ``end``.

    Args:
        start: Exponent after the warm-up; a high one lets variables near 1/2 move freely.
        end: Exponent at the end; 2 pulls every variable to 0 or 1.
        warmup: Fraction of the training without regulariser, in [0, 1).
    """

    start: float = 20.0
    end: float = 2.0
    warmup: float = 0.2

    def __call__(self, t: float) -> float | None:
        if t < self.warmup:
            return None
        progress = min(1.0, (t - self.warmup) / (1 - self.warmup))
        return self.end + (self.start - self.end) * (1 - progress)


def cosine(t: float) -> float:
    """Factor of a learning rate that falls from 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, t)))


def constant(t: float) -> float:
    """Factor 1 throughout."""
    return 1.0
