"""Measures what chosen bits lose on images of the calibration data that the calibration does not use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmbrecq.data import build_calibration_set
from mmbrecq.data.source import has_annotations
from mmbrecq.engine.evaluation import evaluate
from mmbrecq.errors import ConfigError, DataError
from mmbrecq.progress import without_chatter


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
            images, cfg.test_dataloader.get('batch_size', 1), num_workers=images.num_workers, collate_fn=_collate,
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


def _collate(samples: list[Any]) -> Any:
    for sample in samples:
        if isinstance(sample, DataError):
            raise sample
    return pseudo_collate(samples)
