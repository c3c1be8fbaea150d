"""Evaluates a model on the test data or on held-out calibration images, and computes the loss of its training."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner, TestLoop
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmbrecq.data import build_calibration_set
from mmbrecq.data.images import collate
from mmbrecq.data.source import explained_data_errors, has_annotations
from mmbrecq.deploy.backends import DeployedModel
from mmbrecq.distributed import on_main
from mmbrecq.engine.drawing import SideBySide, build_visualizer
from mmbrecq.errors import ConfigError, DataError
from mmbrecq.graph.traced_graph import evaluation_mode
from mmbrecq.pipeline import load
from mmbrecq.progress import track, without_chatter
from mmbrecq.reconstruction.losses import TaskLoss
from mmbrecq.registry import LOOPS
from mmbrecq.runs.checkpoint import load_float_checkpoint

_OTHER_IMAGES = 'Results do not correspond to current coco set'
"""Message of COCO's evaluator about images that its annotation file does not have."""

_ANSWERS = ('predict', 'predict_by_feat')
"""Methods by which OpenMMLab's heads turn features into results."""


def task_loss_of(model: Any) -> TaskLoss:
    """Returns ``loss(batch, images)``: the loss that an OpenMMLab model was trained with, a scalar, of a batch of data.

    The forward passes of its components at the time of the call compute the loss.
    """

    def loss(batch: Any, images: Tensor) -> Tensor:
        samples = model.data_preprocessor(batch, False)['data_samples']
        for sample in samples:
            # the images may have been padded further than those of this batch alone
            sample.set_metainfo({'batch_input_shape': tuple(images.shape[-2:])})
        total: Tensor
        # a detector that samples regions draws alike, whatever was drawn before: a resumed run weighs as a whole one
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            torch.manual_seed(0)
            total, _ = model.parse_losses(model.loss(images, samples))
        return total

    return loss


def check_classes(model: nn.Module, dataset: Any) -> None:
    """Compares the number of classes of the test data with its annotations' and the model's; ConfigError names both."""
    classes = getattr(dataset, 'metainfo', {}).get('classes')
    if classes is None:
        return
    # of COCO's format: the categories whose names are classes
    found = getattr(dataset, 'cat_ids', None)
    if found is not None and len(found) != len(classes):
        raise ConfigError(
            f'expected the {len(classes)} classes of {type(dataset).__name__} among the categories of '
            f'{dataset.ann_file}, but {len(found)} of them are there; they start with {classes[0]!r}'
        )
    # the proposals of a two-stage detector tell objects from background, whatever the classes
    proposing = set(getattr(model, 'rpn_head', nn.Module()).modules())
    for name, module in model.named_modules():
        # what answers has a method for it; an auxiliary head, such as HTC's of semantic segmentation, has none
        answers = module not in proposing and any(hasattr(module, method) for method in _ANSWERS)
        count = getattr(module, 'num_classes', None) if answers else None
        if isinstance(count, int) and count not in (0, -1, len(classes)):
            raise ConfigError(
                f"expected '{name}' to have the {len(classes)} classes of {type(dataset).__name__}, "
                f'but num_classes is {count}'
            )


def evaluate(model: nn.Module, dataloader: DataLoader[Any], evaluator: Evaluator, title: str) -> dict[str, float]:
    """Returns the metrics of ``model`` over all images of all processes; DataError for an unreadable image."""
    for metric in evaluator.metrics:
        # through the processes themselves: the default meets in a folder of the working directory
        metric.collect_device = 'gpu'
    with evaluation_mode(model):
        with explained_data_errors():
            for batch in track(dataloader, title):
                if isinstance(batch, DataError):
                    raise batch
                outputs = model.test_step(batch)  # type: ignore[operator]
                evaluator.process(data_samples=outputs, data_batch=batch)
        with without_chatter():
            try:
                metrics = evaluator.evaluate(len(dataloader.dataset))  # type: ignore[arg-type]
            except AssertionError as error:
                if _OTHER_IMAGES not in str(error):
                    raise
                raise DataError(
                    'expected the annotation file of the evaluator to be that of the test data, but it has other images'
                ) from error
    return {name: float(value) for name, value in metrics.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)


class HeldOut:
    """Evaluates models on held-out images with the evaluator of the config, whose first metric counts.

    Args:
        runner: mmengine's runner, which builds the evaluator.
        calibration: Options of the calibration images.
        count: Number of images; they are those that follow the calibration images in the same draw.

    Attributes:
        metric: Name of the metric, empty before the float model is measured.

    Raises:
        DataError: There are not so many images, or they have no annotations.
        ConfigError: An evaluator reads annotations that cannot be told for these images.
    """

    def __init__(self, runner: Runner, calibration: Mapping[str, Any], count: int) -> None:
        cfg: Config = runner.cfg
        images = build_calibration_set(cfg, dict(calibration), held_out=count)
        given = cfg.test_evaluator
        metrics = [dict(metric) for metric in (given if isinstance(given, (list, tuple)) else [given])]
        named = [metric for metric in metrics if metric.get('ann_file')]
        if named:
            # the evaluator would count what is missed in all other images of the file
            path = Path(runner.work_dir) / 'held_out.json'
            images.write_annotations(path)
            for metric in named:
                metric['ann_file'] = str(path)
        elif not has_annotations(images.batches()):
            raise DataError(
                'expected annotated calibration images to measure the drop of search.budgets on, but those that are '
                'held out have no annotations'
            )
        with without_chatter():
            self._evaluator = runner.build_evaluator(metrics)
        self._evaluator.dataset_meta = getattr(images.dataset, 'metainfo', None)
        # without a generator of its own every pass would draw from the global one
        self._loader: DataLoader[Any] = DataLoader(
            images, cfg.test_dataloader.get('batch_size', 1), num_workers=images.num_workers, collate_fn=collate,
            generator=torch.Generator(),
        )  # fmt: skip
        self.metric, self._float, self._points = '', 0.0, 1.0

    def __len__(self) -> int:
        return len(self._loader.dataset)  # type: ignore[arg-type]

    def measure_float(self, model: nn.Module) -> None:
        """Measures the float model, from which models drop; ConfigError where there is nothing to lose."""
        found = evaluate(model, self._loader, self._evaluator, 'evaluation: float, held-out images')
        self.metric, self._float = next(iter(found.items()), ('', 0.0))
        if not self._float > 0:
            raise ConfigError(
                f'expected a float model whose {self.metric or "metric"} on {len(self)} held-out images is above 0, to '
                f'measure a drop from, but got {self._float}'
            )
        # fractions such as COCO's AP count in percent
        self._points = 100.0 if self._float <= 1 else 1.0

    def drop(self, model: nn.Module) -> float:
        """Returns how far a model falls behind the float one, in points."""
        found = evaluate(model, self._loader, self._evaluator, 'evaluation: held-out images')
        return self._points * (self._float - found[self.metric])


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
