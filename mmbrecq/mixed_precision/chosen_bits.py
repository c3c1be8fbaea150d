"""Bits that a search has chosen, in a run: the rounding that its analysis has learned, and their measured loss."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mmbrecq.errors import ConfigError
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.mixed_precision.search.bits import SearchResult
from mmbrecq.mixed_precision.sensitivity.measure import FISHER, load_layers, output_loss, state_path
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction.stages import Stage, Task
from mmbrecq.schema import load_json


class ChosenBits:
    """Bits that a search has chosen, from its ``search.json``.

    With ``reuse`` the rounding that the analysis has learned is used; else every unit is reconstructed again.
    """

    def __init__(self, path: Path, reuse: bool) -> None:
        self.path, self.result = path, load_json(SearchResult, path, 'tools/search.py')
        self.reuse = reuse
        self._states = path.parent / self.result.states

    @property
    def needs_task_loss(self) -> bool:
        """Whether what was predicted is measured on annotated images."""
        return self.result.kind == FISHER

    def check_annotations(self, annotated: bool) -> None:
        """Raises ConfigError where what was predicted cannot be measured on the calibration images."""
        if self.needs_task_loss and not annotated:
            raise ConfigError(
                f'expected annotated calibration images for the {self.result.kind} of {self.path}, but they have none'
            )

    def obstacle(self, stage: Stage, inputs: Mapping[str, str]) -> str | None:
        """Says why a first pass, whose states depend on ``inputs``, cannot use what was learned; None where it can."""
        if not self.reuse:
            return 'search.reuse is False'
        if stage.quantizes_activations:
            return 'the reconstructor learns rounding and step sizes together'
        other = [key for key, value in inputs.items() if self.result.inputs.get(key) != value]
        return f'the analysis was of another {other[0]}' if other else None

    def check(self, model: QuantizedModel) -> None:
        """Raises ConfigError where the prepared model has other bits than were chosen: the config was edited."""
        bits = {layer.name: (layer.weight_bits, layer.activation_bits) for layer in model.layers}
        for name, wanted in self.result.bits.items():
            weight, activation = bits.get(name, (None, None))
            if weight != wanted or self.result.activation_bits.get(name, activation) != activation:
                raise ConfigError(
                    f"expected the bits of {self.path}, but layer '{name}' has others in the config: search again, or "
                    "take 'search' out of the config"
                )

    def load_rounding(self, task: Task, stage: Stage) -> Task:
        """Loads the rounding of the analysis into a task's model; units that have all of it are done in this pass."""
        units = load_rounding(task.model, self._states, self.result.bits)
        return replace(task, done=task.done | {(stage.name, unit) for unit in units})

    def measure(self, task: Task) -> float:
        """Measures the rise of the loss with all that was searched quantized, and everything else in float."""
        total = 0.0
        for part in task.model.graphs:
            layers = {name for name, _, _ in part.weights() if name in self.result.bits}
            read = part.read_quantizers()
            quantizers = {path for name in self.result.activation_bits for path in read.get(name, ())}
            if layers or quantizers:
                images = None if self.result.images is None else max(self.result.images - task.first, 0)
                total += output_loss(task, part, images, self.result.kind).of(layers, quantizers)
        return total


def load_rounding(model: QuantizedModel, states: Path, chosen: Mapping[str, int | None]) -> list[str]:
    """Loads the rounding that an analysis has learned at the chosen bits; returns the units that have all of it."""
    found = []
    for unit in (unit for graph in model.graphs for unit in graph.units):
        paths = _state_paths(unit, states, chosen)
        if paths and all(path.exists() for path in paths.values()):
            for layer, path in paths.items():
                load_layers(model.model, (layer,), path)
            found.append(unit.name)
    return found


def _state_paths(unit: ReconstructionUnit, states: Path, chosen: Mapping[str, int | None]) -> dict[str, Path]:
    """Returns the file of the state of every layer of a unit, at its bits; none where no bits were searched."""
    own = {name: chosen[name] for name in unit.layers if name in chosen}
    numbers = [bits for bits in own.values() if bits is not None]
    # a layer whose bits are fixed is in the states of all candidates, learned beside others of those bits
    return {
        name: state_path(states, unit.name, own.get(name) or max(numbers))
        for name in unit.layers
        if numbers and own.get(name, 0) is not None
    }
