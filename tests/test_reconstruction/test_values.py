from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from mmbrecq.errors import StorageError
from mmbrecq.reconstruction.values import (
    CachedValues,
    FileValues,
    MemoryValues,
    MirroredValues,
    empty,
    laid_out,
    memory_format,
)


class Block(nn.Module):
    def __init__(self, groups: int, flatten: bool = False) -> None:
        super().__init__()
        self.conv, self.flatten = nn.Conv2d(4, 4, 3, groups=groups), flatten

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.view(y.size(0), -1) if self.flatten else y


@pytest.mark.parametrize(
    ('block', 'expected'),
    [
        (Block(4), torch.channels_last),
        (Block(1), torch.contiguous_format),
        (Block(2), torch.contiguous_format),
        (Block(4, flatten=True), torch.contiguous_format),
    ],
    ids=['depthwise', 'dense', 'grouped', 'flattened'],
)
def test_depthwise_units_have_channels_innermost(block: nn.Module, expected: torch.memory_format) -> None:
    assert memory_format(fx.symbolic_trace(block)) == expected


def test_on_a_gpu_all_units_with_convolutions_have_channels_innermost() -> None:
    with FakeTensorMode(), torch.device('cuda'):
        block, linear = fx.symbolic_trace(Block(1)), fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    assert memory_format(block) == torch.channels_last
    assert memory_format(linear) == torch.contiguous_format


def test_a_module_that_is_no_graph_stays_as_it_is() -> None:
    assert memory_format(Block(4)) == torch.contiguous_format


def test_images_are_laid_out_and_vectors_are_not() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert laid_out(x, torch.contiguous_format) is x
    last = laid_out(x, torch.channels_last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, x)
    vectors = torch.randn(2, 3)
    assert laid_out(vectors, torch.channels_last) is vectors


CPU = torch.device('cpu')
SHAPES = [(7, 3, 2), (7,), (7, 1, 5, 5)]
INDICES = [
    slice(0, 7), slice(2, 5), slice(5, 100), slice(3, 3), torch.tensor([4, 0, 6]), torch.tensor([2, 2]), torch.arange(7)
]  # fmt: skip


def make(
    place: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    folder: Path,
    layout: torch.memory_format = torch.contiguous_format,
) -> CachedValues:
    if place == 'memory':
        return MemoryValues(empty(shape, layout, dtype=dtype), CPU)
    return FileValues(folder, shape, dtype, CPU, layout)


def random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def open_files() -> int:
    return len(os.listdir('/proc/self/fd'))


@pytest.mark.parametrize('index', INDICES, ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('place', ['memory', 'file'])
def test_what_is_written_is_read(tmp_path: Path, place: str, shape: tuple[int, ...], index: Tensor | slice) -> None:
    values, expected = make(place, shape, torch.float32, tmp_path), random(shape)
    for start in (5, 0, 2):
        values.write(start, expected[start : start + 3])
    found = values[index]
    assert (len(values), values.sample_shape) == (7, shape[1:])
    assert (found.dtype, found.device) == (torch.float32, CPU)
    np.testing.assert_array_equal(found.numpy(), expected.numpy()[index.numpy() if torch.is_tensor(index) else index])


@pytest.mark.parametrize('place', ['memory', 'file'])
def test_bfloat16_rounds_to_8_significant_bits(tmp_path: Path, place: str) -> None:
    values, exact = make(place, (7, 3, 2), torch.bfloat16, tmp_path), random((7, 3, 2))
    values.write(0, exact)
    mantissa, exponent = np.frexp(exact.numpy())
    rounded = np.ldexp(np.rint(mantissa * 2**8) / 2**8, exponent)
    for index in (slice(0, 7), torch.arange(7)):
        assert values[index].dtype == torch.float32
        np.testing.assert_array_equal(values[index].numpy(), rounded)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('place', ['memory', 'file'])
def test_a_batch_may_lie_in_memory_in_any_way(tmp_path: Path, place: str, layout: torch.memory_format) -> None:
    values, expected = make(place, (7, 4, 3, 2), torch.float32, tmp_path), random((7, 4, 3, 2))
    values.write(0, expected.to(memory_format=layout).requires_grad_(True))
    assert torch.equal(values[:], expected)


@pytest.mark.parametrize('shape', [(7, 4, 3, 2), (7, 4, 1, 1), (7, 1, 3, 2), (7, 4, 3), (7, 4)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('place', ['memory', 'file'])
def test_images_come_in_the_order_that_was_asked_for(
    tmp_path: Path, place: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    values = make(place, shape, dtype, tmp_path, torch.channels_last)
    expected = random(shape).to(dtype).float()
    values.write(0, expected[:4])
    values.write(4, expected[4:])
    for index in (slice(0, 7), slice(2, 5), torch.tensor([4, 0, 6])):
        found = values[index]
        assert torch.equal(found, expected[index]) and values.sample_shape == shape[1:]
        assert laid_out(found, torch.channels_last) is found


def test_a_file_has_no_name_and_closes_with_its_values(tmp_path: Path) -> None:
    before = open_files()
    values = make('file', (7, 3), torch.float32, tmp_path)
    assert not list(tmp_path.iterdir())
    assert open_files() == before + 1
    del values
    gc.collect()
    assert open_files() == before


@pytest.mark.parametrize('most', [1, 7, 10**9])
def test_calls_that_move_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """The system may read and write less than it was asked for."""
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, 'preadv', lambda file, buffers, offset: read(file, [buffers[0][:most]], offset))
    monkeypatch.setattr(os, 'pwrite', lambda file, buffer, offset: write(file, buffer[:most], offset))
    values, expected = make('file', (7, 3, 2), torch.float32, tmp_path), random((7, 3, 2))
    values.write(0, expected)
    assert torch.equal(values[:], expected)
    assert torch.equal(values[torch.tensor([6, 1])], expected[[6, 1]])


def test_a_file_that_was_cut(tmp_path: Path) -> None:
    file: FileValues = make('file', (7, 3), torch.float32, tmp_path)  # type: ignore[assignment]
    os.truncate(file._file, 40)
    with pytest.raises(StorageError, match='^a file of activations ends 44 bytes early$'):
        file[:]


def test_a_disk_without_room(tmp_path: Path) -> None:
    before = open_files()
    with pytest.raises(StorageError, match=rf'^{tmp_path} cannot hold \S+ TB of activations: '):
        FileValues(tmp_path, (2**20, 2**30), torch.float32, CPU)
    gc.collect()
    assert (list(tmp_path.iterdir()), open_files()) == ([], before)


@pytest.mark.parametrize('place', ['memory', 'file'])
def test_mirror_images_follow_the_images(tmp_path: Path, place: str) -> None:
    images = random((7, 3, 4, 5))
    values = make(place, images.shape, torch.float32, tmp_path)
    values.write(0, images)
    mirrored = MirroredValues(values)
    both = np.concatenate([images.numpy(), images.numpy()[..., ::-1]])
    indices: list[Callable[[], Tensor] | Tensor | slice] = [slice(0, 14), slice(5, 9), torch.tensor([13, 0, 6, 7])]
    for index in indices:
        np.testing.assert_array_equal(mirrored[index].numpy(), both[index.numpy() if torch.is_tensor(index) else index])
    assert (len(mirrored), mirrored.sample_shape) == (14, (3, 4, 5))
    assert torch.equal(values[:], images)
