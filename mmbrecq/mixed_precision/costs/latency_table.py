"""Latencies from a table in a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmbrecq.errors import TableError
from mmbrecq.mixed_precision.costs.base import BaseCostModel, show
from mmbrecq.mixed_precision.costs.layers import Bits, LayerShape
from mmbrecq.registry import COST_MODELS


@COST_MODELS.register_module()
class LatencyTable(BaseCostModel):
    """Milliseconds of one image, layer by layer, from a file.

    It holds ::

        {"device": "...", "layers": {"backbone.conv1": {"W8A8": 0.12, "W4A8": 0.12, "W32A32": 0.31}, ...}}

    Args:
        path: The file; other keys than ``layers`` are for the reader.
    """

    name, unit = 'latency', 'ms'

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            content: Any = json.loads(Path(path).read_text(encoding='utf-8'))
        except (OSError, ValueError) as error:
            raise TableError(f'{path}: expected a JSON file with a table of latencies, but got {error}') from error
        layers = content.get('layers') if isinstance(content, dict) else None
        if not isinstance(layers, dict) or not all(isinstance(row, dict) for row in layers.values()):
            raise TableError(f"{path}: expected a table of latencies by layer and bits under the key 'layers'")
        self.layers: Mapping[str, Mapping[str, Any]] = layers

    def layer_cost(self, layer: LayerShape, bits: Bits) -> float:
        row = self.layers.get(layer.name)
        if row is None:
            raise TableError(f"{self.path}: expected latencies of layer '{layer.name}', but the table has none")
        value = row.get(show(bits))
        if value is None:
            raise TableError(
                f"{self.path}: expected the latency of layer '{layer.name}' at {show(bits)}, but the table has only "
                f'{", ".join(sorted(row)) or "nothing"}'
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise TableError(
                f"{self.path}: expected the latency of layer '{layer.name}' at {show(bits)} to be a number >= 0, "
                f'but got {value!r}'
            )
        return float(value)
