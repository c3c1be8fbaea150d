"""The exact solution by integer programming."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mmbrecq.building import check_number
from mmbrecq.dependencies import require
from mmbrecq.errors import BudgetError
from mmbrecq.mixed_precision.search.problem import BitProblem, Choices
from mmbrecq.registry import SEARCHERS

Product = tuple[int, int, float]

INFEASIBLE = 2
"""What SciPy's ``milp`` gives as status where no solution exists."""


@SEARCHERS.register_module()
class IntegerProgram:
    """Solves the problem exactly, by SciPy's HiGHS: a binary variable for each layer and candidate.

    A pair adds a variable ``y`` for each two candidates that lose something together, with ``y <= x_i``, ``y <= x_j``
    and ``y >= x_i + x_j - 1``, so that it is their product.

    Args:
        time_limit: Seconds; a solution found until then is refused unless it is proven to be the best.
    """

    def __init__(self, time_limit: float = 60.0) -> None:
        check_number(time_limit, '(0, inf]', 'time_limit of a search')
        require('scipy')
        self.time_limit = time_limit

    def search(self, problem: BitProblem, seed: int = 0) -> Choices:
        """Returns the best choice, ``(layers,)``; ``seed`` plays no part.

        BudgetError is raised if no choice keeps the budgets, or none was proven to be the best in time.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        problem.check_budgets()
        products = _products(problem)
        singles, size = problem.loss.size, problem.loss.size + len(products)
        objective = np.concatenate([problem.loss.ravel(), [value for *_, value in products]])
        upper = np.array([np.isin(range(len(problem.candidates)), options) for options in problem.options], float)
        result = milp(
            objective / max(np.abs(objective).max(), 1e-300),
            integrality=np.arange(size) < singles,
            bounds=Bounds(0, np.concatenate([upper.ravel(), np.ones(len(products))])),
            constraints=[LinearConstraint(csr_array(rows), *ends) for rows, *ends in _constraints(problem, products)],
            options={'time_limit': self.time_limit, 'mip_rel_gap': 1e-9},
        )
        if result.status == INFEASIBLE:
            raise BudgetError('expected budgets that can be kept together, but no choice of bits keeps all of them')
        if result.status != 0 or result.x is None:
            raise BudgetError(f'expected a proven best choice of bits, but the solver says: {result.message}')
        return np.asarray(result.x[:singles].reshape(problem.loss.shape).argmax(1), np.int64)


def _products(problem: BitProblem) -> list[Product]:
    """Columns of both factors and the loss of every product of two choices that loses something."""
    count = len(problem.candidates)
    return [
        (i * count + int(a), j * count + int(b), float(table[a, b]))
        for (i, j), table in problem.pairs.items()
        for a, b in np.argwhere(table != 0)
    ]


def _constraints(problem: BitProblem, products: list[Product]) -> Iterator[tuple[NDArray[np.float64], float, float]]:
    """Yields rows of factors of all variables, ``(rows, variables)``, with their bounds."""
    (layers, count), size = problem.loss.shape, problem.loss.size + len(products)
    choices, every = np.eye(size)[: layers * count].reshape(layers, count, size), np.eye(size)
    yield choices.sum(1), 1, 1
    for cost in problem.costs.values():
        if np.isfinite(cost.budget):
            # in units of the budget, so that the solver's absolute tolerance means the same everywhere
            yield np.tensordot(cost.table / max(cost.budget - cost.fixed, 1e-300), choices)[None], -np.inf, 1
    for tie in problem.ties:
        for second in dict.fromkeys(second for _, second in problem.candidates):
            same = [c for c, candidate in enumerate(problem.candidates) if candidate[1] == second]
            for i, j in pairwise(tie):
                yield (choices[i, same] - choices[j, same]).sum(0)[None], 0, 0
    for column, (a, b, _) in enumerate(products, start=layers * count):
        yield every[column] - every[[a, b]], -np.inf, 0
        yield (every[a] + every[b] - every[column])[None], -np.inf, 1
