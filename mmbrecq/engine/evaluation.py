"""Evaluates a model with the config's own data loader and evaluator, and computes the loss of its training."""

from typing import Any

import torch
from mmengine.evaluator import Evaluator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmbrecq.data.source import explained_data_errors
from mmbrecq.errors import ConfigError, DataError
from mmbrecq.graph.traced_graph import evaluation_mode
from mmbrecq.progress import track, without_chatter
from mmbrecq.reconstruction.losses import TaskLoss

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
