"""The tables of a choice of bits, against sums written out."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from mmbrecq.errors import BudgetError
from mmbrecq.mixed_precision.search.problem import BitProblem, Cost

CANDIDATES = ((2, 8), (4, 8), (8, 8))


def problem(**changes: Any) -> BitProblem:
    values = {
        'layers': ('stem', 'conv', 'fc'),
        'candidates': CANDIDATES,
        'loss': np.array([[9.0, 3, 1], [5, 2, 0.5], [7, 1, 0.25]]),
        'pairs': {(0, 1): np.array([[4.0, 0, 0], [0, 0, 0], [0, 0, 0.125]])},
        'costs': {'size': Cost(np.array([[2.0, 4, 8], [20, 40, 80], [10, 20, 40]]), 100, 5, 'bytes')},
    }
    return BitProblem(**{**values, **changes})


@pytest.mark.parametrize(
    ('choice', 'loss', 'size'),
    [
        ((0, 0, 0), 9 + 5 + 7 + 4, 5 + 2 + 20 + 10),
        ((2, 2, 2), 1 + 0.5 + 0.25 + 0.125, 5 + 8 + 80 + 40),
        ((0, 2, 1), 9 + 0.5 + 1, 5 + 2 + 80 + 20),
    ],
)
def test_losses_and_costs(choice: tuple[int, ...], loss: float, size: float) -> None:
    tables = problem()
    one = np.array(choice)
    assert tables.losses(one) == loss
    assert tables.spent('size', one) == size
    assert tables.feasible(one) == (size <= 100)
    several = np.stack([one, np.zeros(3, int)])
    assert tables.losses(several).tolist() == [loss, 25]
    assert tables.feasible(several).tolist() == [size <= 100, True]


def test_what_a_layer_may_not_have_is_no_option() -> None:
    allowed = np.array([[False, False, True], [True, True, True], [True, False, True]])
    tables = problem(allowed=allowed)
    assert [options.tolist() for options in tables.options] == [[2], [0, 1, 2], [0, 2]]
    assert tables.least(tables.costs['size'].table).tolist() == [2, 0, 0]
    assert tables.least(tables.loss).tolist() == [2, 2, 2]


def test_a_budget_below_the_least_cost_says_what_that_is() -> None:
    size = Cost(problem().costs['size'].table, 36, 5, 'bytes')
    expected = (
        'budget of size that can be kept, but got 36 bytes: the least cost of these layers and candidates is 37 bytes'
    )
    with pytest.raises(BudgetError, match=re.escape(expected)):
        problem(costs={'size': size}).check_budgets()
    problem().check_budgets()
