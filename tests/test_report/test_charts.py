"""Lengths and places in the drawings, read back from the markup."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from mmbrecq.mixed_precision.diagnosis import GridLoss, GridLosses
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.report.html import environment, render_html
from mmbrecq.report.summary import Summary

MACROS: Any = environment().get_template('macros.html').module


def unit(name: str, before: float, after: float) -> UnitResult:
    """Returns a result with losses."""
    return UnitResult(name, 'weights', (), before, after, 1, 1.0, False)


def numbers(markup: str, pattern: str) -> list[float]:
    """Returns what the pattern's group matched, as floats."""
    return [float(value) for value in re.findall(pattern, markup)]


@pytest.mark.parametrize(
    ('value', 'largest', 'width'),
    [(41.0, 82.0, 50.0), (82.0, 82.0, 100.0), (-1.0, 82.0, 0.0), (math.nan, 82.0, 0.0), (1.0, 0.0, 0.0)],
)
def test_meter_is_proportional_and_bounded(value: float, largest: float, width: float) -> None:
    assert numbers(MACROS.meter(value, largest, 'float'), r'class="fill" width="([\d.]+)"') == [width]


def test_stacked_bar_fills_its_width_without_gaps() -> None:
    markup = MACROS.stacked_bar([('a', 1.0), ('b', 3.0), ('c', 4.0)], 'label')
    starts, widths = numbers(markup, r'x="([\d.]+)"'), numbers(markup, r'width="([\d.]+)" height="20">')
    assert widths == [125.0, 375.0, 500.0]
    assert starts == [0.0, 125.0, 500.0]


@pytest.mark.parametrize('bits', range(2, 9))
def test_bits_bar_has_a_part_per_bit(bits: int) -> None:
    assert f'<rect class="b{bits}" width="{bits}"' in MACROS.bits_bar(bits)


def test_float_has_no_bar() -> None:
    assert '<rect' not in MACROS.bits_bar(None)


def test_losses_lie_on_a_log_axis() -> None:
    markup = MACROS.loss_chart([unit('u', 1.0, 0.001), unit('v', 0.1, 0.01)], 'label')
    before = numbers(markup, r'class="before" cx="([\d.]+)"')
    after = numbers(markup, r'class="after" cx="([\d.]+)"')
    decade = (before[0] - after[0]) / 3
    assert before[0] - before[1] == pytest.approx(decade, abs=0.11)
    assert after[1] - after[0] == pytest.approx(decade, abs=0.11)
    spans = numbers(markup, r'class="span" [^>]*width="([\d.]+)"')
    assert spans == pytest.approx([3 * decade, decade], abs=0.11)
    assert '÷ 1e+03' in markup
    assert '÷ 10<' in markup


def test_gridlines_stand_where_their_losses_would() -> None:
    markup = MACROS.loss_chart([unit('u', 0.01, 1.0)], 'label')
    ticks = dict(re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">([^<]+)</text>', markup))
    places = {float(label): float(x) for x, label in ticks.items()}
    assert places[0.01] == numbers(markup, r'class="before" cx="([\d.]+)"')[0]
    assert places[1.0] == numbers(markup, r'class="after" cx="([\d.]+)"')[0]
    assert {0.02, 0.05, 0.1, 0.2, 0.5} < set(places)


@pytest.mark.parametrize('losses', [(0.0, 0.0), (math.nan, 0.1), (0.1, math.inf), (1.0, 0.0)])
def test_a_loss_off_the_axis_is_written_out(losses: tuple[float, float]) -> None:
    markup = MACROS.loss_chart([unit('u', *losses), unit('v', 0.2, 0.1)], 'label')
    assert markup.count('class="after"') == 1
    assert re.search(r'>loss \S+ before, \S+ after</text>', markup)


def test_no_more_than_nine_decades_are_labelled() -> None:
    markup = MACROS.loss_chart([unit('u', 1e10, 1e-20)], 'label')
    assert markup.count('class="grid"') <= 9


def test_a_long_name_keeps_both_ends() -> None:
    name = 'backbone.' + 'x' * 60 + '.conv2'
    markup = MACROS.loss_chart([unit(name, 1.0, 0.5)], 'label')
    assert re.search(r'>backbone\.x+…x+\.conv2</text>', markup)
    assert f'<title>{name}:' in markup


def test_escape_leaves_nothing_that_ends_a_tag_or_an_attribute() -> None:
    evil = '<a b="c" d=\'e\'>&'
    expected = '&lt;a b=&#34;c&#34; d=&#39;e&#39;&gt;&amp;'
    assert str(MACROS.table([(evil, evil)], [[evil]])).count(expected) == 4


def test_what_utf_8_cannot_hold_is_a_question_mark() -> None:
    page = render_html(Summary(config='a\udcff.py'))
    assert '<code>a?.py</code>' in page and page.encode()


def test_bars_of_grids_are_proportional_and_stand_in_the_table() -> None:
    grids = [
        GridLoss('activation_quantizers.relu', 'activation', 8, 0.5, ['conv', 'fc']),
        GridLoss('conv', 'weight', 4, 0.25), GridLoss('fc', 'weight', 8, 0.0),
    ]  # fmt: skip
    markup = MACROS.grids(GridLosses('divergence', 8, 1.5, grids, 5), 2)
    assert re.findall(r'class="name"[^>]*>([^<]+)<', markup) == ['relu', 'conv']
    first, second = numbers(markup, r'<rect class="t[02]" x=[^>]* width="([\d.]+)" height="16"')
    assert first == pytest.approx(2 * second, abs=0.2)
    assert [name for name in re.findall(r'<rect class="(t\d)" x=', markup)] == ['t2', 't0']
    rows = [re.findall(r'>([^<]*)</t[hd]>', row) for row in re.findall(r'<tr>(.*?)</tr>', markup)]
    assert rows[1:] == [['relu', 'activation', '8', '0.5', 'conv, fc'], ['conv', 'weight', '4', '0.25', '']]
    assert 'over 8 images; with all 5 grids on it is 1.5. The 2 grids that cost most' in markup
    assert 'What single grids cost' in render_html(Summary(grids=GridLosses('divergence', 8, 1.5, grids, 5)))
    assert 'What single grids cost' not in render_html(Summary(grids=GridLosses('divergence', 8, 0.0, [], 0)))
