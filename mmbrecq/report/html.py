"""Writes ``report.html`` and ``sensitivity.html``: self-contained pages, from the templates beside this file."""

from __future__ import annotations

import base64
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mmbrecq.mixed_precision.search.bits import SearchResult
from mmbrecq.mixed_precision.sensitivity.table import FLOAT_BITS, SensitivityTable
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.report import charts, rows
from mmbrecq.report.rows import format_cost
from mmbrecq.report.summary import Summary
from mmbrecq.runs.storage import write_text_atomic

_PHASES = ('prepare', 'calibrate', 'reconstruct', 'evaluate', 'export')
_LONGEST_NAME = 34


def render_html(summary: Summary, date: str = '', folder: Path | None = None) -> str:
    """Returns the page, with the pictures in ``folder``: inline style and SVG, no script, nothing to load."""
    title = ' '.join(part for part in (summary.bits_label, summary.model or Path(summary.config).stem) if part)
    title = title or 'Quantization'
    images = f'{summary.calibration.num_samples:,}' if summary.calibration.num_samples else ''
    counts = Counter(f'W{b.weight or 32}A{b.activation or 32}' for b in summary.bits.values())
    provenance = {
        'Config': summary.config, 'Seed': '' if summary.seed is None else str(summary.seed),
        'Calibration images': images, 'Their ids': images and summary.calibration.ids_file,
        'Reconstruction loss': summary.loss, **summary.versions,
    }  # fmt: skip
    size, memory = summary.model_size_bytes, summary.peak_memory_bytes
    sizes = [
        ('Float model', size.float, ''),
        ('Quantized model', size.quantized, rows.format_ratio(size.float, size.quantized)),
        ('Peak host memory', memory.host, ''), ('Peak device memory', memory.device, ''),
    ]  # fmt: skip
    bar, verdict = macro('bits_bar'), macro('verdict')
    checks = [(name, verdict(text, text == 'passed')) for name, text in summary.verify.items()]
    for runtime, count in summary.integer_kernels.items():
        text = f'{count.integer} of {count.quantized} quantized layers run in integers'
        checks.append((rows.runtime_name(runtime), verdict(text, count.integer == count.quantized)))
    unit_of = {layer: unit.name for unit in summary.units if unit.stage != 'network' for layer in unit.layers}
    return _environment().get_template('report.html').render(
        s=summary, title=title, heading=title.removeprefix(summary.bits_label).strip() or title, date=date,
        numbers='summary.json', calibration=images, rows=rows.result_rows(summary),
        pictures=_pictures(summary, folder), times=_times(summary),
        counts=', '.join(f'{count} at {label}' for label, count in counts.most_common()),
        bits=[(layer, unit_of.get(layer, ''), bar(b.weight), bar(b.activation)) for layer, b in summary.bits.items()],
        float_layers=[entry.partition(': ')[::2] for entry in summary.float_layers], checks=checks,
        sizes=[(name, rows.format_bytes(count), note) for name, count, note in sizes if count is not None],
        provenance=[(name, value) for name, value in provenance.items() if value],
    )  # fmt: skip


def write_report(summary: Summary, path: str | os.PathLike[str], date: str = '') -> None:
    """Writes :func:`render_html` to ``path``, whole or not at all; StorageError if it cannot be written."""
    write_text_atomic(render_html(summary, date, Path(path).parent), Path(path))


def write_sensitivities(table: SensitivityTable, config: str, path: Path) -> None:
    """Writes ``sensitivity.html``: the loss of every layer at every number of bits, as charts and as tables."""
    # a float layer loses nothing
    losses = {name: table.loss.get(name, {}) for name in table.searched}
    weights = {name: {bits: row[bits] for bits in row if bits != FLOAT_BITS} for name, row in losses.items()}
    page = _environment().get_template('sensitivity.html').render(
        title=f'{Path(config).stem}, sensitivities', config=config, table=table, weights=weights,
        numbers='sensitivity.json',
    )  # fmt: skip
    write_text_atomic(page, path)


def macro(name: str) -> Any:
    """Returns a drawing of the templates as a function from its arguments to markup."""
    return getattr(_environment().get_template('macros.html').module, name)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader('mmbrecq.report'), autoescape=True, undefined=StrictUndefined, finalize=_encodable,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        px=lambda value: f'{value:.1f}', bytes=rows.format_bytes, seconds=rows.format_seconds, loss=rows.format_loss,
        losses=lambda unit: (unit.loss_before, unit.loss_after), list_values=lambda row: row.values(),
        pair=lambda *pair: pair, short=_short, own_layers=_own_layers, numbers=_numbers, rises=_rises, costs=_costs,
        front=charts.front,
    )  # fmt: skip
    environment.tests.update(drawable=charts.drawable, finite=lambda value: value is not None and math.isfinite(value))
    functions = [charts.share, charts.log_axis, charts.front_axes, format_cost, _largest]
    environment.globals.update({function.__name__.strip('_'): function for function in functions})
    environment.globals.update({name: value for name, value in vars(rows).items() if callable(value)})
    return environment


def _encodable(value: Any) -> Any:
    """Returns text that UTF-8 can hold: a lone surrogate of a path becomes '?'."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return value.encode('utf-8', 'replace').decode('utf-8') if is_text else value


def _short(name: str) -> str:
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f'{name[: half - 1]}…{name[-half:]}'


def _own_layers(unit: UnitResult) -> str:
    # the unit's own name in front of each layer would only repeat the first column
    return ', '.join(layer.removeprefix(f'{unit.name}.') for layer in unit.layers)


def _numbers(losses: Mapping[str, Mapping[int, float]]) -> list[int]:
    """Returns the numbers of bits of the losses, the fewest first."""
    return sorted({bits for row in losses.values() for bits in row})


def _rises(units: Mapping[str, str], losses: Mapping[str, Mapping[int, float]]) -> list[list[str]]:
    """Returns a row for each layer: its name, its unit, and the rise of the loss at every number of bits."""
    numbers = _numbers(losses)
    return [[n, units.get(n, ''), *(f'{row.get(b, math.nan):.4g}' for b in numbers)] for n, row in losses.items()]


def _costs(chosen: SearchResult) -> Iterator[tuple[str, ...]]:
    """Yields a row for each cost: its name, what is spent, the share of the float model, and the budget."""
    for name, spent in chosen.spent.items():
        unit, whole = chosen.units.get(name, ''), chosen.float_costs.get(name)
        budget = format_cost(chosen.budgets[name], unit) if name in chosen.budgets else rows.UNKNOWN
        yield name, format_cost(spent, unit), f'{spent / whole:.3g}x' if whole else rows.UNKNOWN, budget


def _largest(found: list[rows.ResultRow], metric: str) -> float:
    values = (row.metrics.get(metric, math.nan) for row in found)
    return max((value for value in values if math.isfinite(value)), default=0.0)


def _times(summary: Summary) -> list[tuple[str, float]]:
    parts = [(name, float(getattr(summary.seconds, name))) for name in _PHASES if getattr(summary.seconds, name)]
    total = summary.seconds.total or 0.0
    rest = total - sum(value for _, value in parts)
    # less than one part in a hundred is the clock's reading
    return parts + ([('other', rest)] if rest > 0.01 * total else [])


def _pictures(summary: Summary, folder: Path | None) -> list[tuple[str, str]]:
    paths = [] if folder is None else [folder / name for name in summary.pictures]
    return [(path.stem, base64.b64encode(path.read_bytes()).decode()) for path in paths if path.is_file()]
