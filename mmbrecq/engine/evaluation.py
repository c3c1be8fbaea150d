"""Evaluation with the config's own data loader and evaluator."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Any

import torch
from mmengine.evaluator import Evaluator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmbrecq.backends.base import first_line
from mmbrecq.calibration.data_errors import explain_data_error
from mmbrecq.errors import GraphError
from mmbrecq.graph.arithmetic import evaluation_mode
from mmbrecq.graph.components import ImageArithmetic
from mmbrecq.progress import track


def check_runs(model: nn.Module, images: Tensor) -> None:
    """Runs ``model`` once, before all that takes long.

    Args:
        model: An OpenMMLab model.
        images (Tensor): Preprocessed images, ``(N, 3, H, W)``.

    Raises:
        GraphError: The model cannot process them.
    """
    with evaluation_mode(model):
        try:
            ImageArithmetic(model)(images)
        except Exception as error:
            where = f'{type(model).__name__} fails on images of shape {tuple(images.shape[1:])}'
            raise GraphError(f'{where}: {first_line(error)}') from error


def evaluate(model: nn.Module, dataloader: DataLoader[Any], evaluator: Evaluator, title: str) -> dict[str, float]:
    """Metrics of ``model`` over all images, named as the evaluator names them.

    Raises:
        DataError: An image cannot be read.
    """
    with evaluation_mode(model):
        try:
            for batch in track(dataloader, title):
                outputs = model.test_step(batch)  # type: ignore[operator]
                evaluator.process(data_samples=outputs, data_batch=batch)
        except Exception as error:
            explained = explain_data_error(error)
            if explained is None:
                raise
            raise explained from error
        # COCO's evaluator prints its progress and a table of its own
        with redirect_stdout(io.StringIO()):
            metrics = evaluator.evaluate(len(dataloader.dataset))  # type: ignore[arg-type]
    return {name: float(value) for name, value in metrics.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
