"""Loss against one cost, for the picture in the report."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mmbrecq.search.nsga2 import NSGA2Searcher
from mmbrecq.search.problem import BitProblem


def find_front(problem: BitProblem, name: str, seed: int = 0) -> list[list[float]]:
    """Cost and loss of choices of which none is better in both than another, the cheapest first; budgets play no part.

    Args:
        problem: What is chosen from.
        name: Of the cost.
        seed: Of the search.

    Raises:
        BackendError: pymoo is not installed.
    """
    free = replace(problem, costs={name: replace(problem.costs[name], budget=np.inf)})
    front = NSGA2Searcher().front(free, seed)
    points = np.stack([free.spent(name, front), free.losses(front)], 1)
    points = points[np.lexsort((points[:, 1], points[:, 0]))]
    better = points[:, 1] < np.minimum.accumulate(np.concatenate([[np.inf], points[:-1, 1]]))
    return [[float(cost), float(loss)] for cost, loss in points[better]]
