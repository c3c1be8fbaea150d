"""The calibration images as the network sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq.data.sampling import CalibrationSet
from mmbrecq.distributed import largest
from mmbrecq.errors import NonFiniteError
from mmbrecq.progress import track


def collect_images(model: nn.Module, calibration: CalibrationSet) -> Tensor:
    """Reads and preprocesses all calibration images.

    Images of several sizes are padded at the right and at the bottom to the largest height and width, those of other
    processes included, as the preprocessor itself pads the images of a batch.

    Args:
        model: Its data preprocessor is used.
        calibration: The drawn images.

    Returns:
        ``(N, 3, H, W)`` on the device of the model.

    Raises:
        NonFiniteError: A preprocessed image is not finite.
    """
    batches: list[Tensor] = []
    start = 0
    for batch in track(calibration.batches(), 'calibration images', -(-len(calibration) // calibration.batch_size)):
        inputs = _preprocess(model, batch)
        if not bool(torch.isfinite(inputs).all()):
            bad = int((~torch.isfinite(inputs)).flatten(1).any(1).nonzero()[0])
            raise NonFiniteError(f"expected finite pixels, but got NaN or infinity in '{calibration.ids[start + bad]}'")
        batches.append(inputs)
        start += len(inputs)
    height, width = (largest(max(batch.shape[axis] for batch in batches)) for axis in (2, 3))
    padding = getattr(model.data_preprocessor, 'pad_value', 0)
    images = batches[0].new_full((start, batches[0].shape[1], height, width), padding)
    end = start
    while batches:
        # the last first, so that each is freed once it is copied
        last = batches.pop()
        images[end - len(last) : end, :, : last.shape[2], : last.shape[3]] = last
        end -= len(last)
    return images


def example_of(images: Tensor) -> Tensor:
    """A copy of the first two images, ``(2, 3, H, W)``, to trace with; an image that is alone comes twice."""
    return torch.cat([images[:1], images[:2][-1:]])


def _preprocess(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        inputs: Tensor = model.data_preprocessor(batch, False)['inputs']  # type: ignore[operator]
    return inputs
