"""The section on a choice of bits: its numbers as text, its points where the axes say."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest

from mmbrecq.mixed_precision.search.bits import SearchResult, Trial
from mmbrecq.report.html import environment, render_html
from mmbrecq.report.summary import Summary
from mmbrecq.schema import decode, encode

MACROS: Any = environment().get_template('macros.html').module

CHOSEN = SearchResult(
    'divergence', {'a': 2, 'b': None}, {'a': 4}, 0.01, 0.02, {'size': '0.5x', 'bitops': '1g'},
    {'size': 50e3, 'bitops': 1e9}, {'size': 40e3, 'bitops': 5e8, 'latency': 3.25}, {'size': 100e3, 'bitops': 4e9},
    {'size': 'bytes', 'bitops': 'bit operations', 'latency': 'ms'}, 'size', [[20e3, 1.0], [40e3, 0.01], [60e3, 0.001]],
)  # fmt: skip


def circles(markup: str, kind: str) -> list[tuple[float, float]]:
    found = re.findall(rf'<circle class="{kind}" cx="([\d.]+)" cy="([\d.]+)"', markup)
    return [(float(x), float(y)) for x, y in found]


def test_what_was_chosen_is_told_in_numbers() -> None:
    markup = MACROS.choice_of_bits(CHOSEN)
    text = re.sub(r'<[^>]+>', ' ', markup)
    assert 'Bits of 2 layers were chosen within size 0.5x, bitops 1g.' in text
    assert 'divergence from the float outputs: predicted 0.01, measured 0.02.' in text
    rows = [re.findall(r'>([^<]+)</t[hd]>', row) for row in re.findall(r'<tr>(.*?)</tr>', markup)]
    assert ['size', '40.0 kB', '0.4x', '50.0 kB'] in rows
    assert ['latency', '3.25 ms', '-', '-'] in rows
    assert 'measured not yet' in MACROS.choice_of_bits(replace(CHOSEN, measured=None))
    assert 'Choice of bits' not in render_html(Summary())


def test_points_lie_where_the_axes_say() -> None:
    markup = MACROS.front_chart(CHOSEN, CHOSEN.front)
    front, (chosen,), (measured,) = (circles(markup, kind) for kind in ('before', 'after', 'measured'))
    assert chosen == front[1]
    assert measured[0] == chosen[0]
    # losses of 1, 0.01 and 0.001: two decades and one; costs in equal steps
    assert front[1][1] - front[0][1] == pytest.approx(2 * (front[2][1] - front[1][1]), abs=0.3)
    assert front[1][0] - front[0][0] == pytest.approx(front[2][0] - front[1][0], abs=0.2)
    decade = front[2][1] - front[1][1]
    assert chosen[1] - measured[1] == pytest.approx(math.log10(2) * decade, abs=0.2)
    ticks = {label: float(y) - 4 for y, label in re.findall(r'y="([\d.]+)" text-anchor="end">([^<]+)<', markup)}
    assert ticks['0.01'] == pytest.approx(front[1][1], abs=0.1)


def test_without_a_front_there_is_no_chart() -> None:
    assert '<svg class="chart"' in MACROS.choice_of_bits(CHOSEN)
    assert '<svg' not in MACROS.choice_of_bits(replace(CHOSEN, front=[]))


def test_choices_that_were_evaluated_stand_beside_their_predictions() -> None:
    trials = [Trial(90e3, 0.001, -0.25), Trial(20e3, 1.0, 12.0), Trial(40e3, 0.01, 0.5, chosen=True)]
    chosen = replace(CHOSEN, metric='accuracy/top1', held_out=400, trials=trials)
    markup = MACROS.choice_of_bits(chosen)
    assert 'On 400 held-out images accuracy/top1 dropped by 0.5 points.' in markup
    rows = [re.findall(r'>([^<]*)</t[hd]>', row) for row in re.findall(r'<tr>(.*?)</tr>', markup)]
    assert rows[-3:] == [
        ['20.0 kB', '1', '12', ''], ['40.0 kB', '0.01', '0.5', 'chosen'], ['90.0 kB', '0.001', '-0.25', ''],
    ]  # fmt: skip
    assert 'held-out' not in MACROS.choice_of_bits(CHOSEN)
    assert decode(Summary, encode(Summary(search=chosen)), 'summary').search == chosen


def test_the_choice_comes_back_from_the_file_and_stands_in_the_page() -> None:
    summary = Summary(search=CHOSEN)
    assert decode(Summary, encode(summary), 'summary').search == CHOSEN
    assert 'Choice of bits' in render_html(summary)
