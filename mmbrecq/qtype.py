"""Defines the grid of a quantized tensor: one frozen value that owns bits, range and granularity."""

from dataclasses import dataclass

import torch

from mmbrecq.errors import ConfigError

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class QType:
    """An integer grid ``{quant_min, ..., quant_max}``.

    Args:
        bits: Bit-width, 2 to 8.
        symmetric: Zero-point fixed at 0. A symmetric grid maps real 0 to integer 0.
        signed: Two's complement range, else ``0 .. 2**bits - 1``.
        ch_axis: Axis with one scale per index, or None for one scale per tensor.
        spare_bits: Shrinks the range by this many bits inside the same container; 1 keeps an 8-bit
            weight within 7 bits, where a kernel accumulates pairs of products in 16 bits.
        int8_only: Stores an unsigned grid in int8 too, for a backend that has no uint8; 7 bits at most.
    """

    bits: int
    symmetric: bool = True
    signed: bool = True
    ch_axis: int | None = None
    spare_bits: int = 0
    int8_only: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise ConfigError(f'expected bits in {MIN_BITS}..{MAX_BITS}, but got {self.bits!r}')
        if not 0 <= self.spare_bits <= self.bits - MIN_BITS:
            raise ConfigError(f'expected spare_bits to leave {MIN_BITS} of {self.bits} bits, but got {self.spare_bits}')

    @property
    def quant_min(self) -> int:
        """Smallest integer of the grid."""
        return -(1 << (self.bits - self.spare_bits - 1)) if self.signed else 0

    @property
    def quant_max(self) -> int:
        """Largest integer of the grid."""
        bits = self.bits - self.spare_bits
        return (1 << (bits - 1)) - 1 if self.signed else (1 << bits) - 1

    @property
    def levels(self) -> int:
        """Number of integers of the grid."""
        return self.quant_max - self.quant_min + 1

    @property
    def container(self) -> torch.dtype:
        """8-bit integer dtype that holds the grid."""
        return torch.int8 if self.signed or self.int8_only else torch.uint8

    def scale_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Returns the shape of scale and zero-point for a tensor of ``shape``: ``()`` or ``(shape[ch_axis],)``."""
        return () if self.ch_axis is None else (shape[self.ch_axis],)
