"""Values of images of several sizes: groups of one size each, and batches that are of one group."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mmbrecq.distributed import aligned_batches


class Grouped:
    """One value of images of several sizes: those of one size are a group, and lie together.

    Args:
        parts: Values of each group, ``(n, ...)``.
        ends: Where groups end among the images of all processes.
        starts: Where they begin among those of this process, and where the last one ends, if parts are missing.
        allocate: Allocates a missing part of a shape when it is first written.
    """

    def __init__(
        self, parts: Iterable[Any], ends: Sequence[int], starts: Sequence[int] = (), allocate: Any = None
    ) -> None:
        self.parts, self.ends, self._allocate = list(parts), ends, allocate
        self.starts = starts or [0, *accumulate(map(len, self.parts))]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: Tensor | slice, /) -> Any:
        """Reads the values of images of one group; a slice may be of several, which then are groups again."""
        if isinstance(index, Tensor):
            number = bisect_right(self.starts, int(index[0])) - 1
            return self.parts[number][index - self.starts[number]]
        first, stop, _ = index.indices(len(self))
        pairs = zip(self.parts, self.starts, strict=False)
        found = [part[max(first - s, 0) : stop - s] for part, s in pairs if s < stop and first < s + len(part)]
        return found[0] if len(found) == 1 else Grouped(found or [self.parts[0][:0]], ())

    def write(self, start: int, batch: Tensor) -> None:
        """Sets the values of the images from ``start`` on, all of one group."""
        number = bisect_right(self.starts, start) - 1
        first, stop = self.starts[number : number + 2]
        if number == len(self.parts):
            self.parts.append(self._allocate((stop - first, *batch.shape[1:])))
        self.parts[number].write(start - first, batch)


Images: TypeAlias = Tensor | Grouped
"""Preprocessed images: a tensor ``(N, C, H, W)``, or groups of such tensors of several heights and widths."""


def grouped(values: Any) -> Grouped:
    """Returns values without groups as a single one."""
    return values if isinstance(values, Grouped) else Grouped([values], ())


def batches_of(values: Any, size: int, first: int | None = None) -> list[slice]:
    """Returns batches of one group; with the number of the first image, as a single process would have them."""
    groups = grouped(values)
    return aligned_batches(len(values), size, first or 0, groups.starts if first is None else groups.ends)


def joined(batches: Iterable[Tensor]) -> Images:
    """Returns batches as one value; those of one shape that follow each other become one tensor."""
    parts = [torch.cat(list(run)) for _, run in groupby(batches, lambda batch: batch.shape[1:])]
    return parts[0] if len(parts) == 1 else Grouped(parts, ())
