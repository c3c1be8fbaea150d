"""The calibration images as the network sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq.calibration.sampling import CalibrationSet
from mmbrecq.errors import DataError, NonFiniteError
from mmbrecq.progress import track


def collect_images(model: nn.Module, calibration: CalibrationSet) -> Tensor:
    """Reads and preprocesses all calibration images.

    Args:
        model: Its data preprocessor is used.
        calibration: The drawn images.

    Returns:
        ``(N, 3, H, W)`` on the device of the model.

    Raises:
        DataError: The images are of several sizes.
        NonFiniteError: A preprocessed image is not finite.
    """
    images: Tensor | None = None
    start = 0
    for batch in track(calibration.batches(), 'calibration images', -(-len(calibration) // calibration.batch_size)):
        inputs = _preprocess(model, batch)
        if images is None:
            images = torch.empty((len(calibration), *inputs.shape[1:]), device=inputs.device)
        if inputs.shape[1:] != images.shape[1:]:
            raise DataError(
                f'expected calibration images of one size, {tuple(images.shape[1:])}, but got {tuple(inputs.shape[1:])}'
            )
        if not bool(torch.isfinite(inputs).all()):
            bad = int((~torch.isfinite(inputs)).flatten(1).any(1).nonzero()[0])
            raise NonFiniteError(f"expected finite pixels, but got NaN or infinity in '{calibration.ids[start + bad]}'")
        images[start : start + len(inputs)] = inputs
        start += len(inputs)
    assert images is not None
    return images


def _preprocess(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        inputs: Tensor = model.data_preprocessor(batch, False)['inputs']  # type: ignore[operator]
    return inputs
