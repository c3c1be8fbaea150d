"""The cheapest choice of bits whose measured drop of accuracy stays within a budget."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from mmbrecq.building import expect
from mmbrecq.errors import BudgetError
from mmbrecq.mixed_precision.search.problem import BitProblem, Choices

DROP = 'drop'
"""Name of the budget of the drop; all other budgets are of costs."""
PRECISION = 0.005
"""A choice is the cheapest where none that costs less by this share is predicted to be as good."""


@dataclass
class Trial:
    """One choice of bits that was evaluated: its cost, its loss by the tables, and the measured drop in points."""

    spent: float
    predicted: float
    drop: float
    chosen: bool = False


def drop_budget(budgets: Mapping[str, str | float]) -> float | None:
    """Returns the points that may be lost, None where there is no such budget; ConfigError where it is none.

    Example:
        >>> drop_budget({'size': '0.1x', 'drop': '1.5'})
        1.5
    """
    if DROP not in budgets:
        return None
    try:
        points = float(str(budgets[DROP]))
    except ValueError:
        points = -1.0
    expect(0 <= points < math.inf, 'the budget of drop to be points of the metric, >= 0', budgets[DROP])
    return points


def cost_to_lower(names: Iterable[str], budgets: Mapping[str, str | float]) -> str:
    """Returns the cost that is made least: the first without a budget of its own, or else the first."""
    return min(names, key=lambda name: name in budgets)


def find_cheapest(
    problem: BitProblem,
    cost: str,
    search: Callable[[BitProblem], Choices],
    measure: Callable[[Choices], float],
    points: float,
) -> tuple[Choices, list[Trial]]:
    """Finds the cheapest choice of bits whose measured drop stays within a budget.

    Of all choices that cost no more than some amount, the tables predict which one loses least, and an evaluation says
    whether that one keeps the budget. The least amount at which it does is found by bisection.

    ``search`` returns the choice within the budgets of a problem that is predicted to lose least, ``measure`` the drop
    of a choice in points. Returned are the choice, ``(layers,)``, and all that were evaluated, in this order. If the
    most accurate choice, by the tables, drops by more than ``points``, BudgetError names its drop.
    """
    trials: dict[bytes, Trial] = {}
    own = problem.costs[cost]

    def attempt(limit: float) -> tuple[Choices, float]:
        budget = replace(own, budget=min(limit, own.budget))
        choice = search(replace(problem, costs={**problem.costs, cost: budget}))
        key = choice.tobytes()
        if key not in trials:
            trials[key] = Trial(float(problem.spent(cost, choice)), float(problem.losses(choice)), measure(choice))
        return choice, trials[key].drop

    best, drop = attempt(math.inf)
    # what is not a number keeps no budget
    if not drop <= points:
        raise BudgetError(
            f'expected a budget of drop that can be kept, but got {points:.4g} points: the choice of these layers and '
            f'candidates that is predicted to lose least drops by {drop:.4g} on the held-out images'
        )
    others = any(math.isfinite(problem.costs[name].budget) for name in problem.costs if name != cost)
    low = limit = float(problem.spent(cost, problem.least(own.table)))
    high = float(problem.spent(cost, best))
    while limit < high:
        try:
            choice, drop = attempt(limit)
        except BudgetError:
            # the other budgets may leave no choice that is so cheap
            if not others:
                raise
            drop = math.inf
        if drop <= points:
            best, high = choice, float(problem.spent(cost, choice))
        else:
            low = limit
        limit = math.sqrt(max(low, high / 64) * high) if high - low > PRECISION * high else high
    trials[best.tobytes()].chosen = True
    return best, list(trials.values())
