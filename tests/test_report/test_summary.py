"""summary.json goes round, is strict JSON, and refuses what it does not know."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmbrecq.errors import ConfigError, TableError
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.report.summary import LayerBits, Metrics, Summary
from mmbrecq.schema import decode, encode, load_json, save_json

SCHEMA = {
    'metrics': {'float', 'nearest', 'weights', 'quantized', 'deployed'},
    'seconds': {'prepare', 'calibrate', 'reconstruct', 'evaluate', 'export', 'total'},
    'peak_memory_bytes': {'host', 'device'},
    'model_size_bytes': {'float', 'quantized'},
    'calibration': {'num_samples', 'ids_file'},
}


def test_keys_are_the_documented_ones(summary: Summary) -> None:
    plain = encode(summary)
    rest = {'config', 'seed', 'versions', 'units', 'bits', 'float_layers', 'warnings', 'verify', 'integer_kernels'}
    assert set(plain) == rest | set(SCHEMA) | {'model', 'preset', 'loss', 'pictures', 'search', 'grids'}
    for name, keys in SCHEMA.items():
        assert set(plain[name]) == keys
    unit_keys = {
        'name', 'layers', 'loss_before', 'loss_after', 'iterations', 'seconds', 'stage', 'kept_nearest',
        'power', 'images_at_once',
    }  # fmt: skip
    assert set(plain['units'][0]) == unit_keys
    assert plain['bits']['backbone.conv1'] == {'weight': 8, 'activation': 4}
    assert plain['integer_kernels']['OpenVINO'] == {'quantized': 3, 'integer': 2, 'float_layers': {}}
    assert plain['metrics']['deployed']['OpenVINO']['accuracy/top1'] == 81.04


def test_round_trip_through_json(summary: Summary) -> None:
    assert decode(Summary, json.loads(json.dumps(encode(summary), allow_nan=False)), 'summary') == summary


def test_round_trip_through_file(summary: Summary, tmp_path: Path) -> None:
    path = tmp_path / 'summary.json'
    save_json(summary, path)
    assert load_json(Summary, path, 'tools/ptq.py') == summary
    assert [entry.name for entry in tmp_path.iterdir()] == ['summary.json']


def test_empty_summary_goes_round() -> None:
    assert decode(Summary, encode(Summary()), 'summary') == Summary()
    assert decode(Summary, {}, 'summary') == Summary()


def test_non_finite_numbers_become_null() -> None:
    unit = UnitResult('unit', 'weights', (), math.inf, math.nan, 1, 1.0, False)
    plain = encode(Summary(metrics=Metrics(float={'accuracy/top1': math.nan}), units=[unit]))
    json.dumps(plain, allow_nan=False)
    assert plain['metrics']['float'] == {'accuracy/top1': None}
    assert plain['units'][0]['loss_before'] is None
    back = decode(Summary, plain, 'summary')
    assert math.isnan(back.metrics.float['accuracy/top1'])
    assert math.isnan(back.units[0].loss_after)


def test_numpy_scalars_become_python_numbers() -> None:
    summary = Summary(metrics=Metrics(float={'coco/bbox_mAP': np.float64(0.375), 'coco/n': np.float32(0.5)}))
    summary.seed = np.int64(3)  # type: ignore[assignment]
    plain = encode(summary)
    assert type(plain['seed']) is int
    assert [type(value) for value in plain['metrics']['float'].values()] == [float, float]
    json.dumps(plain)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match='expected a JSON value, but got set'):
        encode(Summary(warnings={'a'}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'sede': 1}, "unknown option 'sede' of summary: expected config or model or "),
        ({'seconds': {'totl': 1}}, "unknown option 'totl' of summary.seconds: expected prepare or "),
        ({'units': [{'layers': []}]}, r"expected option 'name' of summary.units\[0\], but it was not given"),
        ({'seed': '1'}, "summary.seed: expected int, but got '1'"),
        ({'seed': True}, 'summary.seed: expected int, but got True'),
        ({'metrics': {'float': {'a': 'b'}}}, r"summary.metrics.float\['a'\]: expected float, but got 'b'"),
        ({'metrics': 3}, 'summary.metrics: expected dict, but got 3'),
        (
            {'warnings': 'text'},
            "option 'warnings' of summary to be a list, each item a string, but got 'text'",
        ),
        ({'versions': []}, r"expected option 'versions' of summary to be a dict, but got \[\]"),
    ],
)
def test_bad_values_name_the_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(Summary, values, 'summary')


@pytest.mark.parametrize('text', [None, '{"config": ', '[]', '{"sede": 1}'])
def test_bad_file_is_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / 'summary.json'
    if text is not None:
        path.write_text(text)
    with pytest.raises(TableError, match=r'summary\.json: (cannot be read: |expected what tools/ptq\.py writes, but)'):
        load_json(Summary, path, 'tools/ptq.py')


@pytest.mark.parametrize(
    ('bits', 'label'),
    [
        ([], ''),
        ([(8, 4), (2, 4), (2, 4), (8, 8)], 'W2A4'),
        ([(4, None), (4, None), (8, None)], 'W4A32'),
        ([(8, 8), (2, 4), (2, 4)], 'W2A4'),
        ([(8, 8), (2, 4), (4, 4), (8, 4)], 'W2-8A4'),
        ([(4, 8), (2, 4), (None, 8), (2, 8)], 'W2-32A8'),
    ],
)
def test_bits_label_is_what_most_layers_have(bits: list[tuple[int, int | None]], label: str) -> None:
    layers = {f'layer{i}': LayerBits(weight, activation) for i, (weight, activation) in enumerate(bits)}
    assert Summary(bits=layers).bits_label == label
