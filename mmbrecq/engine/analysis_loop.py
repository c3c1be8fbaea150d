"""The analysis of sensitivities as a loop of mmengine's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop
from torch.utils.data import DataLoader

from mmbrecq.building import build
from mmbrecq.calibration import build_calibration_set
from mmbrecq.calibration.annotations import has_annotations
from mmbrecq.calibration.calibrator import calibrate_weights
from mmbrecq.calibration.equalization import equalize_parts
from mmbrecq.calibration.images import collect_images
from mmbrecq.checkpoint import load_float_checkpoint
from mmbrecq.engine.evaluation import check_classes, check_runs
from mmbrecq.engine.hooks import HookCaller, ReconstructionLoggerHook, ReconstructionProgressHook
from mmbrecq.engine.task_loss import task_loss_of
from mmbrecq.quantizers.options import parse_options
from mmbrecq.reconstruction.reconstructor import BaseReconstructor, Task
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.reconstruction.stages import Stage, StageOptions
from mmbrecq.registry import LOOPS, QUANTIZERS
from mmbrecq.sensitivity import STAGE, AnalysisOptions, Analyzer, SensitivityTable
from mmbrecq.sensitivity.inputs import describe_inputs


@LOOPS.register_module()
class AnalysisLoop(BaseLoop):
    """Measures what every layer loses at every number of bits; ``sensitivity.json`` has it.

    Args:
        runner: mmengine's runner.
        dataloader: The test data, whose classes are compared with the model's; no image of it is read.
        evaluator: Of the test data; mmengine hands it to every loop, this one has no use for it.
        float_checkpoint: Path or URL of the float weights.
        quantizer: Config of the quantizer.
        reconstructor: Config of the reconstructor; its first pass gives the options of the reconstruction.
        calibration: Options of the calibration images.
        search: Options of :class:`~mmbrecq.sensitivity.AnalysisOptions`.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader[Any] | dict[str, Any],
        evaluator: Any,
        float_checkpoint: str,
        quantizer: Mapping[str, Any],
        reconstructor: Mapping[str, Any],
        calibration: Mapping[str, Any],
        search: Mapping[str, Any],
    ) -> None:
        super().__init__(runner, dataloader)
        self.float_checkpoint, self.calibration = float_checkpoint, dict(calibration)
        build(QUANTIZERS, dict(quantizer))  # bad options are refused before any work
        self.quantizer = dict(quantizer)
        self.options = parse_options(AnalysisOptions, search, 'search')
        passes = ('weights', 'joint')
        steps: Mapping[str, Any] = next((reconstructor[name] for name in passes if name in reconstructor), {})
        options = parse_options(StageOptions, {**steps, 'drop_prob': 0.0}, 'the first pass of the reconstructor')
        common = {
            key: reconstructor[key] for key in ('loss', 'mirror', 'cache', 'memory_limit') if key in reconstructor
        }
        self.reconstructor = BaseReconstructor([Stage(STAGE, options, True, False, independent=True)], **common)
        for hook in (ReconstructionLoggerHook, ReconstructionProgressHook):
            runner.register_hook(hook())

    def run(self) -> SensitivityTable:
        """Returns what was measured."""
        model = self.runner.model
        check_classes(model, self.dataloader.dataset)
        load_float_checkpoint(model, self.float_checkpoint)
        calibration = build_calibration_set(self.runner.cfg, self.calibration)
        images = collect_images(model, calibration)
        check_runs(model, images[:2])
        annotated = self.reconstructor.loss.needs_fisher and has_annotations(calibration.batches())

        def prepare(bits: int, activation_bits: int | None) -> Task:
            own = copy.deepcopy(model)
            changed: dict[str, Any] = {'weight': {**self.quantizer['weight'], 'bits': bits}}
            if activation_bits is not None:
                changed['activation'] = {**(self.quantizer.get('activation') or {}), 'bits': activation_bits}
            prepared = build(QUANTIZERS, {**self.quantizer, **changed}).prepare(own, images[:2])
            loss = task_loss_of(own) if annotated else None
            seed = self.runner.seed or 0
            task = Task(prepared, images, calibration.batches, loss, seed, Path(self.runner.work_dir))
            equalize_parts(prepared, images, task.regions)
            for part in prepared.parts:
                calibrate_weights(part)
            return task

        inputs = {
            **describe_inputs(self.runner.cfg, model, images, self.runner.seed or 0),
            'overrides': str(self.quantizer.get('overrides', ())),
            'candidates': str(sorted(self.options.candidates, key=str)),
            'activation candidates': str(sorted(self.options.activation_candidates)),
            'images': f'{self.options.images or len(images)} of {len(images)}',
        }
        analyzer = Analyzer(
            prepare, self.reconstructor, self.options, Path(self.runner.work_dir), inputs, HookCaller(self.runner)
        )
        table = analyzer.run()
        self.runner.logger.info(f'sensitivities: {analyzer.path}')
        return table

    def record(self, result: UnitResult) -> None:
        """Units are kept as files; there is no summary to take them into."""

    def measure_weights(self, stage: Stage) -> None:
        """An analysis has a measure of its own."""
