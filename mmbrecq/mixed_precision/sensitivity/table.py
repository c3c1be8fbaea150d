"""The groups of activations that an analysis measures, and the table that it writes."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmbrecq.errors import TableError
from mmbrecq.graph.roles import joined
from mmbrecq.mixed_precision.costs.models import FLOAT_BITS, LayerShape
from mmbrecq.quantizers.quantized_model import QuantizedGraph
from mmbrecq.schema import load_json


@dataclass(frozen=True)
class ValueGroup:
    """Activations that have one number of bits, and the layers that read them, in the order of the network."""

    quantizers: tuple[str, ...]
    layers: tuple[str, ...]


def value_groups(graph: QuantizedGraph, searched: Collection[str]) -> list[ValueGroup]:
    """Returns the activations of one prepared graph whose bits can be chosen.

    A value that several layers read has one quantizer, and a layer that pyramid levels share reads several values: all
    values connected in this way are one group. A group that a layer outside ``searched`` reads, too, keeps its bits.
    """
    order = {layer.name: index for index, layer in enumerate(graph.layers)}
    pairs = [(layer, path) for layer, paths in graph.read_quantizers().items() for path in paths]
    found = []
    for group in joined(pairs):
        layers = sorted(set(group) & order.keys(), key=order.__getitem__)
        if set(layers) <= set(searched):
            found.append(ValueGroup(tuple(sorted(set(group) - order.keys())), tuple(layers)))
    return sorted(found, key=lambda group: order[group.layers[0]])


@dataclass
class SensitivityTable:
    """The rise of the loss with each layer alone at each number of bits, and with two layers of a unit together.

    Args:
        kind: Of the loss, see :class:`~mmbrecq.mixed_precision.sensitivity.measure.OutputLoss`.
        candidates: Numbers of bits of weights; 32 is float.
        layers: Shapes of all quantized layers, in the order of the network.
        searched: Names of those whose bits are to be chosen; the others keep theirs, the first and the last for one.
        units: Unit of every layer.
        other_bytes: Bytes of the parameters that are no weight of these layers.
        inputs: What the figures depend on; an analysis is continued only where it is the same.
        loss: ``{layer: {bits: rise}}``.
        pairs: ``{(layer, layer): {bits: rise of both}}``, beyond the sum of the two.
        images: How many calibration images the losses are of; None for all.
        activation_candidates: Numbers of bits of activations; empty where they are not searched.
        values: Activations whose bits are to be chosen, by the first layer that reads them.
        activation_loss: ``{first layer: {bits: rise}}`` with the activations of one group alone.
    """

    kind: str
    candidates: list[int]
    layers: list[LayerShape]
    searched: list[str]
    units: dict[str, str]
    other_bytes: int
    inputs: dict[str, Any]
    loss: dict[str, dict[int, float]] = field(default_factory=dict)
    pairs: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    images: int | None = None
    activation_candidates: list[int] = field(default_factory=list)
    values: dict[str, ValueGroup] = field(default_factory=dict)
    activation_loss: dict[str, dict[int, float]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> SensitivityTable:
        """Reads the file; TableError if it is missing, or is no such file, or holds what no loss can be."""
        table = load_json(cls, path, 'tools/analyze.py')
        pairs = {' '.join(pair): row for pair, row in table.pairs.items()}
        inputs = {f'the input of {name}': row for name, row in table.activation_loss.items()}
        for name, row in {**table.loss, **pairs, **inputs}.items():
            for bits, value in row.items():
                if not math.isfinite(value):
                    raise TableError(f"{path}: expected a finite loss of '{name}' at {bits} bits, but got {value}")
        return table

    def check_complete(self, path: Path) -> None:
        """Raises TableError where a layer or a number of bits has not been measured."""
        weights = [('layer', self.loss, name, bits) for name in self.searched for bits in self.candidates]
        groups = [(name, bits) for name in self.values for bits in self.activation_candidates]
        inputs = [('the input of layer', self.activation_loss, name, bits) for name, bits in groups]
        for what, losses, name, bits in [*weights, *inputs]:
            if bits not in losses.get(name, {}):
                raise TableError(f"{path}: expected the loss of {what} '{name}' at {bits} bits, but it has none")

    def with_float(self) -> SensitivityTable:
        """Returns the table with float among the candidates of weights, which needs no measurement."""
        numbers = [bits for bits in self.candidates if bits != FLOAT_BITS]
        loss = {name: {**self.loss.get(name, {}), FLOAT_BITS: 0.0} for name in self.searched}
        return replace(self, candidates=[*numbers, FLOAT_BITS], loss=loss)

    @property
    def choices(self) -> list[tuple[int | None, int | None]]:
        """The candidates of a layer: bits of its weight, None for float, and of its input, None for those it has."""
        weights = [None if bits == FLOAT_BITS else bits for bits in self.candidates]
        inputs: list[int | None] = [*self.activation_candidates]
        return [(w, a) for w in weights for a in inputs or [None]]

    @property
    def group_of(self) -> dict[str, str]:
        """The key in :attr:`values` of the activations that a layer reads, for the layers that read some."""
        return {layer: name for name, group in self.values.items() for layer in group.layers}

    def losses(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Returns ``(searched layers, choices)``; the layers of a group share the loss of its activations."""
        rows, group_of = [], self.group_of
        for layer in self.searched:
            name = group_of.get(layer)
            inputs = {} if name is None else self.activation_loss[name]
            share = 0.0 if name is None else 1 / len(self.values[name].layers)
            rows.append([self.loss[layer][w or FLOAT_BITS] + share * inputs.get(a or 0, 0.0) for w, a in self.choices])
        return np.array(rows)
