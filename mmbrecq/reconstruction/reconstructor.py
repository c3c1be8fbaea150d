"""Reconstruction of all units, stage by stage."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from mmbrecq.building import build, parse_options
from mmbrecq.byte_size import parse_bytes
from mmbrecq.calibration.calibrator import OBSERVED, observing
from mmbrecq.calibration.regions import REGIONS_PER_IMAGE
from mmbrecq.distributed import gather, on_main, process_count, process_index, processes_here
from mmbrecq.errors import ConfigError
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.quantizers.quantized_model import QuantizedGraph, QuantizedModel
from mmbrecq.reconstruction.cache import DTYPES, ActivationCache, CachePlan, allocate_images, peak_bytes, plan_cache
from mmbrecq.reconstruction.callbacks import Callback, Progress
from mmbrecq.reconstruction.fisher import FISHER_BATCH, FisherWeights, output_fisher, task_fisher, weighted_outputs
from mmbrecq.reconstruction.forecast import Forecast
from mmbrecq.reconstruction.losses import MSELoss
from mmbrecq.reconstruction.micro_batches import MicroBatches
from mmbrecq.reconstruction.optimize import optimize_unit
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.reconstruction.stages import Stage, StageOptions, stage_units
from mmbrecq.reconstruction.streams import Streams
from mmbrecq.reconstruction.task import Task
from mmbrecq.reconstruction.unit_data import UnitData, UnitLoss
from mmbrecq.reconstruction.unit_state import load_unit_state, unit_state
from mmbrecq.reconstruction.values import CachedValues
from mmbrecq.reconstruction.working_memory import ObservedUnit, fitting_images, observed_units, working_memory
from mmbrecq.registry import LOSSES, RECONSTRUCTORS


class BaseReconstructor:
    """Runs stages over all units.

    Args:
        stages: In order.
        network: Options of :class:`StageOptions` for a last pass over the whole network as one unit: what was learned
            unit by unit is kept, and biases, weight scales and step sizes, too few to overfit, are fitted to the
            outputs of the network; None for no such pass.
        loss: Config of the reconstruction loss.
        mirror: Whether the mirror image of every calibration image is learned from, too; heads of regions see regions
            of the images as they are.
        cache: Where activations are cached: ``auto``, ``device``, ``host`` or ``disk``.
        cache_dtype: In which: ``float32``, or ``bfloat16`` for half of the room; they are computed in float32.
        memory_limit: Bytes of host memory that cached activations and the work on a unit may take, or a string such as
            ``'2GiB'``; None for half of what is available for the cache, and all of it for both.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        network: Mapping[str, Any] | None = None,
        loss: Mapping[str, Any] | None = None,
        mirror: bool = False,
        cache: str = 'auto',
        cache_dtype: str = 'float32',
        memory_limit: int | str | None = None,
    ) -> None:
        self.stages = tuple(stages)
        if network is not None:
            options = parse_options(StageOptions, network, 'reconstructor.network', iterations=500)
            self.stages += (Stage('network', options, False, True, granularity='net', observes=False),)
        self.loss = build(LOSSES, dict(loss or {'type': 'MSELoss'}))
        if mirror and self.loss.needs_fisher:
            raise ConfigError(
                'expected a loss without weights of its own for each image with reconstructor.mirror, such as MSELoss, '
                f'but got {type(self.loss).__name__}'
            )
        if cache_dtype not in DTYPES:
            raise ConfigError(
                f'expected reconstructor.cache_dtype to be one of {list(DTYPES)}, but got {cache_dtype!r}'
            )
        self.mirror, self.cache, self.cache_dtype = mirror, cache, DTYPES[cache_dtype]
        self.memory_limit = None if memory_limit is None else parse_bytes(memory_limit, 'reconstructor.memory_limit')

    def image_room(self, directory: Path) -> Callable[[Sequence[int], Tensor], Tensor]:
        """Allocates the calibration images by the same options as the cache; ``directory`` may take a file."""
        return partial(allocate_images, place=self.cache, directory=directory, memory_limit=self.memory_limit)

    def plan(self, task: Task) -> CachePlan:
        """Decides where activations are cached; raises before any work where they fit nowhere."""
        device = next(task.model.model.parameters()).device
        cached, working = [], []
        for part in task.model.graphs:
            stages = self.stages if not part.is_region else [_for_regions(stage) for stage in self.stages]
            count = len(task.images) * (REGIONS_PER_IMAGE if part.is_region else 1)
            sizes = self._sizes(part, count)
            inputs = next(n.name for n in part.traced.graph.nodes if n.op == 'placeholder')
            weights = sum(sizes[name] for name in weighted_outputs(part)) if self.loss.needs_fisher else 0
            for stage in stages:
                units = stage_units(part, stage)
                cached.append(peak_bytes(units, sizes, inputs, weights))
                images = min(stage.options.batch_size, count * (1 + self.mirror))
                needed = working_memory(part, units, stage, images, self.loss.needs_fisher)
                # features of regions are collected in memory, and then joined, wherever all else is cached
                features = 2 * sizes[inputs] if part.is_region else 0
                working += [(size + features, unit) for size, unit in needed]
        observed = self._observed(task)
        images = task.observed or self._observed_at_once(observed, device)
        working += [(unit.bytes_of(images), unit.name) for unit in observed]
        plan = plan_cache(
            self.cache,
            max(cached, default=(0, '')),
            max(working, default=(0, '')),
            device,
            task.directory,
            self.memory_limit,
            self.cache_dtype,
        )
        return replace(plan, observed=images)

    def _observed_at_once(self, observed: Sequence[ObservedUnit], device: torch.device) -> int:
        """Images that are observed at once; what is found depends on it, so all processes have the same."""
        # of all memory, not of what happens to be available
        room = self.memory_limit or psutil.virtual_memory().total // 2 // processes_here()
        # a GPU splits what it has no room for
        return min(gather(OBSERVED if device.type == 'cuda' else fitting_images(observed, room)))

    def _observed(self, task: Task) -> list[ObservedUnit]:
        """What is observed: the network in the calibration, and units in the stages that quantize activations."""
        found = observed_units(task.model.image_graph, task.model.image_graph.cut('net'))
        for stage in self.stages:
            if stage.quantizes_activations and stage.observes:
                for part in task.model.graphs:
                    inputs = REGIONS_PER_IMAGE if part.is_region else 1
                    found += observed_units(part, stage_units(part, stage), inputs)
        return found

    def _sizes(self, part: QuantizedGraph, count: int) -> dict[str, int]:
        """Bytes of every value of a graph over ``count`` images or regions."""
        nodes = [n for n in part.traced.graph.nodes if _is_batched(n.meta.get('example'))]
        mirrored = 1 if part.is_region else 1 + self.mirror
        sizes = {n.name: self.cache_dtype.itemsize * mirrored * count * n.meta['example'][0].numel() for n in nodes}
        inputs = next(n for n in nodes if n.op == 'placeholder')
        # as they are; of a head, other features in either stream
        sizes[inputs.name] = 4 * count * inputs.meta['example'][0].numel() * (2 if part.is_region else 1)
        return sizes

    def describe_loss(self, task: Task) -> str:
        """The loss in words: what it weighs by is decided by the data."""
        name = type(self.loss).__name__
        if not self.loss.needs_fisher:
            return name
        if task.task_loss is None:
            return f'{name}, by the distance of quantized from float outputs, for there are no annotations'
        heads = ', '.join(head.path for head in task.model.region_graphs)
        of_heads = f'; {heads}: by the distance of quantized from float outputs' if heads else ''
        return f'{name}, by the task loss on annotated images{of_heads}'

    def run(self, task: Task, plan: CachePlan, callback: Callback) -> list[UnitResult]:
        """Reconstructs every unit in all passes, see :meth:`passes`."""
        return [result for _, results in self.passes(task, plan, callback) for result in results]

    def passes(self, task: Task, plan: CachePlan, callback: Callback) -> Iterator[tuple[Stage, list[UnitResult]]]:
        """Reconstructs every unit, and yields after each pass; the model then has what it learned, its switches off.

        Args:
            task: The model with calibrated grids, and its images.
            plan: Of :meth:`plan`.
            callback: Is told what happens.
        """
        device = next(task.model.model.parameters()).device
        meter = _Meter(task, self.stages)
        with ActivationCache(plan, device, task.directory) as cache:
            images = cache.hold(task.images, self.mirror)
            fisher = self._fisher(task, images, cache)
            for stage in self.stages:
                if stage.name == 'activations' and not task.model.quantizes_activations:
                    continue
                units = [unit for part in task.model.graphs for unit in stage_units(part, stage)]
                callback.before_stage(stage, units, meter.begin(stage, units))
                if self._take_up_stage(task, stage, units):
                    callback.after_stage(stage)
                    yield stage, []
                    continue
                # the distance of outputs, which stands in for a missing task loss, says nothing about the outputs
                known = fisher if stage.granularity is None or task.task_loss is not None else None
                report = _Report(callback, meter)
                results = self._run_stage(task, task.model.image_graph, stage, images, None, cache, known, report)
                for head in task.model.region_graphs:
                    features = task.regions.pairs(
                        head, weights=not stage.independent, activations=stage.quantizes_activations
                    )
                    inputs, quantized_inputs = (cache.hold(x) for x in features)
                    del features
                    head_stage = _for_regions(stage)
                    weights = None
                    if self.loss.needs_fisher and stage.granularity is None:
                        # the task loss is about regions chosen by the annotations, not about these
                        weights = output_fisher(head, inputs, quantized_inputs, cache, head_stage.options.batch_size)
                    results += self._run_stage(task, head, head_stage, inputs, quantized_inputs, cache, weights, report)
                callback.after_stage(stage)
                yield stage, results

    def _take_up_stage(self, task: Task, stage: Stage, units: Sequence[ReconstructionUnit]) -> bool:
        """Whether an interrupted run has done all of a stage; the model then has it."""
        left = [u for u in units if u.is_quantized and (stage.name, u.name) not in task.done]
        if not left or not all((stage.name, unit.name) in task.resumed for unit in left):
            return False
        for unit in left:
            load_unit_state(task.model.model, unit, task.resumed[stage.name, unit.name].state)
        return True

    def _fisher(self, task: Task, images: CachedValues, cache: ActivationCache) -> FisherWeights | None:
        """Fisher weights of the graph of the images, None where the loss needs none."""
        if not self.loss.needs_fisher:
            return None
        if task.task_loss is None:
            return output_fisher(task.model.image_graph, images, images, cache, FISHER_BATCH)
        return task_fisher(task.model, task.batches(), images, task.task_loss, cache)

    def _run_stage(
        self,
        task: Task,
        graph: QuantizedGraph,
        stage: Stage,
        inputs: CachedValues,
        quantized_inputs: CachedValues | None,
        cache: ActivationCache,
        fisher: FisherWeights | None,
        report: _Report,
    ) -> list[UnitResult]:
        """All units of one graph."""
        results = []
        units = stage_units(graph, stage)
        # regions and mirror images do not lie in the order in which one process would have them
        first = task.first if not graph.is_region and not self.mirror else None
        streams = Streams(graph, units, inputs, cache, stage.options.batch_size, quantized_inputs, first)
        for index, unit in enumerate(units):
            start = time.perf_counter()
            float_outputs = streams.run(unit, streams.float_inputs(unit), weights=False, activations=False)
            resumed = task.resumed.get((stage.name, unit.name))
            if resumed is not None:
                load_unit_state(graph.model, unit, resumed.state)
            if not unit.is_quantized or resumed is not None or (stage.name, unit.name) in task.done:
                unit_inputs, activations = streams.quantized_inputs(unit), stage.quantizes_activations
                if not stage.independent:
                    outputs = streams.run(unit, unit_inputs, weights=True, activations=activations)
                streams.advance(index, float_outputs, float_outputs if stage.independent else outputs)
                continue
            data = UnitData(
                streams.quantized_inputs(unit),
                streams.float_inputs(unit),
                float_outputs,
                *((None, None) if fisher is None else fisher.of(unit.outputs)),
            )
            power = data.power(self._loss_on(data), stage.options.batch_size)
            report.callback.before_unit(stage, unit)
            training = MicroBatches(unit.name, min(stage.options.batch_size, streams.count))
            before, after, outputs, steps = self._reconstruct(
                task, graph, stage, streams, unit, data, training, report.callback
            )
            streams.advance(index, float_outputs, float_outputs if stage.independent else outputs)
            kept = steps > 0 and not after < before
            after = before if kept else after
            seconds = time.perf_counter() - start
            split = min([m.images for m in (training, streams.micro_batches(unit)) if m.split], default=None)
            learned = (before, after, steps, seconds, kept, power, split)
            results.append(UnitResult(unit.name, stage.name, unit.layers, *learned))
            report.callback.after_unit(stage, unit, results[-1], report.meter.note(results[-1]))
        return results

    def _loss_on(self, data: UnitData) -> UnitLoss:
        """The loss, or the plain one where what it weighs by is not known."""
        known: UnitLoss = self.loss if data.fisher is not None or not self.loss.needs_fisher else MSELoss()
        return known

    def _reconstruct(
        self,
        task: Task,
        graph: QuantizedGraph,
        stage: Stage,
        streams: Streams,
        unit: ReconstructionUnit,
        data: UnitData,
        micro_batches: MicroBatches,
        callback: Callback,
    ) -> tuple[float, float, list[CachedValues], int]:
        """Optimises one unit; returns loss before, loss after, quantized outputs and steps."""
        activations = stage.quantizes_activations
        weights, quantizers = graph.unit_weights(unit), graph.unit_quantizers(unit)
        loss = self._loss_on(data)
        if activations and quantizers and stage.observes:
            # the quantized stream now differs from the float one on which these were first observed
            images = streams.cache.plan.observed
            _observe(task.model, graph, unit, streams, images * (REGIONS_PER_IMAGE if graph.is_region else 1))
        outputs = streams.run(unit, data.quantized_inputs, weights=True, activations=activations)
        before = data.mean_loss(outputs, loss, stage.options.batch_size)
        state = unit_state(graph.model, unit)
        with graph.quantization(weights=True, activations=activations):
            steps = optimize_unit(
                unit.name, unit.module, weights, quantizers, data, loss, stage,
                unit_generator(task.seed, stage.name, unit.name), streams.cache.device,
                lambda step, loss: callback.after_step(stage, unit, step, loss), micro_batches,
            )  # fmt: skip
        if steps == 0:
            return before, before, outputs, 0
        if process_count() > 1:
            # other kinds of processors differ in last bits
            load_unit_state(graph.model, unit, on_main(lambda: unit_state(graph.model, unit)))
        learned = streams.run(unit, data.quantized_inputs, weights=True, activations=activations)
        after = data.mean_loss(learned, loss, stage.options.batch_size)
        if after < before:
            return before, after, learned, steps
        load_unit_state(graph.model, unit, state)
        return before, after, outputs, steps


class _Meter:
    """Counts the units that are done, and forecasts the time that the others take."""

    def __init__(self, task: Task, stages: Sequence[Stage]) -> None:
        self._forecast = Forecast(task.model, stages)
        self._resumed = task.resumed
        for unit in task.resumed.values():
            self._forecast.note(unit.result)
        self._done = self._count = 0

    def begin(self, stage: Stage, units: Sequence[ReconstructionUnit]) -> Progress:
        self._done = sum(name == stage.name for name, _ in self._resumed)
        self._count = sum(unit.is_quantized for unit in units)
        return Progress(self._done, self._count, self._forecast.left())

    def note(self, result: UnitResult) -> Progress:
        self._forecast.note(result)
        self._done += 1
        return Progress(self._done, self._count, self._forecast.left())


@dataclass(frozen=True)
class _Report:
    callback: Callback
    meter: _Meter


def _observe(
    model: QuantizedModel, graph: QuantizedGraph, unit: ReconstructionUnit, streams: Streams, size: int
) -> None:
    """Finds the grids of a unit's activations from its quantized inputs, so many at once where there is room."""
    fitting = streams.micro_batches(unit)

    def run(images: int) -> None:
        at_once = images if fitting.split else size
        first = None if streams.first is None or fitting.split else streams.first // size
        # observers of a failed attempt are gone with it
        with observing(model, graph.unit_quantizers(unit), first):
            streams.observe(unit, at_once)

    fitting.run(run)


def _for_regions(stage: Stage) -> Stage:
    """The stage with steps of as many images as before, each with all its regions."""
    return replace(stage, options=replace(stage.options, batch_size=stage.options.batch_size * REGIONS_PER_IMAGE))


def unit_generator(seed: int, stage: str, unit: str) -> torch.Generator:
    """A generator that depends on the seed, the stage, the unit's name and the process, not on what ran before."""
    process = f'/{process_index()}' if process_index() else ''
    digest = hashlib.sha256(f'{seed}/{stage}/{unit}{process}'.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], 'big'))


def _is_batched(example: Any) -> bool:
    return isinstance(example, Tensor) and example.dim() > 0


@RECONSTRUCTORS.register_module()
class BRECQReconstructor(BaseReconstructor):
    """Weights first, with float activations; then the step sizes of activations (Li et al., ICLR 2021).

    Args:
        weights: Options of :class:`StageOptions` for the first pass.
        activations: Options for the second.
        **common: Of :class:`BaseReconstructor`.
    """

    def __init__(
        self,
        weights: Mapping[str, Any] | None = None,
        activations: Mapping[str, Any] | None = None,
        network: Mapping[str, Any] | None = None,
        loss: Mapping[str, Any] | None = None,
        mirror: bool = False,
        cache: str = 'auto',
        cache_dtype: str = 'float32',
        memory_limit: int | str | None = None,
    ) -> None:
        second = parse_options(StageOptions, activations or {}, 'reconstructor.activations', iterations=5000)
        stages = (
            Stage('weights', parse_options(StageOptions, weights or {}, 'reconstructor.weights'), True, False),
            Stage('activations', second, False, True),
        )
        super().__init__(stages, network, loss, mirror, cache, cache_dtype, memory_limit)


@RECONSTRUCTORS.register_module()
class QDropReconstructor(BaseReconstructor):
    """Rounding and step sizes together, with random dropping of quantization (Wei et al., ICLR 2022).

    Args:
        joint: Options of :class:`StageOptions` for the one pass.
        **common: Of :class:`BaseReconstructor`.
    """

    def __init__(
        self,
        joint: Mapping[str, Any] | None = None,
        network: Mapping[str, Any] | None = None,
        loss: Mapping[str, Any] | None = None,
        mirror: bool = False,
        cache: str = 'auto',
        cache_dtype: str = 'float32',
        memory_limit: int | str | None = None,
    ) -> None:
        where = 'reconstructor.joint'
        options = parse_options(StageOptions, joint or {}, where, activation_lr=4e-5, drop_prob=0.5)
        stages = [Stage('joint', options, True, True)]
        super().__init__(stages, network, loss, mirror, cache, cache_dtype, memory_limit)
