"""The loss that a model was trained with, as the Fisher-weighted losses want it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmbrecq.reconstruction.losses import TaskLoss


def task_loss_of(model: Any) -> TaskLoss:
    """``loss(batch, images)``: the task loss of ``model``, a scalar, for a batch of calibration data.

    Args:
        model: An OpenMMLab model; what is plugged into it when the loss is asked for is what computes.
    """

    def loss(batch: Any, images: Tensor) -> Tensor:
        samples = model.data_preprocessor(batch, False)['data_samples']
        for sample in samples:
            # the images may have been padded further than those of this batch alone
            sample.set_metainfo({'batch_input_shape': tuple(images.shape[-2:])})
        total: Tensor
        total, _ = model.parse_losses(model.loss(images, samples))
        return total

    return loss
