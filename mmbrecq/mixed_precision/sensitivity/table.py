"""What an analysis has measured, as ``sensitivity.json`` keeps it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmbrecq.errors import ConfigError, TableError
from mmbrecq.mixed_precision.costs.layers import Call, LayerShape
from mmbrecq.qtype import MAX_BITS, MIN_BITS
from mmbrecq.quantizers.options import FLOAT
from mmbrecq.quantizers.quantized_model import QuantizedGraph
from mmbrecq.runs.storage import write_text_atomic

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


@dataclass(frozen=True)
class ValueGroup:
    """Activations that have one number of bits.

    Args:
        quantizers: Their paths.
        layers: Layers that read them, in the order of the network.
    """

    quantizers: tuple[str, ...]
    layers: tuple[str, ...]


def value_groups(graph: QuantizedGraph, searched: Collection[str]) -> list[ValueGroup]:
    """The activations of one graph whose bits can be chosen.

    A value that several layers read has one quantizer, and a layer that pyramid levels share reads several values: all
    that hangs together so is one group. A group that a layer with fixed bits reads, too, keeps those.

    Args:
        graph: A prepared graph.
        searched: Layers whose bits are to be chosen.
    """
    groups: list[tuple[set[str], set[str]]] = []
    for layer, quantizers in graph.read_quantizers().items():
        joined = ({layer}, set(quantizers))
        for group in [g for g in groups if g[1] & quantizers]:
            groups.remove(group)
            joined = (joined[0] | group[0], joined[1] | group[1])
        if quantizers:
            groups.append(joined)
    order = {layer.name: index for index, layer in enumerate(graph.layers)}
    found = [
        ValueGroup(tuple(sorted(quantizers)), tuple(sorted(layers, key=order.__getitem__)))
        for layers, quantizers in groups
        if layers <= set(searched)
    ]
    return sorted(found, key=lambda group: order[group.layers[0]])


FLOAT_BITS = 32
"""In the place of a candidate: the weight of the layer stays in float."""


@dataclass
class SensitivityTable:
    """The rise of the loss with each layer alone at each number of bits, and with two layers of a unit together.

    Args:
        kind: Of the loss, see :class:`~mmbrecq.mixed_precision.sensitivity.measure.OutputLoss`.
        candidates: Numbers of bits of weights; 32 is float.
        layers: Shapes of all quantized layers, in the order of the network.
        searched: Names of those whose bits are to be chosen; the others keep theirs, the first and the last for one.
        units: Unit of every layer.
        other_bytes: Parameters that are no weight of these layers, in bytes.
        inputs: What the figures depend on; an analysis goes on only where it is the same.
        loss: ``{layer: {bits: rise}}``.
        pairs: ``{"layer layer": {bits: rise of both}}``, beyond the sum of the two.
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

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        content = asdict(self)
        content['pairs'] = {' '.join(pair): values for pair, values in self.pairs.items()}
        write_text_atomic(json.dumps(content, indent=1) + '\n', path)

    @classmethod
    def load(cls, path: Path) -> SensitivityTable:
        """Reads the file.

        Raises:
            TableError: It is missing, or is no such file, or holds what no loss can be.
        """
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
            table = cls(**{**content, 'layers': [_layer(values) for values in content['layers']]})
            table.loss = {name: _by_bits(row) for name, row in content['loss'].items()}
            table.pairs = {(first, second): _by_bits(row) for first, second, row in _pairs(content['pairs'])}
            table.values = {
                name: ValueGroup(tuple(group['quantizers']), tuple(group['layers']))
                for name, group in content.get('values', {}).items()
            }
            table.activation_loss = {n: _by_bits(row) for n, row in content.get('activation_loss', {}).items()}
        except OSError as error:
            raise TableError(f'{path}: cannot be read: {error.strerror}') from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TableError(f'{path}: expected what tools/analyze.py writes, but it is not: {error}') from error
        rows = [*table.loss.items(), *((' '.join(pair), row) for pair, row in table.pairs.items())]
        rows += [(f'the input of {name}', row) for name, row in table.activation_loss.items()]
        for name, row in rows:
            for bits, value in row.items():
                if not math.isfinite(value):
                    raise TableError(f"{path}: expected a finite loss of '{name}' at {bits} bits, but got {value}")
        return table

    def check_complete(self, path: Path) -> None:
        """Raises TableError where a layer or a number of bits has not been measured."""
        for name in self.searched:
            for bits in self.candidates:
                if bits not in self.loss.get(name, {}):
                    raise TableError(f"{path}: expected the loss of layer '{name}' at {bits} bits, but it has none")
        for name in self.values:
            for bits in self.activation_candidates:
                if bits not in self.activation_loss.get(name, {}):
                    raise TableError(
                        f"{path}: expected the loss of the input of layer '{name}' at {bits} bits, but it has none"
                    )

    @property
    def choices(self) -> list[tuple[int | None, int | None]]:
        """What a layer may have: bits of its weight and of its input; None is a float weight, or an input as it is."""
        weights = [None if bits == FLOAT_BITS else bits for bits in self.candidates]
        inputs: list[int | None] = [*self.activation_candidates]
        return [(w, a) for w in weights for a in inputs or [None]]

    def losses(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """``(searched layers, choices)``; the layers of a group share what its activations lose."""
        group_of = {layer: name for name, group in self.values.items() for layer in group.layers}
        rows = []
        for layer in self.searched:
            name = group_of.get(layer)
            inputs = {} if name is None else self.activation_loss[name]
            share = 0.0 if name is None else 1 / len(self.values[name].layers)
            rows.append([self.loss[layer][w or FLOAT_BITS] + share * inputs.get(a or 0, 0.0) for w, a in self.choices])
        return np.array(rows)


def _layer(values: Mapping[str, Any]) -> LayerShape:
    weight_bits, activation_bits = values['bits']
    calls = tuple(Call(tuple(c['inputs']), tuple(c['outputs']), c['times']) for c in values['calls'])
    options = tuple((name, value) for name, value in values['options'])
    changed = {'weight': tuple(values['weight']), 'calls': calls, 'options': options}
    return LayerShape(**{**values, **changed, 'bits': (weight_bits, activation_bits)})


def _by_bits(row: Mapping[str, Any]) -> dict[int, float]:
    return {int(bits): float(value) for bits, value in row.items()}


def _pairs(content: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    return [(*names.split(' '), row) for names, row in content.items()]  # type: ignore[misc]
