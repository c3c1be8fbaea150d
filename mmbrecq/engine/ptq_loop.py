"""The whole job: float evaluation, preparation, calibration, reconstruction, export, deployed evaluation, report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.dist import master_only
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop
from torch import Tensor
from torch.utils.data import DataLoader

from mmbrecq.building import build
from mmbrecq.calibration.calibrator import calibrate_activations, calibrate_regions, calibrate_weights
from mmbrecq.calibration.equalization import equalize_parts
from mmbrecq.data import CalibrationSet, build_calibration_set
from mmbrecq.data.annotations import has_annotations
from mmbrecq.data.images import collect_images
from mmbrecq.deploy.backends import DeployedModel
from mmbrecq.distributed import (
    aligned_batches,
    check_same_bits,
    gather,
    on_main,
    process_count,
    take_from_main,
)
from mmbrecq.engine.drawing import ReportPictures
from mmbrecq.engine.evaluation import check_classes, check_runs, evaluate
from mmbrecq.engine.hooks import (
    HookCaller,
    ReconstructionCheckpointHook,
    ReconstructionLoggerHook,
    ReconstructionProgressHook,
    ReconstructionScalarsHook,
)
from mmbrecq.engine.task_loss import task_loss_of
from mmbrecq.errors import BackendError, ConfigError
from mmbrecq.mixed_precision.choice import Choice
from mmbrecq.mixed_precision.sensitivity.inputs import describe_inputs
from mmbrecq.progress import track
from mmbrecq.quantizers.brecq import BRECQQuantizer
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction.cache import CachePlan, images_on_disk
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.reconstruction.stages import Stage
from mmbrecq.reconstruction.task import Task
from mmbrecq.registry import BACKENDS, EXPORTERS, LOOPS, QUANTIZERS, RECONSTRUCTORS
from mmbrecq.report import Summary, print_table
from mmbrecq.report.summary import KernelCount, LayerBits, UnitRecord
from mmbrecq.runs.checkpoint import load_float_checkpoint
from mmbrecq.runs.forecast import Forecast
from mmbrecq.runs.identity import describe_config
from mmbrecq.runs.journal import Journal
from mmbrecq.runs.measure import model_size, peak_memory, versions
from mmbrecq.runs.run_files import RunFiles

EVALUATIONS = ('float', 'nearest', 'weights', 'quantized', 'deployed')
"""What a run may measure, in this order."""

JOURNAL = 'reconstruction.pth'

DEFAULT_HOOKS = (
    ReconstructionLoggerHook,
    ReconstructionCheckpointHook,
    ReconstructionScalarsHook,
    ReconstructionProgressHook,
)


@LOOPS.register_module()
class PTQLoop(BaseLoop):
    """Quantizes the runner's model.

    Args:
        runner: mmengine's runner.
        dataloader: The test data.
        evaluator: The test evaluator.
        float_checkpoint: Path or URL of the float weights.
        quantizer: Config of the quantizer.
        reconstructor: Config of the reconstructor.
        calibration: Options of :class:`~mmbrecq.data.sampling.CalibrationOptions`.
        exporters: Configs of the exporters.
        evaluations: What is measured, among :data:`EVALUATIONS`.
        config_name: For the report.
        search_result: What a search wrote, whose bits ``quantizer`` has; None where none was made.
        reuse_states: Whether the rounding that its analysis has learned is taken.
        resume: Whether to go on with an interrupted run of the same work dir.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader[Any] | dict[str, Any],
        evaluator: Evaluator | dict[str, Any] | list[Any],
        float_checkpoint: str,
        quantizer: Mapping[str, Any],
        reconstructor: Mapping[str, Any],
        calibration: Mapping[str, Any],
        exporters: Sequence[Mapping[str, Any]] = (),
        evaluations: Sequence[str] = EVALUATIONS,
        config_name: str = '',
        search_result: str | None = None,
        reuse_states: bool = True,
        resume: bool = False,
    ) -> None:
        super().__init__(runner, dataloader)
        self.evaluator = runner.build_evaluator(evaluator)
        self.evaluator.dataset_meta = getattr(self.dataloader.dataset, 'metainfo', None)
        unknown = sorted(set(evaluations) - set(EVALUATIONS))
        if unknown:
            raise ConfigError(f'expected evaluations to be among {list(EVALUATIONS)}, but got {unknown[0]!r}')
        self.float_checkpoint, self.evaluations = float_checkpoint, tuple(evaluations)
        self.quantizer: BRECQQuantizer = build(QUANTIZERS, dict(quantizer))
        self.model: QuantizedModel
        self.reconstructor = build(RECONSTRUCTORS, dict(reconstructor))
        self.exporters = [build(EXPORTERS, exporter) for exporter in exporters]
        for exporter in self.exporters:
            _check_runtime(exporter.suffix)
        self.calibration = dict(calibration)
        self.folder = Path(runner.work_dir)
        # formatting it takes a good part of a second: once, not for every checkpoint
        self.config_text = runner.cfg.pretty_text
        self.summary = Summary(
            config=config_name,
            model=type(runner.model).__name__,
            preset=self.quantizer.preset.name,
            seed=runner.seed,
            versions=versions(),
        )
        self.task: Task | None = None
        self.choice = None if search_result is None else Choice(Path(search_result), reuse_states)
        self.summary.search = None if self.choice is None else self.choice.result
        self.resume = resume
        self.journal: Journal
        self.forecast: Forecast
        self.files = RunFiles(self.folder, self.summary, self.config_text)
        known = {type(hook).__name__ for hook in runner.hooks}
        for hook in DEFAULT_HOOKS:
            if hook.__name__ not in known:
                runner.register_hook(hook())

    def run(self) -> dict[str, float]:
        """Does the whole job; returns the metrics of the quantized model."""
        start = time.perf_counter()
        self.runner.call_hook('before_test')
        check_classes(self.runner.model, self.dataloader.dataset)
        load_float_checkpoint(self.runner.model, self.float_checkpoint)
        calibration = build_calibration_set(self.runner.cfg, self.calibration)
        share = calibration.share()
        images = collect_images(self.runner.model, share)
        check_runs(self.runner.model, images[:2])
        pictures = ReportPictures(self.dataloader.dataset, self.runner.cfg.get('default_scope') or '', self.folder)
        inputs = describe_inputs(self.runner.cfg, self.runner.model, images, self.runner.seed or 0)
        self._open_journal(inputs)
        self._evaluate('float')
        pictures.note_float(self.runner.model)
        model = self._prepare(images)
        task_loss = task_loss_of(self.runner.model) if self._has_task_loss(share) else None
        if self.choice is not None:
            self.choice.check_annotations(annotated=task_loss is not None)
        task = Task(model, images, share.batches, task_loss, self.runner.seed or 0, self.folder, first=share.first)
        task.resumed, task.observed = dict(self.journal.units), self.journal.observed
        self.summary.loss = self.reconstructor.describe_loss(task)
        plan = self.reconstructor.plan(task)
        self.journal.observed = plan.observed
        self.runner.logger.info(str(plan))
        self._calibrate(task, plan.observed, share.first_batch)
        self.task = task = self._take_up(task, inputs)
        if plan.place == 'disk' and images.device.type == 'cpu':
            images = images_on_disk(images, self.folder)
            self.task = task = replace(task, images=images)
        self.files.write_inputs(model, calibration.ids)
        self.journal.save()
        self._reconstruct(task, plan)
        self._measure_choice(task, last=True)
        example = images[:2].clone()
        del images, task
        self.task = None
        self._finish(model, example)
        self.summary.pictures = on_main(partial(pictures.draw, self.runner.model))
        self._deploy(model, example)
        self.summary.peak_memory_bytes = peak_memory()
        self.summary.seconds.total = time.perf_counter() - start
        self.files.write_summary()
        master_only(print_table)(self.summary)
        self.runner.logger.info(f'report: {self.folder / "report.html"}')
        self.runner.call_hook('after_test')
        return self.summary.metrics.quantized

    def record(self, result: UnitResult) -> None:
        """Takes a finished unit into the summary, and writes it: the report can be read half-way through a run."""
        self._note(result)
        self.forecast.note(result)
        self.files.write_summary()

    def time_left(self) -> float | None:
        """Seconds that the units not done will take, None while none is done."""
        return self.forecast.left()

    def count_done(self, stage: Stage) -> int:
        """Number of units of a stage that are done."""
        return sum(name == stage.name for name, _ in self.journal.units)

    def _note(self, result: UnitResult) -> None:
        self.summary.units.append(
            UnitRecord(
                result.name,
                list(result.layers),
                result.loss_before,
                result.loss_after,
                result.iterations,
                result.seconds,
                result.stage,
                result.kept_nearest,
                result.power,
            )
        )
        if result.images_at_once is not None:
            self.summary.warnings.append(
                f'the GPU had no room for a batch of {result.name} ({result.stage}): '
                f'{result.images_at_once} images were computed at once, their gradients added up'
            )

    def measure_weights(self, stage: Stage) -> None:
        """Measures learned weights with float activations, before another pass fits them to quantized ones."""
        if not stage.quantizes_activations and self.task is not None:
            self._measure_choice(self.task, last=False)
        if not stage.quantizes_activations and self.model.quantizes_activations:
            with self.model.quantization(weights=True, activations=False):
                self._evaluate('weights')
            self.journal.save()

    def _open_journal(self, inputs: Mapping[str, str]) -> None:
        """Starts the record of what is done, or goes on with that of an interrupted run."""
        identity = describe_config(self.runner.cfg)
        identity.update({key: inputs[key] for key in ('seed', 'float weights', 'calibration images')})
        identity['number of processes'] = str(process_count())
        self.journal = Journal(self.folder / JOURNAL, identity, self.config_text)
        if not self.resume:
            return
        if not self.journal.load():
            self.runner.logger.info(f'nothing to resume: there is no {self.journal.path}')
            return
        for unit in self.journal.units.values():
            self._note(unit.result)
        self.runner.logger.info(f'resumed: {len(self.journal.units)} units are done')

    def _take_up(self, task: Task, inputs: Mapping[str, str]) -> Task:
        """The task with the rounding that the analysis of a search has learned, where there is one that fits."""
        if self.choice is None:
            return task
        stage = self.reconstructor.stages[0]
        obstacle = self.choice.obstacle(stage, inputs)
        if obstacle is not None:
            self.runner.logger.info(f'every unit is reconstructed again: {obstacle}')
            return task
        task = self.choice.take_up(task, stage)
        self.runner.logger.info(f'the rounding of {len(task.done)} units is that of the analysis')
        return task

    def _measure_choice(self, task: Task, last: bool) -> None:
        """Measures what a choice of bits was predicted to lose, as soon as all that was searched is quantized."""
        if self.choice is None or self.choice.result.measured is not None:
            return
        if last or not self.choice.result.activation_bits:
            self.choice.result.measured = self.choice.measure(task)
            self.files.write_summary()

    def _prepare(self, images: Tensor) -> QuantizedModel:
        with self._timed('prepare'):
            # the same in all processes, since all must find the same graph; a copy, for a view would keep all images
            example = on_main(lambda: images[:2].cpu()).to(images.device).clone()
            self.model = model = self.quantizer.prepare(self.runner.model, example)
            self.summary.bits = {
                layer.name: LayerBits(layer.weight_bits, layer.activation_bits) for layer in model.layers
            }
            self.summary.float_layers = [f'{la.name}: {la.float_reason}' for la in model.layers if la.float_reason]
            self.summary.model_size_bytes = model_size(model)
            opaque = [
                f'{path} stays one call: {why}' for part in model.graphs for path, why in part.traced.opaque.items()
            ]
            self.summary.warnings += opaque
        for line in self.summary.float_layers + opaque:
            self.runner.logger.warning(line)
        if self.choice is not None:
            self.choice.check(model)
        return model

    def _calibrate(self, task: Task, at_once: int, first_batch: int) -> None:
        model = task.model
        with self._timed('calibrate'):
            count = equalize_parts(model, task.images, task.regions, at_once, first_batch)
            if model.equalization:
                self.runner.logger.info(f'channels of {count} groups of values are equalised')
            calibrate_weights(model)
            batches = aligned_batches(len(task.images), at_once, task.first)
            images = (task.images[batch] for batch in track(batches, 'calibration'))
            calibrate_activations(model, images, task.first // at_once)
            calibrate_regions(model, task.regions, first_batch)
            take_from_main(model.model)
        with model.quantization(weights=True, activations=True):
            self._evaluate('nearest')

    def _reconstruct(self, task: Task, plan: CachePlan) -> None:
        self.runner.logger.info(f'reconstruction loss: {self.summary.loss}')
        self.forecast = Forecast(task.model, self.reconstructor)
        for unit in task.resumed.values():
            self.forecast.note(unit.result)
        evaluated = self.summary.seconds.evaluate or 0.0
        before = sum(unit.result.seconds for unit in task.resumed.values())
        with self._timed('reconstruct'):
            try:
                self.reconstructor.run(task, plan, HookCaller(self.runner))
            finally:
                self.runner.call_hook('after_reconstruct')
        kept = [f'{u.name} ({u.phase})' for u in self.summary.units if u.kept_nearest]
        if kept:
            self.summary.warnings.append(
                f'the reconstruction made these units worse, so they keep what they had: {", ".join(kept)}'
            )
        # the evaluation after the first pass is no part of the reconstruction; what was done before is
        spent = (self.summary.seconds.evaluate or 0.0) - evaluated - before
        self.summary.seconds.reconstruct = (self.summary.seconds.reconstruct or 0.0) - spent
        self.files.write_summary()

    def _finish(self, model: QuantizedModel, example: Tensor) -> None:
        model.pack()
        check_same_bits(model.model)
        self.files.write_checkpoint(model, example)
        self._evaluate('quantized')
        if not model.quantizes_activations:
            self.summary.metrics.weights = dict(self.summary.metrics.quantized)
        self.files.write_summary()

    def _deploy(self, model: QuantizedModel, example: Tensor) -> None:
        with self._timed('export'):
            exports = [
                on_main(partial(exporter.export_all, model, example, self.folder / 'deploy'))
                for exporter in self.exporters
            ]
        for paths in exports:
            for path in paths:
                self.summary.verify[str(path.relative_to(self.folder))] = 'passed'
            deployed = DeployedModel(model.model, paths[0])
            count = deployed.integer_kernels()
            self.summary.integer_kernels[deployed.name] = KernelCount(count.quantized, count.integer)
            if 'deployed' in self.evaluations:
                deployed.attach()
                metrics = self._measure(f'deployed in {deployed.name}')
                self.summary.metrics.deployed[deployed.name] = metrics
                model.attach()

    def _evaluate(self, name: str) -> None:
        if name in self.evaluations:
            if name not in self.journal.metrics:
                self.journal.metrics[name] = self._measure(name)
            setattr(self.summary.metrics, name, dict(self.journal.metrics[name]))

    def _measure(self, title: str) -> dict[str, float]:
        start = time.perf_counter()
        metrics = evaluate(self.runner.model, self.dataloader, self.evaluator, f'evaluation: {title}')
        spent = time.perf_counter() - start
        self.summary.seconds.evaluate = (self.summary.seconds.evaluate or 0.0) + spent
        shown = ', '.join(f'{key} {value:.4g}' for key, value in metrics.items())
        self.runner.logger.info(f'{title}: {shown} ({spent:.1f} s)')
        return metrics

    def _has_task_loss(self, calibration: CalibrationSet) -> bool:
        """Whether a loss asks for the task loss, which is to be had where images are annotated."""
        asked = self.reconstructor.loss.needs_fisher or (self.choice is not None and self.choice.needs_task_loss)
        return asked and all(gather(has_annotations(calibration.batches())))

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        setattr(self.summary.seconds, step, time.perf_counter() - start)


def _check_runtime(suffix: str) -> None:
    """Refuses to start a run whose exported file nothing here could open; BackendError says what to install."""
    for backend in BACKENDS.module_dict.values():
        if backend.suffix == suffix and find_spec(backend.package) is None:
            raise BackendError(
                f'expected {backend.name} for the exported {suffix} file, but it is not installed: '
                f'pip install {backend.package}'
            )
