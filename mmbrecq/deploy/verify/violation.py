"""What the verifier is told to expect, and what it finds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

Faults = Iterator[tuple[str, str]]
"""What the check of one rule finds: names of nodes, each with a sentence; see :class:`Violation`."""


@dataclass(frozen=True)
class Violation:
    """One broken rule.

    Args:
        rule: Id of the rule, such as ``'C1'``.
        node: Name of the node that breaks it; the graph's name where no single node does.
        message: One sentence: what is expected, what was found.
    """

    rule: str
    node: str
    message: str

    def __str__(self) -> str:
        return f'{self.rule} {self.node}: {self.message}'


class Grid(NamedTuple):
    """An activation grid: scales and zero-points, one or one per channel, and the smallest and the largest integer."""

    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    low: int
    high: int


@dataclass(frozen=True)
class ExpectedQuantization:
    """What the quantized torch model says about the ONNX file that was written from it.

    Args:
        layers: Number of convolution and linear calls with quantized weights; a layer that is called once per pyramid
            level counts once per call.
        weights: Path of a layer, with which the name of its integers begins -> smallest and largest integer; None
            leaves weights unchecked.
        activations: Grids of all activation quantizers; None leaves them unchecked. They are known by their values,
            because an exporter shares constants that are equal, and inlines others without a name.
    """

    layers: int
    weights: Mapping[str, tuple[int, int]] | None = None
    activations: frozenset[Grid] | None = None
