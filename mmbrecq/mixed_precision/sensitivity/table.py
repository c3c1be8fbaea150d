"""What an analysis has measured, as ``sensitivity.json`` keeps it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmbrecq.errors import TableError
from mmbrecq.mixed_precision.costs.layers import Call, LayerShape
from mmbrecq.mixed_precision.sensitivity.values import ValueGroup
from mmbrecq.runs.storage import write_text_atomic

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
