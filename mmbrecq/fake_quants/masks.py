"""Random masks for the dropping of quantization (QDrop, Wei et al., ICLR 2022)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mmbrecq.kernels.native import is_dense, kernel

STARTS = 2**16
"""Positions of the pool at which a mask may begin."""
ALIGNMENT = 16
"""Elements from one such position to the next."""
DRAWN = 64
"""Positions that are drawn at once."""


class RandomMasks:
    """Draws masks of ones with a given probability, and zeros.

    On a CPU random numbers come one by one and would take up to a fifth of an iteration. So they are drawn once, into a
    pool a little larger than the largest tensor, and a mask is a view of the pool that begins at a random position.
    Masks are read only; those of different iterations and tensors share memory, also in the backward pass.

    Args:
        prob: Probability of a one, in (0, 1]; rounded to the next of 1/256 .. 1.
        generator: Source of all draws, on the CPU.

    Example:
        >>> masks = RandomMasks(0.5, torch.Generator().manual_seed(0))
        >>> masks.draw(torch.zeros(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(self, prob: float, generator: torch.Generator) -> None:
        self.prob, self.generator = prob, generator
        self._pool = torch.empty(0, dtype=torch.uint8)
        self._starts: list[int] = []
        # where there is a list, what is drawn is added; what is fixed is drawn by a CUDA graph while it is captured
        self.drawn: list[Tensor] | None = None
        self.fixed: Iterator[Tensor] | None = None

    def draw(self, like: Tensor) -> Tensor:
        """Draws a mask of bytes, 0 or 1, with the shape of ``like`` and its order in memory where that has no gaps."""
        if self.fixed is not None:
            return next(self.fixed)
        size = like.numel() + STARTS * ALIGNMENT
        if self._pool.numel() < size or self._pool.device != like.device:
            # one 64-bit draw serves eight elements
            draws = torch.empty((size + 7) // 8, dtype=torch.int64).random_(-(2**63), None, generator=self.generator)
            # 256 would not fit the bytes that it is compared with
            ones = draws.view(torch.uint8)[:size] <= max(round(self.prob * 256), 1) - 1
            self._pool = ones.view(torch.uint8).to(like.device)
        if not self._starts:
            # one by one, draws of the positions take longer than many a mask is read
            self._starts = torch.randint(STARTS, (DRAWN,), generator=self.generator).tolist()
        strides = like.stride() if is_dense(like) else torch.empty(like.shape, device='meta').stride()
        mask = self._pool.as_strided(like.shape, strides, ALIGNMENT * self._starts.pop())
        if self.drawn is not None:
            self.drawn.append(mask)
        return mask


def mix_(x: Tensor, other: Tensor, keep: Tensor) -> None:
    """Puts ``other`` in the place of ``x`` wherever the mask ``keep`` is 0; all of the same shape."""
    if run := kernel('mix', x, other, keep):
        run(x, other, keep)
    else:
        torch.lerp(other, x, keep.to(x.dtype), out=x)
