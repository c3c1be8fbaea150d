"""The table that ends a run in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmbrecq.report.rows import (
    UNKNOWN,
    ResultRow,
    decimals,
    format_bytes,
    format_difference,
    format_metric,
    format_ratio,
    metric_names,
    result_rows,
)
from mmbrecq.report.summary import Summary

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHOWN_METRICS = 3
"""Metrics that the terminal has room for; the report has all of them."""


def render_table(summary: Summary) -> str:
    """Returns the result table as plain text: title, Markdown table, sizes; no colour, no line is wrapped.

    Args:
        summary: The run; stages not evaluated yet are left out.
    """
    from rich import box
    from rich.console import Console

    console = Console(width=10_000, color_system=None, force_terminal=False, legacy_windows=False, markup=False)
    with console.capture() as capture:
        console.print(_build_table(summary, box.MARKDOWN))
    lines = [_title(summary), '', *(line.rstrip() for line in capture.get().strip().splitlines())]
    caption = _caption(summary)
    return '\n'.join([*lines, '', caption] if caption else lines) + '\n'


def print_table(summary: Summary, console: Console | None = None) -> None:
    """Prints the result table, styled on a terminal and as :func:`render_table` has it elsewhere.

    Args:
        summary: The run.
        console: Where to print; standard output by default.
    """
    from rich import box
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    if not console.is_terminal:
        console.file.write(render_table(summary))
        return
    console.print(Text(_title(summary), style='bold'))
    console.print(_build_table(summary, box.ROUNDED))
    console.print(Text(_caption(summary), style='dim'))


def _title(summary: Summary) -> str:
    seed = '' if summary.seed is None else f'seed {summary.seed}'
    preset = f'preset {summary.preset}' if summary.preset else ''
    parts = [summary.bits_label, summary.model or summary.config, preset, seed]
    return ', '.join(part for part in parts if part)


def _caption(summary: Summary) -> str:
    size = summary.model_size_bytes
    parts = []
    if size.float is not None or size.quantized is not None:
        ratio = format_ratio(size.float, size.quantized)
        parts.append(f'model size: {format_bytes(size.float)} float, {format_bytes(size.quantized)} quantized')
        parts[-1] += f' ({ratio})' if ratio else ''
    rounded = [unit for unit in summary.units if unit.learned_rounding]
    kept = sum(unit.kept_nearest for unit in rounded)
    if kept:
        parts.append(f'{kept} of {len(rounded)} units kept at nearest rounding')
    metrics = metric_names(result_rows(summary))
    if len(metrics) > SHOWN_METRICS:
        parts.append(f'the report has {len(metrics) - SHOWN_METRICS} more metrics')
    return '; '.join(parts)


def _build_table(summary: Summary, box: object) -> Table:
    from rich.table import Table
    from rich.text import Text

    rows = result_rows(summary)
    metrics = metric_names(rows)[:SHOWN_METRICS]
    with_kernels = any(row.kernels for row in rows)
    table = Table(box=box)  # type: ignore[arg-type]
    table.add_column('stage')
    for metric in metrics:
        table.add_column(Text(metric), justify='right')
        table.add_column('to float', justify='right')
    table.add_column('size', justify='right')
    if with_kernels:
        table.add_column('integer kernels', justify='right')
    for row in rows:
        cells = [Text(cell) for cell in _cells(row, rows, metrics, summary)]
        if with_kernels:
            count = row.kernels
            cells.append(Text(f'{count.integer} of {count.quantized}' if count else UNKNOWN))
        table.add_row(*cells, style='bold' if row.stage == 'quantized' else '')
    if not rows:
        table.add_row('no result yet')
    return table


def _cells(row: ResultRow, rows: list[ResultRow], metrics: list[str], summary: Summary) -> list[str]:
    cells = [row.label]
    for metric in metrics:
        digits, value = decimals(rows, metric), row.metrics.get(metric)
        reference = None if row.stage == 'float' else summary.metrics.float.get(metric)
        cells += [format_metric(value, digits), format_difference(value, reference, digits)]
    return [*cells, format_bytes(row.size)]
