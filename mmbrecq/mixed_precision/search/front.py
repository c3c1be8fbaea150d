"""Loss against one cost, for the picture in the report."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mmbrecq.mixed_precision.search.local import descend
from mmbrecq.mixed_precision.search.nsga2 import NSGA2Searcher
from mmbrecq.mixed_precision.search.problem import BitProblem, Choices

POINTS = 40
"""So many points of the front are refined at most, evenly over its length."""


def find_front(problem: BitProblem, name: str, seed: int = 0) -> list[list[float]]:
    """Cost and loss of choices of which none is better in both than another, the cheapest first; budgets play no part.

    What NSGA-II finds is changed, point by point, in one layer or two as long as that gains within its cost.

    Args:
        problem: What is chosen from.
        name: Of the cost.
        seed: Of the search.

    Raises:
        DependencyError: pymoo is not installed.
    """
    free = replace(problem, costs={name: replace(problem.costs[name], budget=np.inf)})
    front = _best_for_their_cost(free, name, NSGA2Searcher(iterations=100).front(free, seed))
    kept = front[np.unique(np.linspace(0, len(front) - 1, POINTS).round().astype(int))]
    refined = []
    for choice in kept:
        limit = float(free.spent(name, choice))
        refined.append(descend(replace(free, costs={name: replace(free.costs[name], budget=limit)}), choice))
    found = _best_for_their_cost(free, name, np.array(refined))
    costs, losses = free.spent(name, found), free.losses(found)
    return [[float(cost), float(loss)] for cost, loss in zip(costs, losses, strict=True)]


def _best_for_their_cost(problem: BitProblem, name: str, choices: Choices) -> Choices:
    """Choices that lose less than all cheaper ones, the cheapest first."""
    costs, losses = problem.spent(name, choices), problem.losses(choices)
    order = np.lexsort((losses, costs))
    before = np.minimum.accumulate(np.concatenate([[np.inf], losses[order][:-1]]))
    return np.asarray(choices[order[losses[order] < before]])
