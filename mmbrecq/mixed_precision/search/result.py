"""What a search has chosen, as ``search.json`` keeps it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from mmbrecq.errors import ConfigError, TableError
from mmbrecq.runs.storage import write_text_atomic
from mmbrecq.schema import decode, encode


@dataclass
class SearchResult:
    """The chosen bits, what they are predicted to lose and what they cost.

    Attributes:
        kind: Of the loss, see :class:`~mmbrecq.mixed_precision.sensitivity.measure.OutputLoss`.
        bits: Of the weight of every searched layer, None for float.
        activation_bits: Of the input of those whose activations were searched.
        predicted: Rise of the loss, by the tables.
        measured: The same of the quantized model with what was searched quantized and all else in float; None until it
            is known.
        asked: Budgets as they were asked for, by the name of the cost.
        budgets: The same in the unit of the cost.
        spent: Cost by name, with what does not depend on the choice.
        float_costs: What the float model costs.
        units: Unit of every cost.
        front_cost: Name of the cost of the front; empty where none was searched.
        front: Cost and loss of choices of which none is better in both than another, the cheapest first.
        images: How many calibration images the losses are of; None for all.
        inputs: What the reconstructed states depend on.
        states: Folder of the states, from that of the file.
    """

    kind: str
    bits: dict[str, int | None]
    activation_bits: dict[str, int]
    predicted: float
    measured: float | None = None
    asked: dict[str, str] = field(default_factory=dict)
    budgets: dict[str, float] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    float_costs: dict[str, float] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    front_cost: str = ''
    front: list[list[float]] = field(default_factory=list)
    images: int | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    states: str = ''

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        write_text_atomic(json.dumps(encode(self), indent=1) + '\n', path)

    @classmethod
    def load(cls, path: Path) -> SearchResult:
        """Reads the file; TableError where it is missing, or no such file."""
        try:
            found: SearchResult = decode(cls, json.loads(path.read_text(encoding='utf-8')), 'result')
        except OSError as error:
            raise TableError(f'{path}: cannot be read: {error.strerror}') from error
        except (ValueError, ConfigError) as error:
            raise TableError(f'{path}: expected what tools/search.py writes, but it is not: {error}') from error
        return found

    def overrides(self) -> list[dict[str, object]]:
        """The choice as the quantizer's ``overrides``."""
        made = []
        for name, number in self.bits.items():
            override: dict[str, object] = {'pattern': name, 'weight_bits': 'float' if number is None else number}
            if name in self.activation_bits:
                override['activation_bits'] = self.activation_bits[name]
            made.append(override)
        return made
