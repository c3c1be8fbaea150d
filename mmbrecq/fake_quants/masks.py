"""Random masks for the dropping of quantization (QDrop, Wei et al., ICLR 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmbrecq.kernels.native import kernels, takes

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

    def draw(self, like: Tensor) -> Mask:
        """A mask for a tensor."""
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
        return Mask(self._pool, ALIGNMENT * self._places.pop())


class Mask:
    """Bytes, 0 or 1, one for each element of a tensor in the order in which they lie in memory.

    Args:
        pool (Tensor): ``(n,)`` bytes.
        start: Where in the pool the mask begins.
    """

    __slots__ = ('pool', 'start')

    def __init__(self, pool: Tensor, start: int = 0) -> None:
        self.pool, self.start = pool, start

    @property
    def address(self) -> int:
        """Of the first byte."""
        return self.pool.data_ptr() + self.start

    def of(self, x: Tensor) -> Tensor:
        """The mask as a tensor with the shape of ``x``, and its order in memory where that has no gaps."""
        dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        strides = x.stride() if dense else torch.empty(x.shape, device='meta').stride()
        return self.pool.as_strided(x.shape, strides, self.start)


def mix_(x: Tensor, other: Tensor, keep: Mask) -> None:
    """Puts ``other`` in the place of ``x`` wherever the mask ``keep`` is 0; all of the same shape."""
    native = kernels() if takes(x, other) else None
    if native is None:
        torch.lerp(other, x, keep.of(x).to(x.dtype), out=x)
    else:
        native.mix_(x, other, keep.address)
