from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmbrecq.data.images import collect_images, example_of
from mmbrecq.errors import DataError, NonFiniteError


class Drawn:
    """Calibration images of the given sizes, two a batch; the value of an image is its number plus one."""

    batch_size = 2

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.images = [torch.full((3, *size), float(i + 1)) for i, size in enumerate(sizes)]
        self.ids = [f'{i}.png' for i in range(len(sizes))]

    def __len__(self) -> int:
        return len(self.images)

    def batches(self) -> Any:
        for start in range(0, len(self), 2):
            yield {'inputs': self.images[start : start + 2]}


class Preprocessor:
    """Doubles, and pads to the largest of a batch, as mmdet's does."""

    def __init__(self, pad_value: float) -> None:
        self.pad_value = pad_value

    def __call__(self, batch: Any, training: bool) -> dict[str, Tensor]:
        assert not training
        height, width = (max(image.shape[axis] for image in batch['inputs']) for axis in (1, 2))
        padded = torch.full((len(batch['inputs']), 3, height, width), float(self.pad_value))
        for place, image in zip(padded, batch['inputs'], strict=True):
            place[:, : image.shape[1], : image.shape[2]] = 2 * image
        return {'inputs': padded}


def model(pad_value: float = 0) -> nn.Module:
    found: Any = SimpleNamespace(data_preprocessor=Preprocessor(pad_value))
    return found


def collect(drawn: Any, pad_value: float = 0) -> Tensor:
    return collect_images(model(pad_value), drawn)


@pytest.mark.parametrize('pad_value', [0, 114])
def test_images_of_several_sizes_are_padded_together(pad_value: float) -> None:
    sizes = [(4, 6), (4, 6), (8, 3), (5, 5), (2, 7)]
    images = collect(Drawn(sizes), pad_value)
    assert images.shape == (5, 3, 8, 7)
    for number, (image, (height, width)) in enumerate(zip(images, sizes, strict=True)):
        assert bool((image[:, :height, :width] == 2 * (number + 1)).all())
        assert bool((image[:, height:] == pad_value).all()) and bool((image[:, :, width:] == pad_value).all())


class Allocator:
    """Fills what it allocates with 7, and counts the images of each reading; one tensor lives at a time."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._last: Any = lambda: None

    def __call__(self, shape: Any, like: Tensor) -> Tensor:
        assert self._last() is None, 'two copies of all images are there at once'
        self.shapes.append(tuple(shape))
        images = torch.full(tuple(shape), 7.0, dtype=like.dtype)
        self._last = weakref.ref(images)
        return images


@pytest.mark.parametrize(
    ('sizes', 'shapes'),
    [
        ([(4, 6), (3, 6), (4, 5), (2, 2), (4, 6)], [(4, 6)]),
        ([(4, 6), (4, 6), (6, 4), (4, 6), (5, 5)], [(4, 6), (6, 6)]),
    ],
)
def test_images_are_kept_once(sizes: list[tuple[int, int]], shapes: list[tuple[int, int]]) -> None:
    """They are read again where the first batch does not have the largest size."""
    allocate = Allocator()
    images = collect_images(model(0), Drawn(sizes), allocate)  # type: ignore[arg-type]
    assert allocate.shapes == [(5, 3, *shape) for shape in shapes]
    for number, (image, (height, width)) in enumerate(zip(images, sizes, strict=True)):
        expected = torch.zeros(3, *shapes[-1])
        expected[:, :height, :width] = 2 * (number + 1)
        assert torch.equal(image, expected)


def test_images_of_one_size_are_not_padded() -> None:
    images = collect(Drawn([(4, 6)] * 3), 114)
    assert images.shape == (3, 3, 4, 6)
    assert images[:, 0, 0, 0].tolist() == [2, 4, 6]


def test_what_the_preprocessor_cannot_take() -> None:
    drawn = Drawn([(4, 4)] * 2)
    drawn.batches = lambda: [{'image': drawn.images}]  # type: ignore[method-assign]
    message = "^Preprocessor cannot take the calibration images as their pipeline gives them: KeyError: 'inputs'$"
    with pytest.raises(DataError, match=message):
        collect(drawn)


def test_an_image_that_is_not_finite_is_named() -> None:
    drawn = Drawn([(4, 4)] * 4)
    drawn.images[2][1, 3, 3] = float('nan')
    with pytest.raises(NonFiniteError, match=r"NaN or infinity in '2\.png'"):
        collect(drawn)


def test_an_example_is_two_images_of_its_own() -> None:
    images = torch.arange(12.0).reshape(3, 1, 2, 2)
    example = example_of(images)
    assert torch.equal(example, images[:2]) and example.untyped_storage().nbytes() == 32
    assert torch.equal(example_of(images[2:]), images[[2, 2]])
