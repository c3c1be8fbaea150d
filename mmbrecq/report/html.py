"""Writes ``report.html``, ``sensitivity.html`` and ``grids.html``: self-contained pages, from the templates here."""

import base64
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mmbrecq.mixed_precision.costs.models import FLOAT_BITS
from mmbrecq.mixed_precision.diagnosis import GridLosses
from mmbrecq.mixed_precision.search.bits import SearchResult
from mmbrecq.mixed_precision.sensitivity.table import SensitivityTable
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.report import rows
from mmbrecq.report.summary import Summary
from mmbrecq.runs.storage import write_text_atomic

_LONGEST_NAME = 34


def render_html(summary: Summary, date: str = '', folder: Path | None = None) -> str:
    """Returns the page, with the pictures in ``folder``: inline style and SVG, no script, nothing to load."""
    bits = Counter(f'W{b.weight or 32}A{b.activation or 32}' for b in summary.bits.values())
    counts = [f'{count} at {label}' for label, count in bits.most_common()]
    found, pictures = rows.result_rows(summary), _pictures(summary, folder)
    return _render('report.html', s=summary, date=date, rows=found, counts=counts, pictures=pictures)


def write_report(summary: Summary, path: str | os.PathLike[str], date: str = '') -> None:
    """Writes :func:`render_html` to ``path``, whole or not at all; StorageError if it cannot be written."""
    write_text_atomic(render_html(summary, date, Path(path).parent), Path(path))


def write_sensitivities(table: SensitivityTable, config: str, path: Path) -> None:
    """Writes ``sensitivity.html``: the loss of every layer at every number of bits, as charts and as tables."""
    # a float layer loses nothing
    losses = {name: table.loss.get(name, {}) for name in table.searched}
    weights = {name: {bits: row[bits] for bits in row if bits != FLOAT_BITS} for name, row in losses.items()}
    title = f'{Path(config).stem}, sensitivities'
    write_text_atomic(_render('sensitivity.html', title=title, config=config, table=table, weights=weights), path)


def write_grids(found: GridLosses, config: str, path: Path) -> None:
    """Writes ``grids.html``: what single grids cost the outputs, as a chart and as a table."""
    title = f'{Path(config).stem}, grids'
    write_text_atomic(_render('grids.html', title=title, config=config, found=found), path)


def _render(template: str, **values: Any) -> str:
    """Returns a page; a lone surrogate of a path, which UTF-8 cannot hold, becomes '?'."""
    return environment().get_template(template).render(**values).encode('utf-8', 'replace').decode()


@cache
def environment() -> Environment:
    """Returns the templates, with the functions that they call."""
    found = Environment(
        loader=PackageLoader('mmbrecq.report'), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    found.filters.update(
        px=lambda value: f'{value:.1f}', bytes=rows.format_bytes, seconds=rows.format_seconds, loss=rows.format_loss,
        losses=lambda unit: (unit.loss_before, unit.loss_after), list_values=lambda row: row.values(),
        pair=lambda *pair: pair, short=_short, stem=lambda path: Path(path).stem,
    )  # fmt: skip
    found.tests.update(drawable=drawable, finite=lambda value: value is not None and math.isfinite(value))
    functions = {**vars(rows), 'share': share, 'log_axis': log_axis, 'front_axes': front_axes, 'largest': _largest}
    found.globals.update({name: value for name, value in functions.items() if callable(value)})
    return found


@dataclass(frozen=True)
class Axis:
    """Maps values from ``low`` to ``high`` to the pixels from ``start`` to ``end``."""

    start: float
    end: float
    low: float
    high: float

    def pixel(self, value: float) -> float:
        return self.start + (value - self.low) * (self.end - self.start) / (self.high - self.low or 1)


class LogAxis(Axis):
    """Maps whole decades ``10**low .. 10**high``; values that are not above 0 have the pixel of the low end."""

    def pixel(self, value: float) -> float:
        return super().pixel(math.log10(value) if value > 0 else self.low)

    def ticks(self) -> list[float]:
        """Returns the labelled values: more than the decades on a short axis, and fewer on a long one."""
        low, high = int(self.low), int(self.high)
        values = [10.0**exponent for exponent in range(low, high + 1, max(1, math.ceil((high - low) / 8)))]
        if high - low <= 2:
            values += [factor * 10.0**exponent for exponent in range(low, high) for factor in (2, 5)]
        return sorted(values)


def share(value: float, largest: float) -> float:
    """Returns ``value`` in percent of ``largest``, from 0 to 100; 0 where that is undefined."""
    return 100 * min(max(value / largest, 0.0), 1.0) if largest > 0 and math.isfinite(value) else 0.0


def drawable(unit: UnitResult) -> bool:
    """Returns whether both losses of a unit are positive and finite, as a log axis needs them."""
    return all(math.isfinite(loss) and loss > 0 for loss in (unit.loss_before, unit.loss_after))


def log_axis(values: Iterable[Iterable[float]], start: float, end: float) -> LogAxis:
    """Returns the axis of the fewest decades that hold all ``values`` above 0."""
    logs = [math.log10(value) for row in values for value in row if value > 0]
    low, high = (math.floor(min(logs)), math.ceil(max(logs))) if logs else (-1, 0)
    return LogAxis(start, end, low, max(high, low + 1))


def front_axes(chosen: SearchResult, points: list[list[float]]) -> tuple[Axis, LogAxis, list[float]]:
    """Returns the axes of cost and loss, and the labelled costs."""
    spent = chosen.spent[chosen.front_cost]
    costs = [spent, *(cost for cost, _ in points)]
    losses = [chosen.predicted, chosen.measured or 0.0, *(loss for _, loss in points)]
    least, most = min(costs), max(costs)
    labelled = [least + i * (most - least) / 5 for i in range(6)]
    return Axis(92, 812, least, most), log_axis([losses], 274, 12), labelled


def _short(name: str) -> str:
    half = _LONGEST_NAME // 2
    return name if len(name) <= _LONGEST_NAME else f'{name[: half - 1]}…{name[-half:]}'


def _largest(found: list[rows.ResultRow], metric: str) -> float:
    values = (row.metrics.get(metric, math.nan) for row in found)
    return max((value for value in values if math.isfinite(value)), default=0.0)


def _pictures(summary: Summary, folder: Path | None) -> list[tuple[str, str]]:
    paths = [] if folder is None else [folder / name for name in summary.pictures]
    return [(path.stem, base64.b64encode(path.read_bytes()).decode()) for path in paths if path.is_file()]
