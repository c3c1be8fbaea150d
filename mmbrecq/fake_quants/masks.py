"""Random masks for the dropping of quantization (QDrop, Wei et al., ICLR 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmbrecq.fake_quants.native import kernels, lies_as, takes

PLACES = 2**16
"""Places of the pool at which a mask may begin."""
ALIGNMENT = 16
"""Elements from one place to the next."""
DRAWN = 64
"""Places that are drawn at once."""


class RandomMasks:
    """Masks of ones with a given probability, and zeros.

    On a CPU random numbers come one by one and would take a good part of a training step. So they are drawn once, into
    a pool a little larger than the largest tensor, and a mask is a view of the pool that begins at a random place.
    Masks are read only; those of different steps and tensors share memory, also in the backward pass.

    Args:
        prob: Probability of a one, in (0, 1]; taken to the next of 1/256 .. 1.
        generator: Source of all draws, on the CPU.
    """

    def __init__(self, prob: float, generator: torch.Generator) -> None:
        self.prob, self.generator = prob, generator
        self._pool = torch.empty(0, dtype=torch.uint8)
        self._places: list[int] = []

    def draw(self, like: Tensor) -> Tensor:
        """Bytes, 0 or 1, with the shape and device of ``like``, and its order in memory where that has no gaps."""
        size = like.numel() + PLACES * ALIGNMENT
        if self._pool.numel() < size or self._pool.device != like.device:
            # one 64-bit draw serves eight elements
            draws = torch.empty((size + 7) // 8, dtype=torch.int64).random_(-(2**63), None, generator=self.generator)
            # 256 would not fit the bytes that it is compared with
            ones = draws.view(torch.uint8)[:size] <= max(round(self.prob * 256), 1) - 1
            self._pool = ones.view(torch.uint8).to(like.device)
        if not self._places:
            # one by one, draws of the places take longer than many a mask is read
            self._places = torch.randint(PLACES, (DRAWN,), generator=self.generator).tolist()
        start = ALIGNMENT * self._places.pop()
        dense = like.is_contiguous() or (like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last))
        # element by element along memory, as what it is held against
        strides = like.stride() if dense else torch.empty(like.shape, device='meta').stride()
        return self._pool.as_strided(like.shape, strides, start)


def mix_(x: Tensor, other: Tensor, keep: Tensor) -> None:
    """Puts ``other`` in the place of ``x`` wherever the mask ``keep`` is 0; all of the same shape."""
    native = kernels() if takes(x, other) and lies_as(keep, x) else None
    if native is None:
        torch.lerp(other, x, keep.to(x.dtype), out=x)
    else:
        native.mix_(x, other, keep)
