"""The report's section on a choice of bits: budgets, what it was predicted to lose and what it loses, and the front."""

from __future__ import annotations

import math

from mmbrecq.mixed_precision.search.bits import SearchResult
from mmbrecq.report.bits import format_cost
from mmbrecq.report.charts import escape
from mmbrecq.report.rows import format_loss
from mmbrecq.report.sections import html_table, section
from mmbrecq.report.summary import Summary

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 860, 320, 84, 40, 12, 46
_COST_TICKS = 6


def choice_of_bits(summary: Summary) -> str:
    """Returns the section; '' where no bits were searched."""
    chosen = summary.search
    if chosen is None:
        return ''
    head = [('Cost', ''), ('Chosen', 'num'), ('Of float', 'num'), ('Budget', 'num')]
    rows = [_cost_row(chosen, name) for name in chosen.spent]
    measured = 'not yet' if chosen.measured is None else format_loss(chosen.measured)
    note = (
        f'<p class="note">Bits of {len(chosen.bits)} layers were chosen within '
        f'{escape(", ".join(f"{name} {amount}" for name, amount in chosen.asked.items()))}. Rise of the '
        f'{escape(chosen.kind)} from the float outputs: predicted {format_loss(chosen.predicted)}, measured '
        f'{measured}.</p>'
    )
    return section('Choice of bits', note, _front(chosen), html_table(head, rows))


def _cost_row(chosen: SearchResult, name: str) -> str:
    unit, spent, whole = chosen.units.get(name, ''), chosen.spent[name], chosen.float_costs.get(name)
    share = f'{spent / whole:.3g}x' if whole else '-'
    budget = format_cost(chosen.budgets[name], unit) if name in chosen.budgets else '-'
    return (
        f'<tr><th scope="row">{escape(name)}</th><td class="num">{format_cost(spent, unit)}</td>'
        f'<td class="num">{share}</td><td class="num">{budget}</td></tr>'
    )


def _front(chosen: SearchResult) -> str:
    """The front with its legend; '' where none was searched."""
    points = [(cost, loss) for cost, loss in chosen.front if loss > 0]
    if len(points) < 2:
        return ''
    swatch = '<li><svg viewBox="0 0 12 12" aria-hidden="true"><circle class="{}" cx="6" cy="6" r="5"/></svg>{}</li>'
    parts = [('before', 'best choices for their cost'), ('after', 'chosen, predicted')]
    if chosen.measured is not None and chosen.measured > 0:
        parts.append(('measured', 'chosen, measured'))
    legend = ''.join(swatch.format(kind, text) for kind, text in parts)
    return f'<ul class="legend">{legend}</ul><div class="scroll">{front_chart(chosen)}</div>'


def front_chart(chosen: SearchResult) -> str:
    """Loss, on a log axis, against cost: the front, its chosen point, and what that was measured to lose."""
    unit, spent = chosen.units.get(chosen.front_cost, ''), chosen.spent[chosen.front_cost]
    points = [(cost, loss) for cost, loss in chosen.front if loss > 0]
    marks = [('after', chosen.predicted)] + ([] if chosen.measured is None else [('measured', chosen.measured)])
    marks = [(kind, loss) for kind, loss in marks if loss > 0]
    losses = [loss for _, loss in [*points, *marks]]
    low, high = math.floor(math.log10(min(losses))), math.ceil(math.log10(max(losses)))
    high = max(high, low + 1)
    least, most = min([cost for cost, _ in points] + [spent]), max([cost for cost, _ in points] + [spent])
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(cost: float) -> float:
        return _LEFT + 8 + (cost - least) * (right - _LEFT - 16) / (most - least or 1)

    def y(loss: float) -> float:
        return bottom - (math.log10(loss) - low) * (bottom - _TOP) / (high - low)

    lines = [
        f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y(10.0**e):.1f}" y2="{y(10.0**e):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y(10.0**e) + 4:.1f}" text-anchor="end">{10.0**e:g}</text>'
        for e in range(low, high + 1)
    ]
    for i in range(_COST_TICKS):
        cost = least + i * (most - least) / (_COST_TICKS - 1)
        lines.append(
            f'<text x="{x(cost):.1f}" y="{bottom + 20}" text-anchor="middle">{escape(format_cost(cost, unit))}</text>'
        )
    dots = [
        f'<circle class="before" cx="{x(cost):.1f}" cy="{y(loss):.1f}" r="3.5"><title>'
        f'{escape(format_cost(cost, unit))}: {format_loss(loss)}</title></circle>'
        for cost, loss in points
    ]
    dots += [
        f'<circle class="{kind}" cx="{x(spent):.1f}" cy="{y(loss):.1f}" r="6.5"><title>chosen: {format_loss(loss)}'
        '</title></circle>'
        for kind, loss in marks
    ]
    title = (
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{bottom + 40}" text-anchor="middle">{escape(chosen.front_cost)}</text>'
    )
    label = f'{chosen.kind} against {chosen.front_cost} of {len(points)} choices, with the chosen one'
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f'{"".join(lines)}{title}{"".join(dots)}</svg>'
    )
