"""The cheapest choice within a drop, against all choices of small problems."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from mmbrecq.errors import BudgetError, ConfigError
from mmbrecq.mixed_precision.search.bits import PRECISION, SearchOptions, cost_to_lower, drop_budget, find_cheapest
from mmbrecq.mixed_precision.search.genetic import GeneticSearcher
from mmbrecq.mixed_precision.search.integer import IntegerProgram
from mmbrecq.mixed_precision.search.problem import BitProblem, Cost

CANDIDATES = ((2, None), (4, None), (8, None), (None, None))


def problem(seed: int, layers: int = 6, time: float = math.inf) -> BitProblem:
    """Sizes grow and losses fall with the bits; two layers lose more together at 2 bits; float loses nothing."""
    draw = np.random.default_rng(seed)
    size = draw.lognormal(0, 1, (layers, 1)) * np.array([2.0, 4, 8, 32])
    loss = draw.lognormal(0, 1, (layers, 1)) * np.array([1, 0.1, 0.01, 0])
    pair = np.zeros((4, 4))
    pair[0, 0] = 0.5
    costs = {'size': Cost(size, unit='bytes'), 'time': Cost(draw.uniform(1, 2, (layers, 4)), time, 1.0, 'ms')}
    return BitProblem([f'layer{i}' for i in range(layers)], CANDIDATES, loss, {(0, 1): pair}, costs)


def cheapest_of_all(tables: BitProblem, cost: str, measure: Callable[[Any], float], points: float) -> float:
    """The least cost of the choices that keep the budgets, by looking at every choice."""
    choices = np.array(list(itertools.product(*tables.options)))
    kept = [choice for choice in choices[tables.feasible(choices)] if measure(choice) <= points]
    return min(float(tables.spent(cost, choice)) for choice in kept)


@pytest.mark.parametrize('searcher', [GeneticSearcher(iterations=20), IntegerProgram()])
@pytest.mark.parametrize('points', [0.0, 0.3, 2.0, 30.0])
def test_the_cheapest_of_all_choices_is_found(searcher: Any, points: float) -> None:
    for seed in range(3):
        tables = problem(seed)

        def measure(choice: Any, tables: BitProblem = tables) -> float:
            # the drop follows the predicted loss, however bent
            return float(10 * np.tanh(tables.losses(choice)))

        choice, trials = find_cheapest(tables, 'size', searcher.search, measure, points)
        spent, least = float(tables.spent('size', choice)), cheapest_of_all(tables, 'size', measure, points)
        assert measure(choice) <= points
        assert least <= spent * (1 + 1e-9) and spent <= least * (1 + 2 * PRECISION)
        assert len({trial.spent for trial in trials}) == len(trials) <= 14
        (chosen,) = [trial for trial in trials if trial.chosen]
        assert chosen.spent == spent and chosen.predicted == tables.losses(choice) and chosen.drop == measure(choice)


def test_other_budgets_are_kept() -> None:
    tables = problem(1, time=9.0)

    def measure(choice: Any) -> float:
        return float(tables.losses(choice))

    for points in (0.5, 2.0):
        choice, _ = find_cheapest(tables, 'size', IntegerProgram().search, measure, points)
        assert tables.feasible(choice)
        least = cheapest_of_all(tables, 'size', measure, points)
        assert least <= tables.spent('size', choice) <= least * (1 + 2 * PRECISION)
    # of the other cost, with a budget of the size
    size = replace(tables.costs['size'], budget=60.0)
    tables = replace(problem(1), costs={**problem(1).costs, 'size': size})
    choice, _ = find_cheapest(tables, 'time', IntegerProgram().search, measure, 0.5)
    assert tables.feasible(choice) and measure(choice) <= 0.5
    assert tables.spent('time', choice) <= cheapest_of_all(tables, 'time', measure, 0.5) * (1 + 2 * PRECISION)


def test_a_wrong_prediction_is_corrected() -> None:
    tables = problem(2)

    def measure(choice: Any) -> float:
        # the tables take the last layer for harmless
        return float(tables.losses(choice)) + 5.0 * (choice[-1] < 2)

    harmless = tables.loss.copy()
    harmless[-1] = [1e-6, 1e-7, 1e-8, 0]
    choice, trials = find_cheapest(replace(tables, loss=harmless), 'size', IntegerProgram().search, measure, 1.0)
    assert measure(choice) <= 1.0 and choice[-1] >= 2
    wrong = [trial for trial in trials if trial.predicted <= 1.0 < trial.drop]
    assert wrong and all(trial.spent < tables.spent('size', choice) for trial in wrong)


@pytest.mark.parametrize('drop', [3.25, math.nan])
def test_what_cannot_be_kept_says_what_can(drop: float) -> None:
    message = f'but got 1 points: the choice of these layers .* predicted to lose least drops by {drop:.4g} on the held'
    with pytest.raises(BudgetError, match=message):
        find_cheapest(problem(0), 'size', IntegerProgram().search, lambda _: drop, 1.0)


def test_a_search_that_fails_is_no_search_that_finds_nothing_cheaper() -> None:
    calls: list[int] = []

    def search(tables: BitProblem) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise BudgetError('no time left')
        return IntegerProgram().search(tables)

    with pytest.raises(BudgetError, match='no time left'):
        find_cheapest(problem(0), 'size', search, lambda choice: float(problem(0).losses(choice)), 0.5)


def test_the_cost_without_a_budget_is_made_least() -> None:
    lower = partial(cost_to_lower, ['size', 'latency'])
    assert lower({'drop': 1}) == lower({'drop': 1, 'latency': 3}) == lower({'size': 1, 'latency': 3}) == 'size'
    assert lower({'drop': 1, 'size': '0.1x'}) == 'latency'


@pytest.mark.parametrize('drop', [-1, '-0.5', 'much', 'nan', math.inf, True, None, '1%'])
def test_a_drop_that_is_none(drop: Any) -> None:
    with pytest.raises(ConfigError, match='^expected the budget of drop to be points of the metric, >= 0, but got'):
        SearchOptions(budgets={'drop': drop})


def test_a_drop_may_be_words_of_the_command_line() -> None:
    assert drop_budget({'drop': '1.5', 'size': '0.1x'}) == 1.5 and drop_budget({'drop': 0}) == 0
    assert drop_budget({'size': '0.1x'}) is None
