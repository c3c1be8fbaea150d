"""Options of an analysis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmbrecq.errors import ConfigError
from mmbrecq.qtype import MAX_BITS, MIN_BITS
from mmbrecq.quantizers.options import FLOAT

LOSSES = ('outputs', 'fisher')


@dataclass(frozen=True)
class AnalysisOptions:
    """Options of an analysis, as a config gives them.

    Args:
        candidates: Numbers of bits of weights, 2 to 8, and ``'float'``.
        activation_candidates: Numbers of bits of activations, 2 to 8; empty leaves them as the config has them.
        pairs: Whether two layers of a unit are measured together, at the fewest bits.
        images: How many of the calibration images the losses are measured on; None for all.
        loss: ``outputs``, how far the outputs are from the float ones, or ``fisher``, by how much the task loss of the
            annotated images rises, see :class:`~mmbrecq.mixed_precision.sensitivity.measure.OutputLoss`.
    """

    candidates: Sequence[int | str] = (2, 4, 8)
    activation_candidates: Sequence[int] = ()
    pairs: bool = True
    images: int | None = None
    loss: str = 'outputs'

    def __post_init__(self) -> None:
        numbers = [b for b in self.candidates if b != FLOAT] if _distinct(self.candidates) else []
        if not numbers or len(self.candidates) < 2 or not _all_bits(numbers):
            raise ConfigError(
                f'expected search.candidates to be two or more different integers in {MIN_BITS}..{MAX_BITS}, one of '
                f"which may be '{FLOAT}', but got {self.candidates!r}"
            )
        if not _distinct(self.activation_candidates) or not _all_bits(self.activation_candidates):
            raise ConfigError(
                f'expected search.activation_candidates to be different integers in {MIN_BITS}..{MAX_BITS}, but got '
                f'{self.activation_candidates!r}'
            )
        if self.images is not None and (type(self.images) is not int or self.images < 1):
            raise ConfigError(f'expected search.images to be an integer >= 1, but got {self.images!r}')
        if self.loss not in LOSSES:
            raise ConfigError(f'expected search.loss to be one of {list(LOSSES)}, but got {self.loss!r}')

    @property
    def bits(self) -> list[int]:
        """The candidates that are numbers, the fewest bits first."""
        return sorted(b for b in self.candidates if isinstance(b, int))


def _distinct(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and len(set(values)) == len(values)


def _all_bits(values: Sequence[Any]) -> bool:
    return all(type(b) is int and MIN_BITS <= b <= MAX_BITS for b in values)
