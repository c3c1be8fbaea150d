"""Callbacks observe a reconstruction, and are told how far it has come and how long it will take."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmbrecq.calibration.regions import REGIONS_PER_IMAGE
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.mixed_precision.costs.models import LayerShape, layer_shapes
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.reconstruction.stages import Stage, stage_units

OVERHEAD = {'cpu': 1e7, 'cuda': 1e10}
"""Multiplications that would take as long as the Python and the launches of an iteration."""


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
    """Base of the callbacks of a reconstruction; every method does nothing.

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


EVENTS = tuple(name for name in vars(Callback) if not name.startswith('_'))


class Callbacks(Callback):
    """Several callbacks as one, called in their order."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = tuple(callbacks)
        for event in EVENTS:
            setattr(self, event, partial(self._call, event))

    def _call(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*arguments)


class Forecast:
    """Estimates the time that is left from the work of every unit, in multiplications, and the time of those done.

    A ``share`` of the images passes through the network behind a unit, too.
    """

    def __init__(self, model: QuantizedModel, stages: Iterable[Stage], share: float = 0.0) -> None:
        macs = {shape.name: _macs(shape) for shape in layer_shapes(model)}
        overhead = OVERHEAD.get(model.image_graph.traced.example.device.type, OVERHEAD['cuda'])
        self._own: dict[tuple[str, str], float] = {}
        self._left: dict[tuple[str, str], float] = {}
        for stage in stages:
            if stage.name == 'activations' and not model.quantizes_activations:
                continue
            for part in model.graphs:
                behind = 0.0
                for unit in reversed(stage_units(part, stage)):
                    work = _work(stage, unit, macs, 0.0)
                    if unit.is_quantized:
                        self._own[stage.name, unit.name] = _work(stage, unit, macs, overhead)
                        self._left[stage.name, unit.name] = self._own[stage.name, unit.name] + share * behind
                    behind += work
        self._work = self._seconds = 0.0
        self._names: list[str] = []
        self._count = 0

    def begin(self, units: Iterable[ReconstructionUnit], stage: Stage) -> Progress:
        """Begins a pass over units, and returns its progress."""
        self._count = sum(unit.is_quantized for unit in units)
        return Progress(self._names.count(stage.name), self._count, self.left())

    def note(self, result: UnitResult) -> Progress:
        """Counts a unit that is done, and returns the progress of its pass."""
        self._work += self._left.pop((result.stage, result.name), 0.0)
        self._seconds += result.seconds
        self._names.append(result.stage)
        return Progress(self._names.count(result.stage), self._count, self.left())

    def left(self) -> float | None:
        """Returns the seconds that the units not done will take; None while none is done."""
        return self._seconds / self._work * sum(self._left.values()) if self._work else None

    def total(self, stage: Stage, unit: ReconstructionUnit, seconds: float) -> float:
        """Returns the seconds that all units will take, where this one takes ``seconds`` without what is behind it."""
        return seconds / self._own[stage.name, unit.name] * sum(self._left.values())


def _macs(shape: LayerShape) -> float:
    """Returns multiplications of one image in an iteration, which looks at a draw of the regions of an image."""
    return sum(shape.macs * min(call.times, REGIONS_PER_IMAGE) / call.times for call in shape.calls[:1])


def _work(stage: Stage, unit: ReconstructionUnit, macs: dict[str, float], overhead: float) -> float:
    images = stage.options.batch_size * sum(macs.get(name, 0.0) for name in unit.layers)
    return stage.options.iterations * (images + overhead)
