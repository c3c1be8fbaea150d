"""What an analysis has measured, as ``sensitivity.json`` keeps it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmbrecq.costs.layers import Call, LayerShape
from mmbrecq.errors import TableError
from mmbrecq.storage import write_text_atomic


@dataclass
class SensitivityTable:
    """The rise of the loss with each layer alone at each number of bits, and with two layers of a unit together.

    Args:
        kind: Of the loss, see :class:`~mmbrecq.sensitivity.measure.OutputLoss`.
        candidates: Numbers of bits of weights.
        layers: Shapes of all quantized layers, in the order of the network.
        searched: Names of those whose bits are to be chosen; the others keep theirs, the first and the last for one.
        units: Unit of every layer.
        other_bytes: Parameters that are no weight of these layers, in bytes.
        inputs: What the figures depend on; an analysis goes on only where it is the same.
        loss: ``{layer: {bits: rise}}``.
        pairs: ``{"layer layer": {bits: rise of both}}``, beyond the sum of the two.
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
        except OSError as error:
            raise TableError(f'{path}: cannot be read: {error.strerror}') from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TableError(f'{path}: expected what tools/analyze.py writes, but it is not: {error}') from error
        rows = [*table.loss.items(), *((' '.join(pair), row) for pair, row in table.pairs.items())]
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

    def losses(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """``(searched layers, candidates)``."""
        return np.array([[self.loss[name][bits] for bits in self.candidates] for name in self.searched])


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
