"""Reconstruction of all units, pass by pass."""

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

from mmbrecq.building import build, check_number, expect, parse_options
from mmbrecq.byte_size import parse_bytes
from mmbrecq.calibration.calibrator import OBSERVED, observing
from mmbrecq.calibration.regions import REGIONS_PER_IMAGE
from mmbrecq.data.groups import grouped
from mmbrecq.distributed import batch_number, gather, on_main, process_count, process_index, processes_here
from mmbrecq.errors import ConfigError
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.quantizers.quantized_model import QuantizedGraph
from mmbrecq.reconstruction import losses
from mmbrecq.reconstruction.batches import MicroBatches, UnitData, UnitLoss
from mmbrecq.reconstruction.cache import DTYPES, ActivationCache, CachePlan, allocate_images, peak_bytes, plan_cache
from mmbrecq.reconstruction.callbacks import Callback, Forecast
from mmbrecq.reconstruction.losses import MSELoss, RelativeMSELoss
from mmbrecq.reconstruction.optimize import fit_ranges, optimize_unit
from mmbrecq.reconstruction.results import UnitResult, load_unit_state, unit_state
from mmbrecq.reconstruction.stages import Stage, StageOptions, Task, stage_units
from mmbrecq.reconstruction.streams import Streams
from mmbrecq.reconstruction.supervision import Supervision
from mmbrecq.reconstruction.values import CachedValues, Values
from mmbrecq.reconstruction.working_memory import ObservedUnit, fitting_images, observed_units, working_memory
from mmbrecq.registry import LOSSES


@dataclass(kw_only=True, eq=False)
class BaseReconstructor:
    """Optimises all units in several passes, those of :meth:`own_stages`.

    Args:
        network: Options of :class:`StageOptions` for a last pass over the whole network as one unit: what was learned
            unit by unit is kept, and biases, weight scales and step sizes, too few to overfit, are fitted to the
            outputs of the network; None for no such pass.
        loss: Config of the reconstruction loss; None for the squared error, of units whose outputs are tokens,
            ``(N, T, C)``, relative to the power of each.
        global_weight: How much the distance of the network's outputs, as the float rest of the network computes them
            from those of a unit, counts in its loss; at 1 as much as the unit's own error before it learns; 0 for none.
        global_share: Fraction of the images of a batch that pass through the rest, in (0, 1].
        mirror: Whether the mirror image of every calibration image is learned from, too; heads of regions see regions
            of the images as they are.
        cache: Where activations are cached: ``auto``, ``device``, ``host`` or ``disk``.
        cache_dtype: In which: ``float32``, or ``bfloat16`` for half of the room; they are computed in float32.
        memory_limit: Bytes of host memory that cached activations and the work on a unit may take, or a string such as
            ``'2GiB'``; None for half of what is available for the cache, and all of it for both.
    """

    network: Mapping[str, Any] | None = None
    loss: Mapping[str, Any] | None = None
    global_weight: float = 0.0
    global_share: float = 1.0
    mirror: bool = False
    cache: str = 'auto'
    cache_dtype: str = 'float32'
    memory_limit: int | str | None = None

    def __post_init__(self) -> None:
        self.stages = tuple(self.own_stages())
        if self.network is not None:
            options = parse_options(StageOptions, self.network, 'reconstructor.network', iterations=500)
            self.stages += (Stage('network', options, False, True, granularity='net', observes=False),)
        self.criterion = build(LOSSES, dict(self.loss or {'type': 'MSELoss'}))
        self.token_criterion = RelativeMSELoss() if self.loss is None else self.criterion
        check_number(self.global_weight, '[0, inf)', 'reconstructor.global_weight')
        check_number(self.global_share, '(0, 1]', 'reconstructor.global_share')
        self.share_behind = self.global_share if self.global_weight > 0 else 0.0
        # most losses weigh by nothing that only the rest of the network tells
        self.rank = getattr(self.criterion, 'rank', 0)
        if self.mirror and self.criterion.needs_fisher:
            raise ConfigError(
                'expected a loss without weights of its own for each image with reconstructor.mirror, such as MSELoss, '
                f'but got {type(self.criterion).__name__}'
            )
        known = self.cache_dtype in DTYPES
        expect(known, f'reconstructor.cache_dtype to be one of {list(DTYPES)}', self.cache_dtype)
        self.dtype, limit = DTYPES[self.cache_dtype], self.memory_limit
        self.limit = None if limit is None else parse_bytes(limit, 'reconstructor.memory_limit')

    def own_stages(self) -> Sequence[Stage]:
        """Returns the passes before that over the network, in order."""
        return ()

    def image_room(self, directory: Path) -> Callable[[Sequence[int], Tensor], Tensor]:
        """Allocates the calibration images by the same options as the cache; ``directory`` may take a file."""
        return partial(allocate_images, place=self.cache, directory=directory, memory_limit=self.limit)

    def plan(self, task: Task) -> CachePlan:
        """Decides where activations are cached; raises before any work where they fit nowhere."""
        device = next(task.model.model.parameters()).device
        cached, working, pixels = [], [], sum(images.numel() for images in grouped(task.images).parts)
        for part in task.model.graphs:
            size = part.traced.example[0].numel()
            # groups count by their pixels, as if all images were of the traced size
            count = len(task.images) * REGIONS_PER_IMAGE if part.is_region else -(-pixels // size)
            sizes = self._sizes(part, count)
            inputs = next(n.name for n in part.traced.graph.nodes if n.op == 'placeholder')
            standing = sum(sizes[name] for name in losses.weighted_outputs(part)) if self.criterion.needs_fisher else 0
            has_rest = self.rank > 0 or self.share_behind > 0
            standing += sum(sizes[name] for name in part.cut('net')[0].outputs) if has_rest else 0
            for stage in map(_for_regions, self.stages) if part.is_region else self.stages:
                units = stage_units(part, stage)
                # the errors of low rank, of which the quantized outputs are the first, and what is found from them
                cached.append(peak_bytes(units, sizes, inputs, standing, 2 * self.rank))
                images = min(stage.options.batch_size, count * (1 + self.mirror))
                needed = working_memory(part, units, stage, images, self.criterion.needs_fisher, self.rank, has_rest)
                # features of regions are collected in memory, and then joined, wherever all else is cached
                features = 2 * sizes[inputs] if part.is_region else 0
                working += [(size + features, unit) for size, unit in needed]
        observed = self._observed(task)
        images = task.observed or self._observed_at_once(observed, device)
        working += [(unit.bytes_of(images), unit.name) for unit in observed]
        most, beside = (max(sizes, default=(0, '')) for sizes in (cached, working))
        plan = plan_cache(self.cache, most, beside, device, task.directory, self.limit, self.dtype)
        return replace(plan, observed=images)

    def _observed_at_once(self, observed: Sequence[ObservedUnit], device: torch.device) -> int:
        """Returns how many images are observed at once; results depend on it, so it is the same in all processes."""
        # of all memory, not of what happens to be available
        room = self.limit or psutil.virtual_memory().total // 2 // processes_here()
        # a GPU splits what it has no room for
        return min(gather(OBSERVED if device.type == 'cuda' else fitting_images(observed, room)))

    def _observed(self, task: Task) -> list[ObservedUnit]:
        """Returns the network, as the calibration observes it, and the units of passes that quantize activations."""
        found = observed_units(task.model.image_graph, task.model.image_graph.cut('net'))
        for stage in self.stages:
            if stage.quantizes_activations and stage.observes:
                for part in task.model.graphs:
                    inputs = REGIONS_PER_IMAGE if part.is_region else 1
                    found += observed_units(part, stage_units(part, stage), inputs)
        return found

    def _sizes(self, part: QuantizedGraph, count: int) -> dict[str, int]:
        """Returns the bytes of every value of a graph over ``count`` images or regions."""
        examples = {n.name: n.meta.get('example') for n in part.traced.graph.nodes}
        mirrored = 1 if part.is_region else 1 + self.mirror
        sizes = {
            name: self.dtype.itemsize * mirrored * count * example[0].numel()
            for name, example in examples.items()
            if isinstance(example, Tensor) and example.dim() > 0
        }
        inputs = next(n for n in part.traced.graph.nodes if n.op == 'placeholder')
        # as they are; of a head, other features in either stream
        sizes[inputs.name] = 4 * count * inputs.meta['example'][0].numel() * (2 if part.is_region else 1)
        return sizes

    def describe_loss(self, task: Task) -> str:
        """Returns the loss in words: what it weighs by is decided by the data."""
        name = type(self.criterion).__name__
        if self.global_weight > 0:
            name += f', with the outputs of the network (weight {self.global_weight:g})'
        if not self.criterion.needs_fisher:
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

        ``plan`` is what :meth:`plan` returned. If a loss stops being finite, NonFiniteError names unit and iteration.
        """
        device = next(task.model.model.parameters()).device
        forecast = Forecast(task.model, self.stages, self.share_behind)
        for finished in task.resumed.values():
            forecast.note(finished.result)
        cache = ActivationCache(plan, device, task.directory)
        images = cache.hold(task.images, self.mirror)
        fisher = self._fisher(task, images, cache)
        run = _Run(task, self, cache, callback, forecast)
        for stage in self.stages:
            if stage.name == 'activations' and not task.model.quantizes_activations:
                continue
            units = [unit for part in task.model.graphs for unit in stage_units(part, stage)]
            callback.before_stage(stage, units, forecast.begin(units, stage))
            if run.load_finished(stage, units):
                callback.after_stage(stage)
                yield stage, []
                continue
            # the distance of outputs, which stands in for a missing task loss, says nothing about the outputs
            known = fisher if stage.granularity is None or task.task_loss is not None else None
            # mirror images do not lie in the order in which one process would have them
            first = None if self.mirror else task.first
            results = run.units(task.model.image_graph, stage, images, None, known, first)
            for head in task.model.region_graphs:
                features = task.regions.pairs(head, not stage.independent, stage.quantizes_activations)
                inputs, quantized_inputs = (cache.hold(x) for x in features)
                del features
                head_stage = _for_regions(stage)
                weights = None
                if self.criterion.needs_fisher and stage.granularity is None:
                    # the task loss is about regions chosen by the annotations, not about these
                    weights = losses.output_fisher(head, inputs, quantized_inputs, cache, head_stage.options.batch_size)
                # nor do regions
                results += run.units(head, head_stage, inputs, quantized_inputs, weights, None)
            callback.after_stage(stage)
            yield stage, results

    def _fisher(self, task: Task, images: Values, cache: ActivationCache) -> losses.FisherWeights | None:
        """Returns Fisher weights of the graph of the images, None where the loss needs none."""
        if not self.criterion.needs_fisher:
            return None
        if task.task_loss is None:
            return losses.output_fisher(task.model.image_graph, images, images, cache, losses.FISHER_BATCH)
        return losses.task_fisher(task.model, task.batches(), images, task.task_loss, cache)


@dataclass(frozen=True)
class _Run:
    """One run over a task: what all its passes share."""

    task: Task
    options: BaseReconstructor
    cache: ActivationCache
    callback: Callback
    forecast: Forecast

    def load_finished(self, stage: Stage, units: Sequence[ReconstructionUnit]) -> bool:
        """Loads all units of a pass where an interrupted run has done all of them; returns whether it has."""
        task = self.task
        left = [u for u in units if u.is_quantized and (stage.name, u.name) not in task.done]
        if not left or not all((stage.name, unit.name) in task.resumed for unit in left):
            return False
        for unit in left:
            load_unit_state(task.model.model, unit, task.resumed[stage.name, unit.name].state)
        return True

    def units(
        self,
        graph: QuantizedGraph,
        stage: Stage,
        inputs: Values,
        quantized_inputs: Values | None,
        fisher: losses.FisherWeights | None,
        first: int | None,
    ) -> list[UnitResult]:
        """Reconstructs all units of one graph, whose outputs may have Fisher weights; see :class:`Streams`."""
        results = []
        units, task, done = stage_units(graph, stage), self.task, self.task.done
        streams = Streams(graph, units, inputs, self.cache, stage.options.batch_size, quantized_inputs, first)
        options = self.options
        behind = Supervision(streams, options.rank, options.global_weight, options.global_share)
        for index, unit in enumerate(units):
            start = time.perf_counter()
            float_outputs = streams.run(unit, streams.float_inputs(unit), weights=False, activations=False)
            resumed = task.resumed.get((stage.name, unit.name))
            if resumed is not None:
                load_unit_state(graph.model, unit, resumed.state)
            if not unit.is_quantized or resumed is not None or (stage.name, unit.name) in done:
                outputs, activations = float_outputs, stage.quantizes_activations
                if not stage.independent:
                    outputs = streams.run(unit, streams.quantized_inputs(unit), True, activations)
                streams.advance(index, float_outputs, outputs)
                continue
            result, outputs = self._reconstruct(stage, streams, unit, float_outputs, fisher, behind)
            streams.advance(index, float_outputs, float_outputs if stage.independent else outputs)
            result = replace(result, seconds=time.perf_counter() - start)
            results.append(result)
            self.callback.after_unit(stage, unit, result, self.forecast.note(result))
        return results

    def _reconstruct(
        self,
        stage: Stage,
        streams: Streams,
        unit: ReconstructionUnit,
        float_outputs: Sequence[CachedValues],
        fisher: losses.FisherWeights | None,
        behind: Supervision,
    ) -> tuple[UnitResult, list[CachedValues]]:
        """Optimises one unit; returns its result, without the time, and its quantized outputs."""
        graph, size, activations = streams.graph, stage.options.batch_size, stage.quantizes_activations
        weights, quantizers = graph.unit_weights(unit), graph.unit_quantizers(unit)
        known = (None, None) if fisher is None else fisher.of(unit.outputs)
        data = UnitData(streams.quantized_inputs(unit), streams.float_inputs(unit), float_outputs, *known)
        tokens = all(len(grouped(value).parts[0].sample_shape) == 2 for value in float_outputs)
        plain = RelativeMSELoss() if tokens else MSELoss()
        of_unit = self.options.token_criterion if tokens else self.options.criterion
        # the plain loss where what it weighs by is not known
        loss: UnitLoss = of_unit if fisher is not None or not self.options.criterion.needs_fisher else MSELoss()
        self.callback.before_unit(stage, unit)
        if activations and quantizers and stage.observes:
            # the quantized stream now differs from the float one on which these were first observed
            self._observe(unit, streams)
            if tokens if stage.options.fit_ranges is None else stage.options.fit_ranges:
                with graph.quantization(weights=True, activations=True):
                    fit_ranges(unit.module, quantizers, data, plain if self.options.rank else loss)
        outputs = streams.run(unit, data.quantized_inputs, weights=True, activations=activations)
        data, loss = behind.add_to(data, unit, loss, plain, outputs, activations)
        power = data.power(loss, size)
        before = after = data.mean_loss(outputs, loss, size)
        training = MicroBatches(unit.name, min(size, len(data.targets[0])))
        state, kept = unit_state(graph.model, unit), False
        with graph.quantization(weights=True, activations=activations):
            iterations = optimize_unit(
                unit.name, unit.module, weights, quantizers, data, loss, stage,
                unit_generator(self.task.seed, stage.name, unit.name), self.cache.device,
                lambda count, loss: self.callback.after_step(stage, unit, count, loss), training,
            )  # fmt: skip
        if iterations > 0:
            if process_count() > 1:
                # other kinds of processors differ in last bits
                load_unit_state(graph.model, unit, on_main(lambda: unit_state(graph.model, unit)))
            learned = streams.run(unit, data.quantized_inputs, weights=True, activations=activations)
            after = data.mean_loss(learned, loss, size)
            kept = not after < before
            if kept:
                load_unit_state(graph.model, unit, state)
            outputs, after = (outputs, before) if kept else (learned, after)
        split = min((m.images for m in (training, streams.micro_batches(unit)) if m.split), default=None)
        result = UnitResult(unit.name, stage.name, unit.layers, before, after, iterations, 0.0, kept, power, split)
        return result, outputs

    def _observe(self, unit: ReconstructionUnit, streams: Streams) -> None:
        """Finds the grids of a unit's activations from its quantized inputs, at once where there is room."""
        graph, fitting = streams.graph, streams.micro_batches(unit)
        size = self.cache.plan.observed * (REGIONS_PER_IMAGE if graph.is_region else 1)

        def run(images: int) -> None:
            at_once = images if fitting.split else size
            known = streams.first is not None and not fitting.split
            first = batch_number(streams.first or 0, size, grouped(self.task.images).ends) if known else None
            # observers of a failed attempt are gone with it
            with observing(self.task.model, graph.unit_quantizers(unit), first):
                streams.observe(unit, at_once)

        fitting.run(run)


def _for_regions(stage: Stage) -> Stage:
    """Returns the pass with batches of as many images as before, each with all its regions."""
    return replace(stage, options=replace(stage.options, batch_size=stage.options.batch_size * REGIONS_PER_IMAGE))


def unit_generator(seed: int, stage: str, unit: str) -> torch.Generator:
    """Returns a generator that depends on seed, pass, unit and process, not on what ran before."""
    process = f'/{process_index()}' if process_index() else ''
    digest = hashlib.sha256(f'{seed}/{stage}/{unit}{process}'.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], 'big'))
