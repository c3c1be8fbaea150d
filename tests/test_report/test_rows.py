"""The wording of numbers, against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from mmbrecq.report import rows
from mmbrecq.report.summary import Metrics, Summary


@pytest.mark.parametrize(('count', 'text'), [(None, '-'), (999, '999 B'), (44_730_000, '44.7 MB')])
def test_bytes(count: int | None, text: str) -> None:
    assert rows.format_bytes(count) == text


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [
        (None, '-'),
        (math.nan, '-'),
        (0.0, '0.00 s'),
        (9.996, '10.0 s'),
        (59.94, '59.9 s'),
        (59.96, '1 min 00 s'),
        (161.0, '2 min 41 s'),
        (3599.6, '1 h 00 min'),
        (3720.0, '1 h 02 min'),
    ],
)
def test_seconds(seconds: float | None, text: str) -> None:
    assert rows.format_seconds(seconds) == text


@pytest.mark.parametrize(
    ('value', 'reference', 'text'),
    [
        (81.02, 82.0, '-0.98'),
        (82.5, 82.0, '+0.50'),
        (81.999, 82.0, '+0.00'),
        (math.nan, 82.0, '-'),
        (81.0, None, '-'),
        (None, 82.0, '-'),
    ],
)
def test_difference(value: float | None, reference: float | None, text: str) -> None:
    assert rows.format_difference(value, reference, 2) == text


def test_missing_and_non_finite_numbers_are_a_dash() -> None:
    assert rows.format_metric(None, 2) == rows.format_metric(math.nan, 2) == rows.format_loss(math.inf) == '-'
    assert rows.format_ratio(None, 3) == rows.format_ratio(3, None) == rows.format_ratio(3, 0) == ''
    assert rows.format_ratio(11_200_000, 832_000) == '13.5x smaller'


def test_rows_come_in_order_of_the_run(summary: Summary) -> None:
    made = rows.result_rows(summary)
    assert [row.stage for row in made] == ['float', 'nearest', 'weights', 'quantized', 'deployed', 'deployed']
    assert [row.size for row in made] == [11_200_000, 832_000, 832_000, 832_000, None, None]
    assert [row.label for row in made[-2:]] == ['deployed in ONNX Runtime', 'deployed in OpenVINO']
    assert [row.kernels and row.kernels.integer for row in made] == [None, None, None, None, 3, 2]


def test_stages_without_a_result_are_left_out() -> None:
    summary = Summary(metrics=Metrics(float={'a': 1.0}, quantized={'b': 2.0}, deployed={'OpenVINO': {}}))
    made = rows.result_rows(summary)
    assert [row.stage for row in made] == ['float', 'quantized']
    assert rows.metric_names(made) == ['a', 'b']


def test_fractions_get_three_digits_and_percentages_two() -> None:
    summary = Summary(metrics=Metrics(float={'coco/bbox_mAP': 0.365, 'top1': 82.0}, nearest={'top1': 0.5}))
    made = rows.result_rows(summary)
    assert [rows.decimals(made, name) for name in ('coco/bbox_mAP', 'top1')] == [3, 2]
