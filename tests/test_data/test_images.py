from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmbrecq.data.groups import Grouped
from mmbrecq.data.images import collect_images, example_of
from mmbrecq.errors import DataError, NonFiniteError


class Drawn:
    """Calibration images of the given sizes; the value of an image is its number plus one."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.images = [torch.full((3, *size), float(i + 1)) for i, size in enumerate(sizes)]
        self.ids = [f'{i}.png' for i in range(len(sizes))]
        self.first, self.ends = 0, [len(sizes)]

    def __len__(self) -> int:
        return len(self.images)

    def share(self, groups: Sequence[Sequence[int]] = ()) -> Drawn:
        found, order = Drawn([]), [number for group in groups for number in group] or range(len(self))
        found.images, found.ids = [self.images[i] for i in order], [self.ids[i] for i in order]
        found.ends = [sum(map(len, groups[: i + 1])) for i in range(len(groups))]
        return found

    def batches(self, size: int) -> Any:
        for start in range(0, len(self), size):
            yield {'inputs': self.images[start : start + size]}


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


def model(pad_value: float = 0, last: nn.Module | None = None) -> nn.Module:
    found = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *([last] if last else []))
    found.data_preprocessor = Preprocessor(pad_value)
    return found


def collect(drawn: Any, pad_value: float = 0) -> Any:
    return collect_images(model(pad_value), drawn)[0]


SIZES = [(4, 6), (4, 6), (8, 3), (5, 5), (2, 7), (6, 2)]


def check(images: Tensor, numbers: list[int], pad_value: float) -> None:
    """The images of these numbers, each at the top and the left of its place."""
    for number, image in zip(numbers, images, strict=True):
        height, width = SIZES[number]
        assert bool((image[:, :height, :width] == 2 * (number + 1)).all())
        assert bool((image[:, height:] == pad_value).all()) and bool((image[:, :, width:] == pad_value).all())


@pytest.mark.parametrize('pad_value', [0, 114])
def test_images_of_each_orientation_are_padded_together(pad_value: float) -> None:
    drawn = Drawn(SIZES)
    images, share = collect_images(model(pad_value), drawn)  # type: ignore[arg-type]
    assert isinstance(images, Grouped)
    assert [part.shape for part in images.parts] == [(4, 3, 5, 7), (2, 3, 8, 3)]
    check(images.parts[0], [0, 1, 3, 4], pad_value)
    check(images.parts[1], [2, 5], pad_value)
    assert share.ids == ['0.png', '1.png', '3.png', '4.png', '2.png', '5.png']
    assert list(images.ends) == list(share.ends) == [4, 6]


def test_the_group_of_the_larger_images_is_the_first() -> None:
    images = collect(Drawn([(4, 6), (7, 5), (4, 5)]))
    assert [part.shape for part in images.parts] == [(1, 3, 7, 5), (2, 3, 4, 6)]
    assert images[0:1][0, 0, 0, 0] == 4


def test_a_model_of_one_size_gets_images_of_one_size() -> None:
    """Its outputs have a weight for every position."""
    last = nn.Sequential(nn.Flatten(), nn.Linear(4 * 8 * 7, 2))
    images, share = collect_images(model(9, last), Drawn(SIZES))  # type: ignore[arg-type]
    assert isinstance(images, Tensor) and images.shape == (6, 3, 8, 7)
    check(images, [*range(6)], 9)
    assert share.ids == [f'{i}.png' for i in range(6)]


def test_images_of_one_orientation_are_one_tensor() -> None:
    images = collect(Drawn([SIZES[i] for i in (0, 1, 3, 4)]))
    assert images.shape == (4, 3, 5, 7)


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
        ([(4, 6), (4, 6), (3, 4), (5, 8), (5, 5)], [(4, 6), (5, 8)]),
    ],
)
def test_images_are_kept_once(sizes: list[tuple[int, int]], shapes: list[tuple[int, int]]) -> None:
    """They are read again where the first batch does not have the largest size."""
    allocate = Allocator()
    images: Any = collect_images(model(0), Drawn(sizes), allocate)[0]  # type: ignore[arg-type]
    assert allocate.shapes == [(5, 3, *shape) for shape in shapes]
    for number, (image, (height, width)) in enumerate(zip(images, sizes, strict=True)):
        expected = torch.zeros(3, *shapes[-1])
        expected[:, :height, :width] = 2 * (number + 1)
        assert torch.equal(image, expected)


def test_groups_are_kept_once_in_one_piece_of_memory() -> None:
    allocate = Allocator()
    images: Any = collect_images(model(0), Drawn(SIZES), allocate)[0]  # type: ignore[arg-type]
    assert allocate.shapes == [(6, 3, 4, 6), (4 * 3 * 5 * 7 + 2 * 3 * 8 * 3,)]
    assert len({part.untyped_storage().data_ptr() for part in images.parts}) == 1


def test_images_of_one_size_are_not_padded() -> None:
    images = collect(Drawn([(4, 6)] * 3), 114)
    assert images.shape == (3, 3, 4, 6)
    assert images[:, 0, 0, 0].tolist() == [2, 4, 6]


def test_what_the_preprocessor_cannot_take() -> None:
    drawn = Drawn([(4, 4)] * 2)
    drawn.share = lambda groups=(): drawn  # type: ignore[method-assign, assignment]
    drawn.batches = lambda size: [{'image': drawn.images}] * 2  # type: ignore[method-assign]
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
    assert torch.equal(example_of(Grouped([images[:1], images[1:]], [1, 3])), images[[0, 0]])
