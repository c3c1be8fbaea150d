"""Evaluates a quantized checkpoint or an exported file as a loop of mmengine's."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.evaluator import Evaluator
from mmengine.runner import Runner, TestLoop
from torch.utils.data import DataLoader

from mmbrecq.deploy.backends import DeployedModel
from mmbrecq.distributed import on_main
from mmbrecq.engine.drawing import SideBySide, build_visualizer
from mmbrecq.engine.evaluation import check_classes, evaluate
from mmbrecq.pipeline import load
from mmbrecq.registry import LOOPS
from mmbrecq.runs.checkpoint import load_float_checkpoint


@LOOPS.register_module()
class QuantizedTestLoop(TestLoop):
    """Measures the results of a run; the first three arguments are those of mmengine's ``TestLoop``.

    No calibration data is read.

    Args:
        checkpoint: ``quantized.pth``, or an exported ``.onnx`` or ``.xml``.
        quantizer: Config of the quantizer that prepared it.
        own_bits: Whether layers have the bits that the checkpoint names, since a search chose them.
        float_checkpoint: Path or URL of the float weights, for ``show_dir``.
        show_dir: Folder of pictures of both models' predictions; None draws nothing.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader[Any] | dict[str, Any],
        evaluator: Evaluator | dict[str, Any] | list[Any],
        checkpoint: str,
        quantizer: Mapping[str, Any],
        own_bits: bool = False,
        float_checkpoint: str | None = None,
        show_dir: str | None = None,
    ) -> None:
        super().__init__(runner, dataloader, evaluator)
        self.checkpoint, self.quantizer = checkpoint, dict(quantizer)
        self.own_bits, self.float_checkpoint = own_bits, float_checkpoint
        self.drawing = None
        if show_dir is not None:
            visualizer = build_visualizer(runner.cfg.get('default_scope') or 'mmpretrain')
            self.drawing = SideBySide(self.dataloader.dataset, visualizer, Path(show_dir))

    def run(self) -> dict[str, float]:
        """Returns the metrics."""
        self.runner.call_hook('before_test')
        model = self.runner.model
        check_classes(model, self.dataloader.dataset)
        if self.drawing is not None and self.float_checkpoint is not None:
            load_float_checkpoint(model, self.float_checkpoint)
            self.drawing.note_float(model)
        if Path(self.checkpoint).suffix in ('.onnx', '.xml'):
            DeployedModel(model, Path(self.checkpoint)).attach()
        else:
            load(model, self.checkpoint, self.quantizer, self.own_bits)
        metrics = evaluate(model, self.dataloader, self.evaluator, 'evaluation')
        for name, value in metrics.items():
            self.runner.logger.info(f'{name}: {value!r}')
        if self.drawing is not None:
            pictures = on_main(partial(self.drawing.compare, model))
            self.runner.logger.info(f'{len(pictures)} pictures of both predictions in {self.drawing.folder}')
        self.runner.call_hook('after_test')
        return metrics
