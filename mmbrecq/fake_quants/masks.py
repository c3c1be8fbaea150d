"""Random masks for the dropping of quantization (QDrop, Wei et al., ICLR 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

PLACES = 2**16
"""Places of the pool at which a mask may begin."""
ALIGNMENT = 16
"""Elements from one place to the next: a cache line of float32."""


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
        self._pool = torch.empty(0)

    def draw(self, like: Tensor) -> Tensor:
        """A mask with the shape, dtype and device of ``like``, and its order in memory where that has no gaps."""
        size = like.numel() + PLACES * ALIGNMENT
        if self._pool.numel() < size or (self._pool.dtype, self._pool.device) != (like.dtype, like.device):
            # one 64-bit draw serves eight elements
            draws = torch.empty((size + 7) // 8, dtype=torch.int64).random_(-(2**63), None, generator=self.generator)
            # 256 would not fit the bytes that it is compared with
            ones = draws.view(torch.uint8)[:size] <= max(round(self.prob * 256), 1) - 1
            self._pool = ones.to(like.device, like.dtype)
        start = ALIGNMENT * int(torch.randint(PLACES, (), generator=self.generator))
        part = self._pool[start : start + like.numel()]
        if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
            # element by element along memory, as what it is held against
            return part.as_strided(like.shape, like.stride())
        return part.view(like.shape)
