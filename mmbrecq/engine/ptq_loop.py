"""Quantizes a model as a loop of mmengine's: drives :mod:`mmbrecq.pipeline`, evaluates, reports."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.dist import master_only
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner, TestLoop
from torch import Tensor
from torch.utils.data import DataLoader

from mmbrecq import pipeline
from mmbrecq.building import build, expect
from mmbrecq.data import CalibrationSet, build_calibration_set
from mmbrecq.data.groups import Images, grouped
from mmbrecq.data.images import collect_images, example_of
from mmbrecq.data.source import has_annotations
from mmbrecq.deploy.backends import DeployedModel, build_exporters
from mmbrecq.deploy.comparison import compare
from mmbrecq.distributed import batch_number, check_same_bits, gather, on_main, process_count
from mmbrecq.engine import hooks
from mmbrecq.engine.drawing import REPORTED, VISUALIZER_TYPES, SideBySide, build_visualizer
from mmbrecq.engine.evaluation import check_classes, evaluate, task_loss_of
from mmbrecq.graph.components import has_transformer
from mmbrecq.mixed_precision.chosen_bits import ChosenBits
from mmbrecq.quantizers.brecq import BRECQQuantizer
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction.cache import CachePlan, images_on_disk
from mmbrecq.reconstruction.callbacks import Callbacks
from mmbrecq.reconstruction.stages import Task
from mmbrecq.registry import LOOPS, QUANTIZERS, RECONSTRUCTORS
from mmbrecq.rehearsal import rehearse
from mmbrecq.report.summary import Summary
from mmbrecq.report.table import print_table
from mmbrecq.runs.checkpoint import load_float_checkpoint
from mmbrecq.runs.identity import describe_config, describe_inputs
from mmbrecq.runs.run_files import Journal, RunFiles, model_size, peak_memory, rehearsal_text, versions

EVALUATIONS = ('float', 'nearest', 'weights', 'quantized', 'deployed')
"""Names of the evaluations that a run may make, in this order."""

GRID_IMAGES, GRID_PASSES = 8, 32
"""Images on which single grids are measured, and passes over them that are always made."""

DEFAULT_HOOKS = (
    hooks.ReconstructionLoggerHook, hooks.ReconstructionScalarsHook, hooks.ReconstructionProgressHook,
)  # fmt: skip


@LOOPS.register_module()
class PTQLoop(TestLoop):
    """Quantizes the runner's model; the first three arguments are those of mmengine's ``TestLoop``.

    Args:
        float_checkpoint: Path or URL of the float weights.
        quantizer: Config of the quantizer.
        reconstructor: Config of the reconstructor.
        calibration: Options of :class:`~mmbrecq.data.images.CalibrationOptions`.
        exporters: Configs of the exporters.
        evaluations: The evaluations to make, among :data:`EVALUATIONS`.
        config_name: Path of the config in the report.
        search_result: File of a search, whose bits ``quantizer`` has; None without a search.
        reuse_states: Whether to start from the rounding that the analysis of the search has learned.
        resume: Whether to continue an interrupted run of the same work dir.
        dry_run: Whether to stop after the rehearsal and to print what it found.
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
        dry_run: bool = False,
    ) -> None:
        super().__init__(runner, dataloader, evaluator)
        for name in evaluations:
            expect(name in EVALUATIONS, f'evaluations to be among {list(EVALUATIONS)}', name)
        self.float_checkpoint, self.evaluations = float_checkpoint, tuple(evaluations)
        self.quantizer_config = dict(quantizer)
        self.quantizer: BRECQQuantizer = build(QUANTIZERS, dict(quantizer))
        self.reconstructor = build(RECONSTRUCTORS, dict(reconstructor))
        self.exporters = build_exporters(exporters)
        self.calibration = dict(calibration)
        self.folder = Path(runner.work_dir)
        # the formatting needs a good part of a second: once, not for every checkpoint
        self.config_text = runner.cfg.pretty_text
        self.summary = Summary(
            config=config_name, model=type(runner.model).__name__, preset=self.quantizer.preset.name,
            seed=runner.seed, versions=versions(),
        )  # fmt: skip
        self.chosen = None if search_result is None else ChosenBits(Path(search_result), reuse_states)
        self.summary.search = None if self.chosen is None else self.chosen.result
        self.resume, self.dry_run = resume, dry_run
        self.files = RunFiles(self.folder, self.summary, self.config_text)
        known = {type(hook).__name__ for hook in runner.hooks}
        for hook in DEFAULT_HOOKS:
            if hook.__name__ not in known:
                runner.register_hook(hook())

    def run(self) -> dict[str, float]:
        """Runs the pipeline from the float weights to the report; returns the metrics of the quantized model."""
        start = time.perf_counter()
        self.runner.call_hook('before_test')
        check_classes(self.runner.model, self.dataloader.dataset)
        load_float_checkpoint(self.runner.model, self.float_checkpoint)
        calibration = build_calibration_set(self.runner.cfg, self.calibration)
        images, share = collect_images(self.runner.model, calibration, self.reconstructor.image_room(self.folder))
        scope, pictures = self.runner.cfg.get('default_scope'), None
        if scope in VISUALIZER_TYPES:
            folder = self.folder / 'pictures'
            pictures = SideBySide(self.dataloader.dataset, build_visualizer(scope), folder, REPORTED)
        inputs = describe_inputs(self.runner.cfg, self.runner.model, images, self.runner.seed or 0)
        self._open_journal(inputs)
        self._fall_back(images)
        if self.dry_run or not self.journal.units:
            self._rehearse(images)
        if self.dry_run:
            return {}
        self._evaluate('float')
        if pictures is not None:
            pictures.note_float(self.runner.model)
        model = self._prepare(images)
        task_loss = task_loss_of(self.runner.model) if self._has_task_loss(share) else None
        if self.chosen is not None:
            self.chosen.check_annotations(annotated=task_loss is not None)
        task = Task(model, images, share.batches, task_loss, self.runner.seed or 0, self.folder, first=share.first)
        task.resumed, task.observed = dict(self.journal.units), self.journal.observed
        self.summary.loss = self.reconstructor.describe_loss(task)
        plan = self.reconstructor.plan(task)
        self.journal.observed = plan.observed
        self.runner.logger.info(str(plan))
        self._calibrate(task, plan.observed, batch_number(share.first, share.batch_size, share.ends))
        task = self._with_learned_rounding(task, inputs)
        if plan.place == 'disk':
            images = images_on_disk(images, self.folder)
            task = replace(task, images=images)
        self.files.write_inputs(model, calibration.ids)
        self.journal.save()
        self._reconstruct(task, plan)
        self._measure_chosen(task, last=True)
        example = example_of(images)
        del images, task
        self._finish(model)
        if pictures is not None:
            paths = on_main(partial(pictures.compare, self.runner.model))
            self.summary.pictures = [str(path.relative_to(self.folder)) for path in paths]
        self._deploy(model, example)
        self.summary.peak_memory_bytes = peak_memory()
        self.summary.seconds.total = time.perf_counter() - start
        self.files.write_summary()
        master_only(print_table)(self.summary)
        self.runner.logger.info(f'report: {self.folder / "report.html"}')
        self.runner.call_hook('after_test')
        return self.summary.metrics.quantized

    def _open_journal(self, inputs: Mapping[str, str]) -> None:
        """Starts the record of finished units, or continues that of an interrupted run."""
        identity = describe_config(self.runner.cfg)
        identity.update({key: inputs[key] for key in ('seed', 'kernels', 'float weights', 'calibration images')})
        identity['number of processes'] = str(process_count())
        path = self.folder / 'reconstruction.pth'
        self.journal = Journal(path, self.runner.model, identity, self.config_text)
        if not self.resume:
            return
        if not self.journal.load():
            self.runner.logger.info(f'nothing to resume: there is no {self.journal.path}')
            return
        for unit in self.journal.units.values():
            self.summary.add_unit(unit.result)
        self.runner.logger.info(f'resumed: {len(self.journal.units)} units are done')

    def _with_learned_rounding(self, task: Task, inputs: Mapping[str, str]) -> Task:
        """Returns the task with the rounding that the analysis of a search has learned, if it fits this run."""
        if self.chosen is None:
            return task
        stage = self.reconstructor.stages[0]
        obstacle = self.chosen.obstacle(stage, inputs)
        if obstacle is not None:
            self.runner.logger.info(f'every unit is reconstructed again: {obstacle}')
            return task
        task = self.chosen.load_rounding(task, stage)
        self.runner.logger.info(f'the rounding of {len(task.done)} units is that of the analysis')
        return task

    def _measure_chosen(self, task: Task, last: bool) -> None:
        """Measures the predicted loss of chosen bits, as soon as all layers of the search are quantized."""
        if self.chosen is None or self.chosen.result.measured is not None:
            return
        if last or not self.chosen.result.activation_bits:
            self.chosen.result.measured = self.chosen.measure(task)
            self.files.write_summary()

    def _fall_back(self, images: Images) -> None:
        """Leaves layers in float whose inputs 8 bits hurt; a resumed run does as it was begun."""
        if self.journal.fallback is None:
            few = on_main(lambda: grouped(images).parts[0][: self.quantizer.fallback.images].cpu())
            model = self.runner.model
            found = pipeline.find_fallback(model, few.to(next(model.parameters()).device), self.quantizer_config)
            self.journal.fallback = [] if found is None else found.overrides()
            if found is not None:
                self.runner.logger.info(str(found))
        overrides = [*self.quantizer_config.get('overrides', ()), *self.journal.fallback]
        self.quantizer_config = {**self.quantizer_config, 'overrides': overrides}
        self.quantizer = build(QUANTIZERS, self.quantizer_config)

    def _rehearse(self, images: Images) -> None:
        """Refuses within seconds a model that the target cannot run; a dry run prints a forecast of the work."""
        start = time.perf_counter()
        forecast = self.reconstructor if self.dry_run else None
        # all processes rehearse alike, since calibration brings together what each of them has seen
        model, count = self.runner.model, len(images)
        few = on_main(lambda: grouped(images).parts[0][:4].cpu()).to(next(model.parameters()).device)
        found = rehearse(model, few, self.quantizer, self.exporters, forecast, count)
        self.runner.logger.info(f'rehearsed on a copy of the model in {time.perf_counter() - start:.1f} s')
        if self.dry_run:
            master_only(print)(rehearsal_text(found))

    def _prepare(self, images: Images) -> QuantizedModel:
        with self._timed('prepare'):
            # the same in all processes, since all must find the same graph
            device = next(self.runner.model.parameters()).device
            example = on_main(lambda: example_of(images).cpu()).to(device)
            model = pipeline.prepare(self.runner.model, example, self.quantizer)
            self.summary.add_model(model, model_size(model))
        if has_transformer(model.model) and self.dataloader.batch_size != 1:
            text = (
                'masks padding, which a graph of images cannot, so a batch of images of several sizes will be refused'
            )
            self.summary.warnings.append(f'{type(model.model).__name__} {text}')
        for line in self.summary.float_layers + self.summary.warnings:
            self.runner.logger.warning(line)
        for line in model.image_graph.traced.frozen:
            self.runner.logger.info(f'height and width are fixed by {line}')
        if self.chosen is not None:
            self.chosen.check(model)
        return model

    def _calibrate(self, task: Task, at_once: int, first_batch: int) -> None:
        with self._timed('calibrate'):
            count = pipeline.calibrate(task, at_once, first_batch)
            self._measure_grids(task)
        if task.model.equalization:
            self.runner.logger.info(f'channels of {count} groups of values are equalised')
        with task.model.quantization(weights=True, activations=True):
            self._evaluate('nearest')

    def _measure_grids(self, task: Task) -> None:
        """Measures what single grids cost the outputs, with about as much work as a pass over the images."""
        device = next(self.runner.model.parameters()).device
        traced = task.model.image_graph.traced
        few = on_main(lambda: pipeline.few_of(task.images, GRID_IMAGES, traced).cpu()).to(device)
        passes = max(sum(gather(len(task.images))) // len(few), GRID_PASSES)
        self.summary.grids = pipeline.grid_losses(replace(task, images=few), passes)
        if (text := self.summary.grids.describe_worst(self.quantizer.fallback.bound)) is not None:
            self.runner.logger.info(text)

    def _reconstruct(self, task: Task, plan: CachePlan) -> None:
        self.runner.logger.info(f'reconstruction loss: {self.summary.loss}')
        callback = Callbacks([hooks.HookCaller(self.runner), self.files, self.journal])
        seconds = sum(unit.result.seconds for unit in task.resumed.values())
        start = time.perf_counter()
        try:
            for stage, _ in pipeline.reconstruct(task, self.reconstructor, plan, callback):
                seconds += time.perf_counter() - start
                if not stage.quantizes_activations:
                    self._measure_weights(task)
                start = time.perf_counter()
        finally:
            self.runner.call_hook('after_reconstruct')
            self.journal.save()
        self.summary.seconds.reconstruct = seconds
        kept = [f'{u.name} ({u.stage})' for u in self.summary.units if u.kept_nearest]
        if kept:
            text = f'the reconstruction made these units worse, so they keep what they had: {", ".join(kept)}'
            self.summary.warnings.append(text)
        self.files.write_summary()

    def _measure_weights(self, task: Task) -> None:
        """Measures learned weights with float activations, before another pass fits them to quantized ones."""
        self._measure_chosen(task, last=False)
        if task.model.quantizes_activations:
            with task.model.quantization(weights=True, activations=False):
                self._evaluate('weights')
            self.journal.save()

    def _finish(self, model: QuantizedModel) -> None:
        pipeline.pack(model)
        check_same_bits(model.model)
        self.files.write_checkpoint(model, self.quantizer_config)
        self._evaluate('quantized')
        if not model.quantizes_activations:
            self.summary.metrics.weights = dict(self.summary.metrics.quantized)
        self.files.write_summary()

    def _deploy(self, model: QuantizedModel, example: Tensor) -> None:
        folder = self.folder / 'deploy'
        with self._timed('export'):
            exports = [on_main(partial(pipeline.export, model, e, example, folder)) for e in self.exporters]
        for paths in exports:
            for path in paths:
                self.summary.verify[str(path.relative_to(self.folder))] = 'passed'
            worst = max(compare(model, paths, example), key=lambda deviation: deviation.error)
            self.runner.logger.info(str(worst))
            deployed = DeployedModel(model.model, paths[0])
            count = self.summary.integer_kernels[deployed.name] = deployed.integer_kernels()
            self.runner.logger.info(count.describe(deployed.name))
            if 'deployed' in self.evaluations:
                deployed.attach()
                self.summary.metrics.deployed[deployed.name] = self._measure(f'deployed in {deployed.name}')
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
        """Returns whether a loss needs the task loss and the images are annotated, so that it can be computed."""
        asked = self.reconstructor.criterion.needs_fisher or (self.chosen is not None and self.chosen.needs_task_loss)
        return asked and all(gather(has_annotations(calibration.batches())))

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        setattr(self.summary.seconds, phase, time.perf_counter() - start)
