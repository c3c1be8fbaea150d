"""Builds the rows of the result table and formats their numbers, for the terminal and for HTML."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mmbrecq.byte_size import show_bytes
from mmbrecq.deploy.backends.base import KernelCount
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.report.summary import MetricValues, Summary

UNKNOWN = '-'


@dataclass(frozen=True)
class ResultRow:
    """Holds the results of one stage of the run.

    Attributes:
        stage: 'float', 'nearest', 'weights', 'quantized' or 'deployed'.
        label: Displayed name of the stage.
        size: Bytes of the model at this stage; None for a deployed file.
        kernels: None for a stage that is not deployed.
    """

    stage: str
    label: str
    metrics: MetricValues
    size: int | None = None
    kernels: KernelCount | None = None


def result_rows(summary: Summary) -> list[ResultRow]:
    """Returns the stages evaluated so far, from float to deployed."""
    metrics, size = summary.metrics, summary.model_size_bytes
    rows = [
        ResultRow('float', 'float', metrics.float, size.float),
        ResultRow('nearest', 'nearest rounding', metrics.nearest, size.quantized),
        ResultRow('weights', 'BRECQ weights', metrics.weights, size.quantized),
        ResultRow('quantized', 'BRECQ full', metrics.quantized, size.quantized),
    ]
    for runtime, values in metrics.deployed.items():
        kernels = summary.integer_kernels.get(runtime)
        rows.append(ResultRow('deployed', f'deployed in {runtime}', values, kernels=kernels))
    return [row for row in rows if row.metrics]


def metric_names(rows: Iterable[ResultRow]) -> list[str]:
    """Returns every metric that some row has, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def decimals(rows: Iterable[ResultRow], metric: str) -> int:
    """Returns the digits after the point: 2 for percentages, 3 for fractions such as COCO's AP."""
    values = (abs(row.metrics.get(metric, 0.0)) for row in rows)
    return 2 if any(value > 1 for value in values) else 3


def format_metric(value: float | None, digits: int) -> str:
    """Returns ``'81.02'``, or a dash where the value is missing or not finite."""
    return UNKNOWN if value is None or not math.isfinite(value) else f'{value:.{digits}f}'


def format_difference(value: float | None, reference: float | None, digits: int) -> str:
    """Returns ``value - reference`` with its sign, as ``'-0.98'``, or a dash where either is unknown."""
    if value is None or reference is None or not math.isfinite(value - reference):
        return UNKNOWN
    # Adding 0.0 turns the -0.0 that rounding may leave into 0.0.
    return f'{round(value - reference, digits) + 0.0:+.{digits}f}'


def format_bytes(count: int | None) -> str:
    """Returns a size as :func:`~mmbrecq.byte_size.show_bytes` does, or a dash where it is missing."""
    return UNKNOWN if count is None else show_bytes(count)


def format_cost(value: float, unit: str) -> str:
    """Returns a cost with its unit; bytes in decimal units."""
    return format_bytes(round(value)) if unit == 'bytes' else f'{value:.4g} {unit}'.rstrip()


def format_seconds(seconds: float | None) -> str:
    """Returns a duration as ``'0.42 s'``, ``'12.3 s'``, ``'2 min 41 s'`` or ``'1 h 02 min'``."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    if seconds < 59.95:
        return f'{seconds:.{2 if seconds < 9.995 else 1}f} s'
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f'{minutes} min {rest:02d} s'
    hours, minutes = divmod(round(seconds / 60), 60)
    return f'{hours} h {minutes:02d} min'


def format_ratio(size: int | None, smaller: int | None) -> str:
    """Returns ``'13.6x smaller'``, or an empty string where a size is unknown."""
    return f'{size / smaller:.1f}x smaller' if size and smaller else ''


def format_loss(loss: float) -> str:
    """Returns a loss with three significant digits, or a dash where it is not finite."""
    return f'{loss:.3g}' if math.isfinite(loss) else UNKNOWN


def kept_words(unit: UnitResult) -> str:
    """Returns the mark of a unit that got worse: its weights, or its step sizes, are what they were before."""
    return 'kept nearest' if unit.learned_rounding else 'kept as it was'
