"""Measures the sensitivities of layers: reconstructs every unit at every number of bits, then measures layer by layer.

Li et al., ICLR 2021, section 3.4: the loss of a choice of bits is that of each layer alone, and within a block that of
two layers together at the fewest bits; more bits hardly interact. A loss is the distance of the network's outputs from
the float ones.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbrecq.calibration.calibrator import calibrate_activations, calibrate_regions
from mmbrecq.data.groups import Images, batches_of, joined
from mmbrecq.distributed import gather, mean_over
from mmbrecq.errors import CheckpointError, ConfigError
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.mixed_precision.costs.models import layer_shapes, other_bytes
from mmbrecq.mixed_precision.search.bits import SearchOptions
from mmbrecq.mixed_precision.sensitivity.table import SensitivityTable, value_groups
from mmbrecq.progress import track
from mmbrecq.qtype import MAX_BITS, MIN_BITS
from mmbrecq.quantizers.options import FLOAT
from mmbrecq.quantizers.quantized_model import QuantizedGraph, QuantizedModel
from mmbrecq.reconstruction.callbacks import Callback, Callbacks, Progress
from mmbrecq.reconstruction.losses import TaskLoss, visit_task_losses
from mmbrecq.reconstruction.reconstructor import BaseReconstructor
from mmbrecq.reconstruction.results import UnitResult, layer_owners
from mmbrecq.reconstruction.stages import Stage, Task
from mmbrecq.runs.identity import first_difference
from mmbrecq.runs.storage import save_atomic
from mmbrecq.schema import save_json

BATCH = 64
"""Images per pass."""
FISHER = 'Fisher-weighted error'
"""The kind of loss that the annotations of the images weigh."""


class OutputLoss:
    """Distance of the outputs of a graph from its float outputs, over given inputs.

    For scores of classes, one output ``(N, C)``, it is the mean divergence ``KL(float || quantized)`` of their softmax.
    For maps it is the sum over the outputs of the mean square of their errors, each over the mean square of the float
    output: scores and box offsets differ in scale. With ``squared_gradients`` it is what the task loss of an image
    rises by, to second order by the diagonal of the Fisher information: the mean over the images of
    ``0.5 * sum(gradient^2 * error^2)`` over all elements of all outputs.

    Args:
        graph: A prepared graph.
        inputs: ``(N, ...)`` images, or features of regions; of several processes each has its own.
        squared_gradients: Of the task loss at each output, of the output's shape, see :func:`squared_gradients`.
    """

    def __init__(
        self, graph: QuantizedGraph, inputs: Images, squared_gradients: Sequence[Images] | None = None
    ) -> None:
        self._graph, self._inputs = graph, inputs
        with graph.quantization(weights=False, activations=False):
            self._targets = list(self._outputs())
            # of several processes one may have no image
            outputs = self._targets[0] if self._targets else _flat(graph(torch.zeros_like(graph.traced.example[:1])))
        self.kind = 'divergence' if len(outputs) == 1 and outputs[0].dim() == 2 else 'distance'
        if squared_gradients is not None:
            self.kind = FISHER
            # one weight per element, batch by batch
            self._weights = [[weight[batch] for weight in squared_gradients] for batch in batches_of(inputs, BATCH)]
        own = [float(sum(batch[i].square().sum() for batch in self._targets)) for i in range(len(outputs))]
        self._power = [sum(parts) for parts in zip(*gather(own), strict=True)]

    def of(self, layers: Collection[str], quantizers: Collection[str] = ()) -> float:
        """The loss with the weights of ``layers`` and activations of ``quantizers`` quantized, all else in float."""
        with self._graph.quantization(layers, quantizers):
            total = sum(self._batch_loss(outputs, index) for index, outputs in enumerate(self._outputs()))
        return sum(gather(total)) if self.kind == 'distance' else mean_over(total, len(self._inputs))

    def _batch_loss(self, outputs: Sequence[Tensor], index: int) -> float:
        targets = self._targets[index]
        if self.kind == FISHER:
            rows = zip(outputs, targets, self._weights[index], strict=True)
            return 0.5 * sum(float(((o - t).square() * weight).sum(dtype=torch.float64)) for o, t, weight in rows)
        if self.kind == 'divergence':
            wanted, found = F.log_softmax(targets[0].double(), 1), F.log_softmax(outputs[0].double(), 1)
            return float(F.kl_div(found, wanted, reduction='sum', log_target=True))
        errors = [float((o - t).square().sum()) for o, t in zip(outputs, targets, strict=True)]
        return sum(error / max(power, 1e-12) for error, power in zip(errors, self._power, strict=True))

    @torch.no_grad()
    def _outputs(self) -> Iterator[list[Tensor]]:
        for batch in batches_of(self._inputs, BATCH):
            yield _flat(self._graph(self._inputs[batch]))


def output_loss(task: Task, graph: QuantizedGraph, images: int | None, kind: str) -> OutputLoss:
    """Builds the loss of one graph of a task, over its first ``images``, None for all, or over all features of regions.

    With the kind :data:`FISHER` the task has a task loss, and the annotations of the images weigh the errors.
    """
    inputs = task.regions.pairs(graph, False, False)[0] if graph.is_region else task.images[:images]
    if kind != FISHER:
        return OutputLoss(graph, inputs)
    assert task.task_loss is not None
    return OutputLoss(graph, inputs, squared_gradients(task.model, task.batches(), inputs, task.task_loss))


def squared_gradients(
    model: QuantizedModel, batches: Iterable[Any], images: Images, task_loss: TaskLoss
) -> list[Images]:
    """Returns the squared gradients of the float network's task loss at each of its outputs, of the output's shape.

    The arguments are those of :func:`~mmbrecq.reconstruction.losses.visit_task_losses`.
    """
    outputs: list[Tensor] = []

    def record(inputs: Tensor) -> Any:
        found = model.image_graph.compiled(inputs)
        outputs[:] = _flat(found)
        return found

    def square(loss: Tensor, index: slice) -> None:
        gradients = torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True)
        squares.append([gradient.square() for gradient in gradients])

    squares: list[list[Tensor]] = []
    visit_task_losses(model, batches, images, task_loss, record, square)
    return [joined(parts) for parts in zip(*squares, strict=True)]


def _flat(outputs: Any) -> list[Tensor]:
    return list(flatten_outputs(outputs).values())


def measure_activations(task: Task, table: SensitivityTable, bits: int) -> None:
    """Measures the groups of ``table.values`` that have no loss at ``bits`` yet.

    The task was prepared with activations of these bits. Their grids are those of a calibration on float values; the
    loss is that with one group quantized, all else float.
    """
    calibrate_activations(task.model, (task.images[batch] for batch in batches_of(task.images, BATCH)))
    calibrate_regions(task.model, task.regions)
    for part in task.model.graphs:
        own = [name for name, group in table.values.items() if set(group.quantizers) <= set(part.quantizers)]
        missing = [name for name in own if bits not in table.activation_loss.get(name, {})]
        if missing:
            loss = output_loss(task, part, table.images, table.kind)
            for name in track(missing, f'activations at {bits} bits'):
                quantizers = table.values[name].quantizers
                table.activation_loss.setdefault(name, {})[bits] = loss.of((), quantizers)


STAGE = 'sensitivity'


@dataclass
class Analyzer:
    """Measures one model.

    Args:
        prepare: Returns a task with the model prepared at a number of bits of weights, and one of activations or None
            for the config's; its weights are calibrated.
        reconstructor: Learns the rounding of every unit; its first pass must be independent.
        options: See :class:`SearchOptions`.
        folder: Gets the table and the states.
        inputs: What the figures depend on.
        callback: Is called after every unit that is reconstructed.
        check: Is called with the table before anything is measured, and may raise.
    """

    prepare: Callable[[int, int | None], Task]
    reconstructor: BaseReconstructor
    options: SearchOptions
    folder: Path
    inputs: dict[str, Any]
    callback: Callback
    check: Callable[[SensitivityTable], None]
    table: SensitivityTable = field(init=False)

    @property
    def path(self) -> Path:
        """The table's file."""
        return self.folder / 'sensitivity.json'

    def run(self) -> SensitivityTable:
        """Measures what the file does not have yet; it is written after every number of bits."""
        candidates = self.options.bits
        first = self.prepare(candidates[0], None)
        self._begin(first)
        self.check(self.table)
        # before any state, which it tells the origin of
        save_json(self.table, self.path)
        for bits in candidates:
            task = first if bits == candidates[0] else self.prepare(bits, None)
            self._reconstruct(task, bits)
            self._measure(task, bits)
            save_json(self.table, self.path)
        for bits in self.table.activation_candidates:
            if any(bits not in self.table.activation_loss.get(name, {}) for name in self.table.values):
                measure_activations(self.prepare(candidates[0], bits), self.table, bits)
                save_json(self.table, self.path)
        return self.table

    def _begin(self, fewest: Task) -> None:
        """Loads the table of an earlier run, or starts one."""
        if self.path.exists():
            self.table = SensitivityTable.load(self.path)
            difference = first_difference(self.table.inputs, self.inputs)
            if difference is not None:
                raise ConfigError(
                    f'{self.path} is of another analysis: {difference}; choose another --work-dir, or remove the file '
                    'and the states beside it'
                )
            return
        states = self.folder / 'states'
        if states.exists():
            what = f'expected {self.path} beside {states}, to tell what those states are of'
            raise ConfigError(f'{what}, but there is none')
        model, bits = fewest.model, self.options.bits
        self._check_loss(fewest)
        shapes = layer_shapes(model)
        searched = self._searched(model)
        units = {name: unit.name for part in model.graphs for unit in part.units for name in unit.layers}
        kind = FISHER if self.options.loss == 'fisher' else OutputLoss(model.image_graph, fewest.images[:1]).kind
        self.table = SensitivityTable(kind, bits, shapes, searched, units, other_bytes(model), self.inputs)
        self.table.images = self.options.images
        if FLOAT in self.options.candidates:
            self.table = self.table.with_float()
        if self.options.activation_candidates:
            self.table.activation_candidates = sorted(self.options.activation_candidates)
            groups = [group for part in model.graphs for group in value_groups(part, searched)]
            if not groups:
                raise ConfigError(
                    'expected activations whose bits are to be chosen for search.activation_candidates, but the config '
                    'fixes those of all layers, or has them in float'
                )
            self.table.values = {group.layers[0]: group for group in groups}

    def _check_loss(self, task: Task) -> None:
        """Raises ConfigError where the loss that was asked for cannot be computed."""
        if self.options.loss != 'fisher':
            return
        if task.task_loss is None:
            raise ConfigError("expected annotated calibration images for search.loss='fisher', but they have none")
        if task.model.region_graphs:
            names = ', '.join(head.path for head in task.model.region_graphs)
            raise ConfigError(
                f"expected a network without heads of regions for search.loss='fisher', but got {names}: the task loss "
                "chooses other regions than the detector; use search.loss='outputs'"
            )

    def _searched(self, model: QuantizedModel) -> list[str]:
        """Returns the layers whose bits the config does not fix: they have others when the default is another."""
        fewest = self.options.bits[0]
        default = MAX_BITS if fewest < MAX_BITS else MIN_BITS
        others = {layer.name: layer.weight_bits for layer in self.prepare(default, None).model.layers}
        weights = [layer.name for layer in model.layers if layer.weight_bits == fewest]
        searched = [name for name in weights if others[name] == default]
        if not searched:
            raise ConfigError('expected layers whose bits are to be chosen, but the config fixes those of all layers')
        return searched

    def _reconstruct(self, task: Task, bits: int) -> None:
        """Learns the rounding of every unit that has layers to choose bits for; finished ones are loaded."""
        done = set()
        for unit in (unit for graph in task.model.graphs for unit in graph.units):
            path = state_path(self.folder / 'states', unit.name, bits)
            searched = not set(unit.layers).isdisjoint(self.table.searched)
            if searched and path.exists():
                load_layers(task.model.model, unit.layers, path)
            if not searched or path.exists():
                done.add((STAGE, unit.name))
        task = replace(task, done=frozenset(done))
        saver = _StateSaver(task.model.model, self.folder / 'states', bits)
        self.reconstructor.run(task, self.reconstructor.plan(task), Callbacks([saver, self.callback]))

    def _measure(self, task: Task, bits: int) -> None:
        """Measures the loss with each layer alone at these bits, and at the fewest with two layers of a unit."""
        for graph in task.model.graphs:
            own = {layer.name for layer in graph.layers}
            searched = [name for name in self.table.searched if name in own]
            missing = [name for name in searched if bits not in self.table.loss.get(name, {})]
            units = graph.units if self.options.pairs and bits == self.table.candidates[0] else ()
            pairs = [pair for unit in units for pair in combinations([n for n in searched if n in unit.layers], 2)]
            pairs = [pair for pair in pairs if bits not in self.table.pairs.get(pair, {})]
            if not missing and not pairs:
                continue
            loss = output_loss(task, graph, self.options.images, self.table.kind)
            for name in track(missing, f'layers at {bits} bits'):
                self.table.loss.setdefault(name, {})[bits] = loss.of({name})
            for first, second in track(pairs, f'pairs of layers at {bits} bits'):
                alone = self.table.loss[first][bits] + self.table.loss[second][bits]
                self.table.pairs.setdefault((first, second), {})[bits] = loss.of({first, second}) - alone


@dataclass
class _StateSaver(Callback):
    """Writes the state of every finished unit of ``model`` into ``folder``, for :func:`load_layers`."""

    model: nn.Module
    folder: Path
    bits: int

    def after_unit(self, stage: Stage, unit: ReconstructionUnit, result: UnitResult, progress: Progress) -> None:
        modules = {name: self.model.get_submodule(name) for name in unit.layers}
        state = {name: {key: o.state_dict() for o, key in layer_owners(module)} for name, module in modules.items()}
        save_atomic(state, state_path(self.folder, unit.name, self.bits))


def state_path(folder: Path, unit: str, bits: int) -> Path:
    """Returns the file of a unit's state; names that file systems cannot hold are told apart by a hash."""
    safe = ''.join(c if c.isalnum() or c in '._-' else '_' for c in unit)
    mark = '' if safe == unit else '-' + hashlib.sha256(unit.encode()).hexdigest()[:8]
    return folder / f'{safe}{mark}-w{bits}.pth'


def load_layers(model: nn.Module, layers: tuple[str, ...], path: Path) -> None:
    """Loads what was learned of layers into those prepared with the same bits; CheckpointError if it does not fit."""
    try:
        states = torch.load(path, map_location='cpu', weights_only=True)
        for name in layers:
            for owner, key in layer_owners(model.get_submodule(name)):
                owner.load_state_dict(states[name][key])
    except Exception as error:
        message = f'{path}: expected the state of a reconstructed unit, but it does not fit: {error}'
        raise CheckpointError(message) from error
