"""Cost models against hand-made sums, and the shapes of layers against a network whose arithmetic is known."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmbrecq.building import build
from mmbrecq.errors import ConfigError, TableError
from mmbrecq.mixed_precision.costs.models import (
    BaseCostModel,
    BitOperations,
    Bits,
    BitSerialAccelerator,
    Call,
    LatencyTable,
    LayerShape,
    ModelSize,
)
from mmbrecq.registry import COST_MODELS

CONV = LayerShape(
    'backbone.conv1', 'Conv2d', (16, 8, 3, 3), (Call((8, 20, 10), (16, 10, 5)),), (8, 8), 16, True
)  # fmt: skip
HEAD = LayerShape(
    'bbox_head.conv', 'Conv2d', (4, 16, 1, 1), (Call((16, 8, 8), (4, 8, 8)), Call((16, 4, 4), (4, 4, 4), 3)), (4, 4), 4,
    False,
)  # fmt: skip
UP = LayerShape('up', 'ConvTranspose2d', (8, 6, 2, 2), (Call((8, 5, 5), (6, 10, 10)),), (8, 8), 6, True)
FC = LayerShape('head.fc', 'Linear', (10, 32), (Call((32,), (10,)),), (8, 8), 10, True)


def costs(model: BaseCostModel, layers: Sequence[LayerShape], candidates: Sequence[Bits]) -> np.ndarray:
    """Costs of all layers at all candidates, ``(layers, candidates)``."""
    model.prepare(layers)
    return np.array([[model.cost(layer, bits) for bits in candidates] for layer in layers])


def test_multiplications() -> None:
    assert CONV.macs == 16 * 10 * 5 * 8 * 9
    assert HEAD.macs == 4 * 16 * (64 + 3 * 16)
    assert UP.macs == 8 * 25 * 6 * 4
    assert FC.macs == 320


@pytest.mark.parametrize(
    ('layer', 'bits', 'size'),
    [
        (CONV, (2, 8), 16 * 72 * 2 / 8 + 16 * 4),
        (CONV, (None, 8), 16 * 72 * 4),
        (HEAD, (4, 4), 64 * 4 / 8 + 4 * 4.5),
    ],
)
def test_size_and_bit_operations(layer: LayerShape, bits: tuple[int | None, int | None], size: float) -> None:
    assert ModelSize().layer_cost(layer, bits) == size
    assert BitOperations().layer_cost(layer, bits) == layer.macs * (bits[0] or 32) * (bits[1] or 32)


def test_a_table_has_a_row_for_each_layer() -> None:
    table = costs(BitOperations(), [CONV, FC], [(2, 4), (8, 8)])
    np.testing.assert_array_equal(table, [[CONV.macs * 8, CONV.macs * 64], [FC.macs * 8, FC.macs * 64]])


def test_the_accelerator_takes_the_longest_of_compute_and_traffic() -> None:
    array = BitSerialAccelerator(1000, 1e6, 1e6, 1e9, on_chip_bytes=100, overhead=0.25)
    compute = CONV.macs * 4 * 8 / 1e9
    weights, inputs, outputs = 16 * 72 * 4 / 8, 8 * 200, 16 * 50
    off_chip = (weights + inputs - 100 + outputs - 100) / 1e6
    assert array.layer_cost(CONV, (4, 8)) == pytest.approx(1e3 * (max(compute, off_chip) + 0.25))
    busy = BitSerialAccelerator(1000, 1e6, 1e12, 1e12)
    assert busy.layer_cost(CONV, (4, 8)) == pytest.approx(1e3 * compute)
    local = BitSerialAccelerator(1e15, 1e9, 1e15, 1e6)
    assert local.layer_cost(CONV, (4, 8)) == pytest.approx(1e3 * (weights + inputs + outputs) / 1e6)
    regions = BitSerialAccelerator(1e15, 1e9, 1e6, 1e12, on_chip_bytes=0)
    moved = (16 * 64 + 4 * 64) + 3 * (16 * 16 + 4 * 16)
    assert regions.layer_cost(HEAD, (8, 8)) == pytest.approx((64 + moved) / 1e3)


def test_the_accelerator_rounds_bits_up() -> None:
    array = BitSerialAccelerator(bit_granularity=4, off_chip_bandwidth=1e15, on_chip_bandwidth=1e15)
    assert array.layer_cost(CONV, (2, 8)) == array.layer_cost(CONV, (4, 8)) < array.layer_cost(CONV, (5, 8))
    assert array.layer_cost(CONV, (8, 8)) < array.layer_cost(CONV, (None, None))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'frequency': 0}, 'frequency of an accelerator to be a number in (0, inf), but got 0'),
        ({'on_chip_bytes': -1}, 'on_chip_bytes of an accelerator to be a number in [0, inf), but got -1'),
        ({'bit_granularity': 0}, 'bit_granularity to be an integer >= 1, but got 0'),
        ({'clock': 1}, "unknown option 'clock' of BitSerialAccelerator"),
    ],
)
def test_bad_options_of_the_accelerator(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(COST_MODELS, {'type': 'BitSerialAccelerator', **options})


def table_file(folder: Path, content: Any) -> str:
    path = folder / 'latency.json'
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_latencies_are_read_from_a_table(tmp_path: Path) -> None:
    rows = {'backbone.conv1': {'W8A8': 0.5, 'W32A32': 2}, 'head.fc': {'W8A8': 0, 'W32A32': 0.25}}
    table = costs(
        LatencyTable(table_file(tmp_path, {'device': 'board', 'layers': rows})), [CONV, FC], [(8, 8), (None, None)]
    )
    np.testing.assert_array_equal(table, [[0.5, 2], [0, 0.25]])


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{', "expected a JSON file with latencies by layer and bits under the key 'layers', but: Expecting"),
        ([], "under the key 'layers', but: content: expected dict, but got []"),
        ({'device': 'board'}, "under the key 'layers', but: layers: expected dict, but got None"),
        ({'layers': {'head.fc': 3}}, "under the key 'layers', but: layers['head.fc']: expected dict, but got 3"),
        ({'layers': {}}, "latency of layer 'head.fc' at W8A8, but the table has nothing of it"),
        ({'layers': {'head.fc': {'W4A8': 1}}}, "latency of layer 'head.fc' at W8A8, but the table has W4A8 of it"),
        ({'layers': {'head.fc': {'W8A8': -1}}}, "the W8A8 latency of 'head.fc' to be >= 0, but got -1"),
        ({'layers': {'head.fc': {'W8A8': 'fast'}}}, "layers['head.fc']['W8A8']: expected float, but got 'fast'"),
        ('{"layers": {"head.fc": {"W8A8": NaN}}}', "the W8A8 latency of 'head.fc' to be >= 0, but got nan"),
    ],
)
def test_bad_tables(tmp_path: Path, content: Any, message: str) -> None:
    path = table_file(tmp_path, content)
    with pytest.raises(TableError, match=re.escape(message)) as raised:
        costs(LatencyTable(path), [FC], [(8, 8)])
    assert str(raised.value).startswith(f'{path}: ')


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=re.escape(f'{tmp_path / "none.json"}: expected a JSON file')):
        LatencyTable(str(tmp_path / 'none.json'))
