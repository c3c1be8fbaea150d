"""Reads the calibration images and preprocesses them as the model does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq.data.sampling import CalibrationSet
from mmbrecq.distributed import gather
from mmbrecq.errors import DataError, NonFiniteError, first_line
from mmbrecq.progress import track

Allocate = Callable[[Sequence[int], Tensor], Tensor]
"""Makes an uninitialised tensor of a shape, of the dtype and on the device of another one."""


def collect_images(
    model: nn.Module, calibration: CalibrationSet, allocate: Allocate = lambda shape, like: like.new_empty(tuple(shape))
) -> Tensor:
    """Reads and preprocesses all calibration images, into memory that is allocated once.

    Images of several sizes are padded at the right and at the bottom to the largest height and width, those of other
    processes included, as the preprocessor itself pads the images of a batch. Where the first batch does not have
    that size the images are read a second time, rather than kept twice.

    Args:
        model: The model, whose data preprocessor is used.
        calibration: The drawn images.
        allocate: Makes the tensor; see :meth:`~mmbrecq.reconstruction.BaseReconstructor.image_room`.

    Returns:
        Finite images, ``(N, 3, H, W)``, on the device of the model; NonFiniteError names another one.
    """
    images, size = _read(model, calibration, None, allocate)
    height, width = (max(gather(length)) for length in size)
    if images is None or images.shape[2:] != (height, width):
        del images
        images, _ = _read(model, calibration, (height, width), allocate)
    assert images is not None
    return images


def _read(
    model: nn.Module, calibration: CalibrationSet, size: tuple[int, int] | None, allocate: Allocate
) -> tuple[Tensor | None, tuple[int, int]]:
    """Returns the images, padded to ``size`` or the first batch's, None if one is larger; and the largest size."""
    images: Tensor | None = None
    found, start = (0, 0), 0
    for batch in track(calibration.batches(), 'calibration images', -(-len(calibration) // calibration.batch_size)):
        inputs = _preprocess(model, batch)
        if not bool(torch.isfinite(inputs).all()):
            bad = int((~torch.isfinite(inputs)).flatten(1).any(1).nonzero()[0])
            raise NonFiniteError(f"expected finite pixels, but got NaN or infinity in '{calibration.ids[start + bad]}'")
        height, width = inputs.shape[2:]
        found = max(found[0], height), max(found[1], width)
        if start == 0:
            images = allocate((len(calibration), inputs.shape[1], *(size or found)), inputs)
        if images is not None and (height > images.shape[2] or width > images.shape[3]):
            images = None
        if images is not None:
            rows = images[start : start + len(inputs)]
            if rows.shape != inputs.shape:
                rows.fill_(getattr(model.data_preprocessor, 'pad_value', 0))
            rows[:, :, :height, :width] = inputs
        start += len(inputs)
    return images, found


def example_of(images: Tensor) -> Tensor:
    """Returns a copy of the first two images, ``(2, 3, H, W)``, to trace with; a single image is repeated."""
    return torch.cat([images[:1], images[:2][-1:]])


def _preprocess(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        try:
            inputs: Tensor = model.data_preprocessor(batch, False)['inputs']  # type: ignore[operator]
        except Exception as error:
            raise DataError(
                f'{type(model.data_preprocessor).__name__} cannot take the calibration images as their pipeline gives '
                f'them: {type(error).__name__}: {first_line(error)}'
            ) from error
    return inputs
