"""Schedules map the elapsed fraction of a training, in [0, 1), to a value."""

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
