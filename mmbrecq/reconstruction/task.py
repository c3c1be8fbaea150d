"""What a reconstruction works on."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmbrecq.calibration.regions import RegionCapture
from mmbrecq.data.groups import Images
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction.losses import TaskLoss
from mmbrecq.reconstruction.results import FinishedUnit


@dataclass
class Task:
    """What a reconstruction works on.

    Args:
        model: Prepared, with calibrated grids.
        images: Preprocessed calibration images, ``(N, 3, H, W)``, or groups of them.
        batches: Gives the calibration data with annotations again, in the order of ``images``.
        task_loss: The task loss through the model; only a Fisher-weighted loss needs it, which without it weighs by the
            distance of the outputs.
        seed: Seed of all random draws.
        directory: Where a cache on disk is written.
        done: Pass and name of the units that are reconstructed already, their state in the model: they are skipped.
        first: Number of the first image among those of all processes.
        resumed: By pass and name, the units that an interrupted run has done. Each gets its state when its turn comes,
            so that all that is computed in between meets the model as it was then.
        observed: Images that the interrupted run observed at once; None for as many as have room.
    """

    model: QuantizedModel
    images: Images
    batches: Callable[[], Iterable[Any]]
    task_loss: TaskLoss | None
    seed: int
    directory: Path
    done: frozenset[tuple[str, str]] = frozenset()
    first: int = 0
    resumed: Mapping[tuple[str, str], FinishedUnit] = field(default_factory=dict)
    observed: int | None = None

    @property
    def regions(self) -> RegionCapture:
        """Captures the inputs of the heads of a two-stage detector."""
        return RegionCapture(self.model, self.images, self.batches, self.seed, self.first)
