"""What of a config counts when a run is gone on with."""

from __future__ import annotations

from typing import Any

import pytest
from mmengine.config import Config

from mmbrecq.runs.identity import describe_config, first_difference

BASE: dict[str, Any] = {
    'model': {'type': 'Net', 'stages': [{'depth': 2}, {'depth': 3}]},
    'quantizer': {'weight': {'bits': 2}, 'overrides': []},
    'reconstructor': {'type': 'R', 'cache': 'auto', 'memory_limit': None, 'weights': {'iterations': 20}},
    'test_dataloader': {'batch_size': 8, 'num_workers': 2},
    'evaluations': ['float'],
    'work_dir': 'a',
}


def test_every_setting_by_its_path() -> None:
    assert describe_config(Config(BASE)) == {
        'model.type': "'Net'",
        'model.stages[0].depth': '2',
        'model.stages[1].depth': '3',
        'quantizer.weight.bits': '2',
        'quantizer.overrides': '[]',
        'reconstructor.type': "'R'",
        'reconstructor.weights.iterations': '20',
        'test_dataloader.batch_size': '8',
    }


@pytest.mark.parametrize(
    ('option', 'value'),
    [
        ('work_dir', 'b'),
        ('evaluations', ['quantized']),
        ('exporters', []),
        ('reconstructor.cache', 'disk'),
        ('reconstructor.memory_limit', 2**30),
        ('test_dataloader.num_workers', 0),
    ],
)
def test_what_does_not_change_a_unit_may_change(option: str, value: Any) -> None:
    other = Config(BASE)
    before = describe_config(other)
    other.merge_from_dict({option: value})
    assert first_difference(before, describe_config(other)) is None


@pytest.mark.parametrize(
    ('option', 'value', 'said'),
    [
        ('quantizer.weight.bits', 4, 'quantizer.weight.bits was 2 and is 4 now'),
        ('model.stages.1.depth', 4, 'model.stages[1].depth was 3 and is 4 now'),
        ('reconstructor.mirror', True, 'reconstructor.mirror was not set and is True now'),
        ('quantizer.overrides', [{'pattern': 'a'}], "quantizer.overrides[0].pattern was not set and is 'a' now"),
    ],
)
def test_what_changes_a_unit_is_named(option: str, value: Any, said: str) -> None:
    other = Config(BASE)
    before = describe_config(other)
    other.merge_from_dict({option: value})
    assert first_difference(before, describe_config(other)) == said
