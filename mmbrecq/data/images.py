"""Reads the calibration images and preprocesses them as the model does."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, groupby

import torch
from torch import Tensor, nn

from mmbrecq.data.groups import Grouped, Images, grouped
from mmbrecq.data.sampling import CalibrationSet
from mmbrecq.distributed import gather
from mmbrecq.errors import DataError, NonFiniteError, first_line
from mmbrecq.graph.traced_graph import trace_image_graph
from mmbrecq.progress import track

Allocate = Callable[[Sequence[int], Tensor], Tensor]
"""Makes an uninitialised tensor of a shape, of the dtype and on the device of another one."""


def collect_images(
    model: nn.Module, calibration: CalibrationSet, allocate: Allocate = lambda shape, like: like.new_empty(tuple(shape))
) -> tuple[Images, CalibrationSet]:
    """Reads and preprocesses the calibration images of this process, into memory that is allocated once.

    Images of several sizes are padded at the right and at the bottom to the largest height and width, those of other
    processes included, as the preprocessor itself pads the images of a batch. Images that are higher than wide are
    padded as a group, and the others as another, if the model runs at any size. Where the first image does not have the
    size of all the images are read a second time, rather than kept twice.

    Args:
        model: The model, whose data preprocessor is used.
        calibration: The drawn images of all processes.
        allocate: Makes the tensor; see :meth:`~mmbrecq.reconstruction.BaseReconstructor.image_room`.

    Returns:
        Finite images, ``(N, 3, H, W)`` or the group of the larger ones and the other, on the device of the model;
        NonFiniteError names another one. And the drawn images of this process, in their order.
    """
    share, own = calibration.share(), []
    images: Tensor | None = None
    for number, image in enumerate(_preprocessed(model, share)):
        if number == 0:
            images = allocate((len(share), *image.shape[1:]), image)
        if images is not None and not _put(image, images[number], model):
            images = None
        own.append(image.shape[2:])
    sizes = torch.tensor([size for part in gather(own) for size in part])
    upright = sizes[:, 0] > sizes[:, 1]
    groups = [kind.nonzero()[:, 0] for kind in (~upright, upright) if kind.any()]
    if len(groups) > 1 and not all(gather(_is_free(model, image))):
        groups = [torch.arange(len(sizes))]
    groups.sort(key=lambda group: -int(sizes[group].amax(0).prod()))
    shapes = [tuple(sizes[group].amax(0).tolist()) for group in groups]
    if len(groups) == 1 and images is not None and images.shape[2:] == shapes[0]:
        return images, share
    del images
    share = calibration.share([group.tolist() for group in groups]) if len(groups) > 1 else share
    rows = [shape for group, shape in zip(groups, shapes, strict=True) for _ in group][share.first :][: len(share)]
    # a share may have images of one group alone
    present = [(len(list(run)), image.shape[1], *shape) for shape, run in groupby(rows)]
    counts = [math.prod(shape) for shape in present]
    room = allocate(present[0] if len(present) == 1 else [sum(counts)], image)
    parts = [part.view(shape) for part, shape in zip(room.flatten().split(counts), present, strict=True)]
    for row, image in zip(chain(*parts), _preprocessed(model, share), strict=True):
        _put(image, row, model)
    return Grouped(parts, share.ends) if len(groups) > 1 else parts[0], share


def _preprocessed(model: nn.Module, calibration: CalibrationSet) -> Iterator[Tensor]:
    """Yields each image, ``(1, 3, H, W)``; of a whole batch, several copies would be there at once."""
    batches = track(calibration.batches(1), 'calibration images', len(calibration))
    for name, batch in zip(calibration.ids, batches, strict=True):
        try:
            with torch.no_grad():
                image: Tensor = model.data_preprocessor(batch, False)['inputs']  # type: ignore[operator]
        except Exception as error:
            raise DataError(
                f'{type(model.data_preprocessor).__name__} cannot take the calibration images as their pipeline gives '
                f'them: {type(error).__name__}: {first_line(error)}'
            ) from error
        if not bool(torch.isfinite(image).all()):
            raise NonFiniteError(f"expected finite pixels, but got NaN or infinity in '{name}'")
        yield image


def _is_free(model: nn.Module, image: Tensor) -> bool:
    """Returns whether the model runs at the size of an image, and its graph is right for any size."""
    with suppress(Exception):
        return trace_image_graph(copy.deepcopy(model), image).free_size
    return False


def _put(image: Tensor, row: Tensor, model: nn.Module) -> bool:
    """Copies an image, ``(1, 3, h, w)``, into ``row``, ``(3, H, W)``, and pads it; returns whether it fits."""
    height, width = image.shape[2:]
    if height > row.shape[1] or width > row.shape[2]:
        return False
    if row.shape != image.shape[1:]:
        row.fill_(getattr(model.data_preprocessor, 'pad_value', 0))
    row[:, :height, :width] = image[0]
    return True


def example_of(images: Images) -> Tensor:
    """Returns a copy of the first two images, ``(2, 3, H, W)``, to trace with; a single image is repeated."""
    first: Tensor = grouped(images).parts[0]
    return torch.cat([first[:1], first[:2][-1:]])
