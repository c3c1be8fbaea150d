from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mmbrecq.data.groups import Grouped, batches_of, grouped, joined

WIDE, HIGH = torch.arange(30.0).reshape(5, 2, 3), 100 + torch.arange(18.0).reshape(3, 3, 2)


class Room:
    """Memory that is written as a cache's is."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.tensor = torch.full(tuple(shape), -1.0)

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor[index]

    def write(self, start: int, batch: Tensor) -> None:
        self.tensor[start : start + len(batch)] = batch


@pytest.fixture
def both() -> Grouped:
    return Grouped([WIDE, HIGH], [5, 8])


def test_values_are_read_within_a_group(both: Grouped) -> None:
    assert len(both) == 8 and both.starts == [0, 5, 8]
    assert torch.equal(both[1:4], WIDE[1:4]) and torch.equal(both[:2], WIDE[:2])
    assert torch.equal(both[5:7], HIGH[:2]) and torch.equal(both[6:20], HIGH[1:])
    assert torch.equal(both[torch.tensor([4, 0, 2])], WIDE[[4, 0, 2]])
    assert torch.equal(both[torch.tensor([7, 5])], HIGH[[2, 0]])


@pytest.mark.parametrize('index', [[0, 6], [6, 0]])
def test_values_of_two_groups_are_no_batch(both: Grouped, index: list[int]) -> None:
    with pytest.raises(IndexError):
        both[torch.tensor([*index, 4])]


def test_the_first_values_may_be_of_several_groups(both: Grouped) -> None:
    part = both[:6]
    assert part.starts == [0, 5, 6] and torch.equal(part[5:6], HIGH[:1])
    assert len(both[:0]) == 0 and len(both[2:2]) == 0
    whole = both[:]
    assert [torch.equal(*pair) for pair in zip(whole.parts, (WIDE, HIGH), strict=True)] == [True, True]


def test_each_group_is_allocated_with_its_own_shape_when_it_is_written(both: Grouped) -> None:
    values = Grouped((), both.ends, both.starts, Room)
    values.write(0, WIDE[:2])
    assert [len(part) for part in values.parts] == [5]
    values.write(2, WIDE[2:])
    values.write(5, HIGH)
    assert torch.equal(values[:5], WIDE) and torch.equal(values[5:], HIGH)
    values.write(6, 2 * HIGH[1:2])
    assert torch.equal(values[6:7], 2 * HIGH[1:2])


def test_batches_end_where_a_group_does(both: Grouped) -> None:
    assert batches_of(both, 4) == [slice(0, 4), slice(4, 5), slice(5, 8)]
    assert batches_of(WIDE, 4) == [slice(0, 4), slice(4, 5)]
    # images 3 to 11 of two groups of 6 and 8 images
    share = Grouped([WIDE[:3], torch.cat([HIGH, HIGH[:2]])], [6, 14])
    assert batches_of(share, 4, first=3) == [slice(0, 1), slice(1, 3), slice(3, 7), slice(7, 8)]


def test_batches_of_one_shape_are_joined() -> None:
    found = joined([WIDE[:2], WIDE[2:], HIGH[:1], HIGH[1:]])
    assert isinstance(found, Grouped)
    assert [torch.equal(*pair) for pair in zip(found.parts, (WIDE, HIGH), strict=True)] == [True, True]
    assert torch.equal(joined([WIDE[:2], WIDE[2:]]), WIDE)  # type: ignore[arg-type]


def test_values_without_groups_are_one(both: Grouped) -> None:
    assert grouped(both) is both
    one = grouped(WIDE)
    assert one.parts == [WIDE] and one.starts == [0, 5] and not one.ends
