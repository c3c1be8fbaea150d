"""``sensitivity.html``: what every layer loses at every number of bits, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from mmbrecq.mixed_precision.sensitivity.table import FLOAT_BITS, SensitivityTable
from mmbrecq.report.charts import escape
from mmbrecq.report.html import page
from mmbrecq.runs.storage import write_text_atomic

_WIDTH, _ROW, _TOP = 860, 26, 34
_CHARACTER = 7.6

Losses = Mapping[str, Mapping[int, float]]


def sensitivity_chart(losses: Losses, kind: str) -> str:
    """One row per layer: a dot for every number of bits, on a log axis of the rise of the loss.

    A layer that loses nothing, or gains, at some bits has its dot at the left end.

    Args:
        losses: Rise by number of bits, for every layer.
        kind: Of the loss.
    """
    values = [value for row in losses.values() for value in row.values() if value > 0]
    low, high = (math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))) if values else (-1, 0)
    high = max(high, low + 1)
    left = 12 + _CHARACTER * max(len(name) for name in losses)
    right = max(left + 300, _WIDTH) - 24

    def place(value: float) -> float:
        exponent = math.log10(value) if value > 0 else low
        return left + (exponent - low) * (right - left) / (high - low)

    bottom = _TOP + _ROW * len(losses)
    step = max(1, math.ceil((high - low) / 8))
    parts = [
        f'<line class="grid" x1="{place(10.0**e):.1f}" x2="{place(10.0**e):.1f}" y1="{_TOP - 8}" y2="{bottom}"/>'
        f'<text x="{place(10.0**e):.1f}" y="{bottom + 18}" text-anchor="middle">{10.0**e:g}</text>'
        for e in range(low, high + 1, step)
    ]
    for i, bits in enumerate(_numbers(losses)):
        x = left + 90 * i
        parts.append(
            f'<circle class="b{bits}" cx="{x:.1f}" cy="12" r="6"/><text x="{x + 12:.1f}" y="16">{bits} bits</text>'
        )
    for i, (name, row) in enumerate(losses.items()):
        y = _TOP + _ROW * i + _ROW / 2
        dots = ''.join(
            f'<circle class="b{bits}" cx="{place(value):.1f}" cy="{y}" r="6">'
            f'<title>{bits} bits: {value:.4g}</title></circle>'
            for bits, value in row.items()
        )
        parts.append(
            f'<g><title>{escape(name)}</title><text class="name" x="{left - 12:.1f}" y="{y + 4}" text-anchor="end">'
            f'{escape(name)}</text>{dots}</g>'
        )
    label = f'rise of the {kind} with one layer quantized, for {len(losses)} layers'
    return (
        f'<svg class="chart" viewBox="0 0 {right + 24:.0f} {bottom + 30}" role="img" aria-label="{escape(label)}">'
        f'{"".join(parts)}</svg>'
    )


def write_sensitivities(table: SensitivityTable, config: str, path: Path) -> None:
    """Writes the page: charts, and every number in a table.

    Raises:
        StorageError: The file cannot be written; the previous one survives.
    """
    # a float layer loses nothing, so there is nothing to draw
    weights = {
        name: {bits: value for bits, value in table.loss.get(name, {}).items() if bits != FLOAT_BITS}
        for name in table.searched
    }
    body = (
        f'<header><p class="eyebrow">mmbrecq, sensitivities</p><h1>{escape(Path(config).stem)}</h1>'
        f'<code>{escape(config)}</code></header>'
        + _section(
            f'Rise of the {table.kind} with one weight quantized',
            'The weight of a layer is at the given bits after the reconstruction of its unit, all else is float.',
            weights, table,
        )
    )  # fmt: skip
    if table.activation_loss:
        body += _section(
            f'Rise of the {table.kind} with one activation quantized',
            'What the layer reads is at the given bits, with all that shares a reader or quantizer; all else is float.',
            table.activation_loss, table,
        )  # fmt: skip
    write_text_atomic(page(f'{Path(config).stem}, sensitivities', body, 'sensitivity.json'), path)


def _section(title: str, note: str, losses: Losses, table: SensitivityTable) -> str:
    """The chart of some losses, and every number in a table."""
    head = ''.join(f'<th>{bits} bits</th>' for bits in _numbers(losses))
    rows = ''.join(
        f'<tr><td class="mono">{escape(name)}</td><td class="mono">{escape(table.units.get(name, ""))}</td>'
        + ''.join(f'<td>{row.get(bits, math.nan):.4g}</td>' for bits in _numbers(losses))
        + '</tr>'
        for name, row in losses.items()
    )
    return (
        f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{sensitivity_chart(losses, table.kind)}'
        f'<div class="scroll"><table class="compact"><thead><tr><th>layer</th><th>unit</th>{head}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div></section>'
    )


def _numbers(losses: Losses) -> list[int]:
    """Numbers of bits of the losses, the fewest first."""
    return sorted({bits for row in losses.values() for bits in row})
