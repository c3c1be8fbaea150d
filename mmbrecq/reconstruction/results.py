"""What a reconstruction reports of a unit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmbrecq.reconstruction.unit_state import UnitState


@dataclass(frozen=True)
class UnitResult:
    """Outcome of one unit in one stage.

    Args:
        name: Of the unit.
        stage: Of the stage.
        layers: Paths of its quantized layers.
        loss_before: Loss over all calibration images before the stage: nearest rounding, observed step sizes.
        loss_after: Loss with what the stage learned.
        iterations: Steps taken.
        seconds: Wall time, caching included.
        kept_nearest: The learned state was worse than the one before and was dropped.
        power: Loss of an output of zeros: what both losses are relative to.
        images_at_once: For how many images the GPU had room, where that is less than a batch.
    """

    name: str
    stage: str
    layers: tuple[str, ...]
    loss_before: float
    loss_after: float
    iterations: int
    seconds: float
    kept_nearest: bool
    power: float = math.nan
    images_at_once: int | None = None

    @property
    def relative_losses(self) -> tuple[float, float]:
        """Both losses over the power of the output; NaN where it has none."""
        power = self.power if self.power > 0 else math.nan
        return self.loss_before / power, self.loss_after / power


@dataclass(frozen=True)
class FinishedUnit:
    """A unit that an earlier run has reconstructed.

    Args:
        result: What was reported of it.
        state: What it has learned.
    """

    result: UnitResult
    state: UnitState
