"""Callbacks observe a reconstruction: they are told what happens, and change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.reconstruction.stages import Stage


@dataclass(frozen=True)
class Progress:
    """How far a pass over all units has come.

    Args:
        done: Units of the pass that are done, those of an interrupted run included.
        count: Units of the pass.
        seconds_left: Seconds that all units left will take, those of later passes included; None where it is unknown.
    """

    done: int
    count: int
    seconds_left: float | None = None


class Callback:
    """Base of the callbacks of a reconstruction; every point does nothing.

    Example:
        >>> class Names(Callback):
        ...     def after_unit(self, stage, unit, result, progress):
        ...         print(f'{unit.name}: {progress.done} of {progress.count}')
    """

    def before_stage(self, stage: Stage, units: Sequence[ReconstructionUnit], progress: Progress) -> None:
        """Is called before a pass over all units."""

    def before_unit(self, stage: Stage, unit: ReconstructionUnit) -> None:
        """Is called before a unit is optimised."""

    def after_step(self, stage: Stage, unit: ReconstructionUnit, step: int, loss: float) -> None:
        """Is called after every hundredth iteration; ``loss`` is the mean since the last call."""

    def after_unit(self, stage: Stage, unit: ReconstructionUnit, result: UnitResult, progress: Progress) -> None:
        """Is called after a unit is done and its outputs are handed on."""

    def after_stage(self, stage: Stage) -> None:
        """Is called after a pass over all units."""


class Callbacks(Callback):
    """Several callbacks as one, called in their order."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = tuple(callbacks)

    def before_stage(self, stage: Stage, units: Sequence[ReconstructionUnit], progress: Progress) -> None:
        for callback in self.callbacks:
            callback.before_stage(stage, units, progress)

    def before_unit(self, stage: Stage, unit: ReconstructionUnit) -> None:
        for callback in self.callbacks:
            callback.before_unit(stage, unit)

    def after_step(self, stage: Stage, unit: ReconstructionUnit, step: int, loss: float) -> None:
        for callback in self.callbacks:
            callback.after_step(stage, unit, step, loss)

    def after_unit(self, stage: Stage, unit: ReconstructionUnit, result: UnitResult, progress: Progress) -> None:
        for callback in self.callbacks:
            callback.after_unit(stage, unit, result, progress)

    def after_stage(self, stage: Stage) -> None:
        for callback in self.callbacks:
            callback.after_stage(stage)
