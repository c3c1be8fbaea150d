"""How long a reconstruction will take, from what its first units have taken."""

from __future__ import annotations

from collections.abc import Iterable

from mmbrecq.calibration.regions import REGIONS_PER_IMAGE
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.mixed_precision.costs.layers import LayerShape, layer_shapes
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.reconstruction.stages import Stage, stage_units

OVERHEAD = {'cpu': 1e7, 'cuda': 1e10}
"""Multiplications that would take as long as the Python and the launches of a step."""


class Forecast:
    """The work of every unit in multiplications; seconds for each are those of the units that are done.

    Args:
        model: The prepared model.
        stages: The passes over its units.
    """

    def __init__(self, model: QuantizedModel, stages: Iterable[Stage]) -> None:
        macs = {shape.name: _macs(shape) for shape in layer_shapes(model)}
        overhead = OVERHEAD.get(model.image_graph.traced.example.device.type, OVERHEAD['cuda'])
        self._left = {
            (stage.name, unit.name): _work(stage, unit, macs, overhead)
            for stage in stages
            if stage.name != 'activations' or model.quantizes_activations
            for part in model.graphs
            for unit in stage_units(part, stage)
            if unit.is_quantized
        }
        self._done = self._seconds = 0.0

    def note(self, result: UnitResult) -> None:
        """Takes in a unit that is done."""
        self._done += self._left.pop((result.stage, result.name), 0.0)
        self._seconds += result.seconds

    def left(self) -> float | None:
        """Seconds that the units not done will take; None while none is done."""
        return self._seconds / self._done * sum(self._left.values()) if self._done else None

    def total(self, stage: Stage, unit: ReconstructionUnit, seconds: float) -> float:
        """Seconds that all units will take, where this one takes so many."""
        return seconds / self._left[stage.name, unit.name] * sum(self._left.values())


def _macs(shape: LayerShape) -> float:
    """Multiplications for one image of a training step, which looks at a draw of the regions of an image."""
    return sum(shape.macs * min(call.times, REGIONS_PER_IMAGE) / call.times for call in shape.calls[:1])


def _work(stage: Stage, unit: ReconstructionUnit, macs: dict[str, float], overhead: float) -> float:
    images = stage.options.batch_size * sum(macs.get(name, 0.0) for name in unit.layers)
    return stage.options.iterations * (images + overhead)
