"""Prints the results of a run, and the bits that a search has chosen, in the terminal."""

from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmbrecq.mixed_precision.diagnosis import GridLosses
from mmbrecq.mixed_precision.search.bits import SearchResult
from mmbrecq.mixed_precision.sensitivity.table import SensitivityTable
from mmbrecq.report import rows
from mmbrecq.report.summary import Summary

SHOWN_METRICS = 3
"""Number of metrics in the terminal; the report has all of them."""


def render_table(summary: Summary) -> str:
    """Returns the result table as plain text: title, Markdown table, sizes; no colour, no line is wrapped."""
    console = Console(width=10_000, color_system=None, force_terminal=False, legacy_windows=False, markup=False)
    with console.capture() as capture:
        console.print(_build_table(summary, box.MARKDOWN))
    lines = [_title(summary), '', *(line.rstrip() for line in capture.get().strip().splitlines())]
    caption = _caption(summary)
    return '\n'.join([*lines, '', caption] if caption else lines) + '\n'


def print_table(summary: Summary, console: Console | None = None) -> None:
    """Prints the result table, styled on a terminal and as :func:`render_table` has it elsewhere."""
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
        before, after = map(rows.format_bytes, (size.float, size.quantized))
        ratio = rows.format_ratio(size.float, size.quantized)
        parts.append(f'model size: {before} float, {after} quantized{f" ({ratio})" if ratio else ""}')
    rounded = [unit for unit in summary.units if unit.learned_rounding]
    kept = sum(unit.kept_nearest for unit in rounded)
    if kept:
        parts.append(f'{kept} of {len(rounded)} units kept at nearest rounding')
    metrics = rows.metric_names(rows.result_rows(summary))
    if len(metrics) > SHOWN_METRICS:
        parts.append(f'the report has {len(metrics) - SHOWN_METRICS} more metrics')
    return '; '.join(parts)


def grid_text(found: GridLosses, shown: int = 20) -> str:
    """Returns a Markdown table of the grids that cost most alone, and a line about all of them."""
    total = sum(grid.loss for grid in found.grids) or 1.0
    lines = ['| loss | share | grid of | bits | layers |', '| ---: | ---: | --- | ---: | --- |']
    for grid in found.grids[:shown]:
        layers = ', '.join(grid.layers)
        lines.append(
            f'| {grid.loss:.3g} | {grid.loss / total:.1%} | {grid.kind} {grid.label} | {grid.bits} | {layers} |'
        )
    rest = found.grids[shown:]
    hidden = f'; {len(rest)} more grids cost {sum(g.loss for g in rest) / total:.1%}' if rest else ''
    lines += ['', f'{found.kind} of the outputs with all grids {found.together:.3g}, {found.images} images{hidden}']
    return '\n'.join(lines)


def choice_text(chosen: SearchResult, table: SensitivityTable) -> str:
    """Returns a line for every layer, then the predicted loss and the costs beside their budgets."""
    width = max(len(layer.name) for layer in table.layers)
    lines = []
    for layer in table.layers:
        bits = chosen.bits.get(layer.name, layer.bits[0]) or 32
        inputs = chosen.activation_bits.get(layer.name)
        note = '' if layer.name in chosen.bits else '  as the config has it'
        note = note if inputs is None else f'  input {inputs} {"#" * inputs}'
        lines.append(f'{layer.name:<{width}}  {bits:>2} {"#" * min(bits, 8):<8}{note}'.rstrip())
    counts = Counter('float' if bits is None else bits for bits in chosen.bits.values())
    shares = ', '.join(f'{count} at {bits}' for bits, count in sorted(counts.items(), key=str))
    lines += ['', f'bits of {len(chosen.bits)} layers: {shares}']
    lines.append(f'predicted loss: {chosen.predicted:.4g} ({chosen.kind})')
    for name, spent in chosen.spent.items():
        unit = chosen.units[name]
        budget = f', budget {rows.format_cost(chosen.budgets[name], unit)}' if name in chosen.budgets else ''
        share = spent / chosen.float_costs[name] if chosen.float_costs[name] else 0.0
        lines.append(f'{name}: {rows.format_cost(spent, unit)}, {share:.3g}x of float{budget}')
    if (drop := chosen.drop) is not None:
        told = f'{drop:.4g} points of {chosen.metric} on {chosen.held_out} held-out images'
        lines.append(f'drop: {told}, budget {chosen.asked["drop"]}; {len(chosen.trials)} choices were evaluated')
    return '\n'.join(lines) + '\n'


def _build_table(summary: Summary, style: box.Box) -> Table:
    results = rows.result_rows(summary)
    metrics = rows.metric_names(results)[:SHOWN_METRICS]
    with_kernels = any(row.kernels for row in results)
    table = Table(box=style)
    table.add_column('stage')
    for metric in metrics:
        table.add_column(Text(metric), justify='right')
        table.add_column('to float', justify='right')
    table.add_column('size', justify='right')
    if with_kernels:
        table.add_column('integer kernels', justify='right')
    for row in results:
        cells = [row.label]
        for metric in metrics:
            digits, value = rows.decimals(results, metric), row.metrics.get(metric)
            reference = None if row.stage == 'float' else summary.metrics.float.get(metric)
            cells += [rows.format_metric(value, digits), rows.format_difference(value, reference, digits)]
        cells.append(rows.format_bytes(row.size))
        if with_kernels:
            cells.append(f'{row.kernels.integer} of {row.kernels.quantized}' if row.kernels else rows.UNKNOWN)
        table.add_row(*map(Text, cells), style='bold' if row.stage == 'quantized' else '')
    if not results:
        table.add_row('no result yet')
    return table
