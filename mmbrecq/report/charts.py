"""Inline SVG charts of the report, as pure functions from numbers to markup.

Colours are classes of the style sheet, so that one drawing serves light and dark. Each number that a chart shows
also stands in a table or legend beside it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmbrecq.report.rows import format_loss, kept_words
from mmbrecq.report.summary import UnitRecord

_WIDTH, _ROW, _AXIS = 860, 26, 30
_CHARACTER = 7.6  # width of a monospace character at 12px, rounded up
_LONGEST_NAME = 34


def escape(text: object) -> str:
    """Returns text safe in HTML content and in quoted attributes; a lone surrogate of a path becomes '?'."""
    return html.escape(str(text).encode('utf-8', 'replace').decode('utf-8'), quote=True)


def meter(value: float, largest: float, kind: str) -> str:
    """Returns a bar from 0 to ``value`` on a track that ends at ``largest``, to stand beside the number itself."""
    share = value / largest if largest > 0 and math.isfinite(value) else 0.0
    width = 100 * min(max(share, 0.0), 1.0)
    return (
        f'<svg class="meter {escape(kind)}" viewBox="0 0 100 7" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="7"/><rect class="fill" width="{width:.2f}" height="7"/></svg>'
    )


def bits_bar(bits: int | None) -> str:
    """Returns the number of bits beside a bar of eight parts, darker with more bits; None is float."""
    if bits is None:
        return '<span class="bits"><b>float</b></span>'
    bar = '' if bits > 8 else f'<rect class="b{bits}" width="{bits}" height="12"/>'
    return (
        f'<span class="bits"><b>{bits}</b><svg viewBox="0 0 8 12" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="8" height="12"/>{bar}</svg></span>'
    )


def stacked_bar(parts: Sequence[tuple[str, float]], label: str) -> str:
    """Returns one bar of coloured parts; part ``i`` has class ``t<i>``.

    Args:
        parts: Name and size > 0 of each part, six at most.
        label: What a screen reader says.
    """
    total = sum(size for _, size in parts)
    drawn, start = [], 0.0
    for i, (name, size) in enumerate(parts):
        width = 1000 * size / total
        drawn.append(
            f'<rect class="t{i}" x="{start:.2f}" width="{width:.2f}" height="20"><title>{escape(name)}</title></rect>'
        )
        start += width
    return (
        f'<svg class="stack" viewBox="0 0 1000 20" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f'{"".join(drawn)}</svg>'
    )


def loss_chart(units: Sequence[UnitRecord], label: str) -> str:
    """Returns one row per unit: a bar on a log axis from the loss before to the loss after.

    A unit with a loss that is zero or not finite has no place on a log axis; its row says so.

    Args:
        units: Units with non-negative losses.
        label: What a screen reader says.
    """
    left = 12 + _CHARACTER * max((len(_short(unit.name)) for unit in units), default=0)
    axis = _LogAxis.around(units, left, right=_WIDTH - 118)
    bottom = _ROW * len(units) + 8
    ticks = ''.join(_tick(axis.place(loss), bottom, loss) for loss in axis.ticks())
    rows = ''.join(_row(unit, _ROW * i + _ROW / 2 + 4, axis) for i, unit in enumerate(units))
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {bottom + _AXIS}" role="img" aria-label="{escape(label)}">'
        f'{ticks}{rows}</svg>'
    )


@dataclass(frozen=True)
class _LogAxis:
    """Whole decades ``10**low .. 10**high`` between the pixels ``left`` and ``right``."""

    left: float
    right: float
    low: int
    high: int

    @classmethod
    def around(cls, units: Sequence[UnitRecord], left: float, right: float) -> _LogAxis:
        losses = [loss for unit in units if _drawable(unit) for loss in (unit.loss_before, unit.loss_after)]
        if not losses:
            return cls(left, right, -1, 0)
        low, high = math.floor(math.log10(min(losses))), math.ceil(math.log10(max(losses)))
        return cls(left, right, low, max(high, low + 1))

    def place(self, loss: float) -> float:
        return self.left + (math.log10(loss) - self.low) * (self.right - self.left) / (self.high - self.low)

    def ticks(self) -> list[float]:
        # One or two decades would leave the axis nearly bare; many would crowd it.
        step = max(1, math.ceil((self.high - self.low) / 8))
        values = [10.0**exponent for exponent in range(self.low, self.high + 1, step)]
        if self.high - self.low <= 2:
            values += [factor * 10.0**exponent for exponent in range(self.low, self.high) for factor in (2, 5)]
        return sorted(values)


def _drawable(unit: UnitRecord) -> bool:
    return all(math.isfinite(loss) and loss > 0 for loss in (unit.loss_before, unit.loss_after))


def _tick(x: float, bottom: float, loss: float) -> str:
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>'
        f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{loss:g}</text>'
    )


def _short(name: str) -> str:
    if len(name) <= _LONGEST_NAME:
        return name
    half = _LONGEST_NAME // 2
    return f'{name[: half - 1]}…{name[-half:]}'


def _row(unit: UnitRecord, y: float, axis: _LogAxis) -> str:
    tip = f'loss {format_loss(unit.loss_before)} before, {format_loss(unit.loss_after)} after'
    mark = ' class="kept"' if unit.kept_nearest else ''
    head = (
        f'<g{mark}><title>{escape(unit.name)}: {tip}</title>'
        f'<text class="name" x="{axis.left - 12:.1f}" y="{y + 4}" text-anchor="end">{escape(_short(unit.name))}</text>'
    )
    if not _drawable(unit):
        return f'{head}<text x="{axis.left + 8:.1f}" y="{y + 4}">{tip}</text></g>'
    before, after = axis.place(unit.loss_before), axis.place(unit.loss_after)
    start, width = min(before, after), abs(before - after)
    factor = kept_words(unit) if unit.kept_nearest else f'÷ {unit.loss_before / unit.loss_after:.3g}'
    return (
        f'{head}<rect class="span" x="{start:.1f}" y="{y - 5}" width="{width:.1f}" height="10"/>'
        f'<circle class="before" cx="{before:.1f}" cy="{y}" r="4.5"/>'
        f'<circle class="after" cx="{after:.1f}" cy="{y}" r="5.5"/>'
        f'<text class="factor" x="{axis.right + 16:.1f}" y="{y + 4}">{factor}</text></g>'
    )
