"""The front of loss against cost by NSGA-II."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmbrecq.building import check_integer, check_number
from mmbrecq.dependencies import require
from mmbrecq.errors import BudgetError
from mmbrecq.mixed_precision.search.genetic import descend
from mmbrecq.mixed_precision.search.problem import BitProblem, Choices
from mmbrecq.registry import SEARCHERS

POINTS = 40
"""Most points of the front that are refined, evenly over its length."""


@SEARCHERS.register_module()
@dataclass(frozen=True)
class NSGA2Searcher:
    """NSGA-II (Deb et al., 2002) of pymoo, over the loss and every cost at once.

    Args:
        population: Choices per generation.
        iterations: Generations.
        mutation: Probability that a layer of a child is drawn anew.
    """

    population: int = 100
    iterations: int = 200
    mutation: float = 0.1

    def __post_init__(self) -> None:
        check_integer(self.population, 2, 'population of a search')
        check_integer(self.iterations, 2, 'iterations of a search')
        check_number(self.mutation, '(0, 1]', 'mutation of a search')
        require('pymoo')

    def search(self, problem: BitProblem, seed: int = 0) -> Choices:
        """Returns the choice of the front that loses least, ``(layers,)``; see :meth:`front`."""
        return np.asarray(self.front(problem, seed)[0])

    def front(self, problem: BitProblem, seed: int = 0) -> Choices:
        """Returns choices of which none is better in loss and all costs than another, ``(choices, layers)``, by loss.

        BudgetError is raised if no choice keeps the budgets.
        """
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.mutation import Mutation
        from pymoo.core.problem import Problem
        from pymoo.operators.crossover.ux import UniformCrossover
        from pymoo.optimize import minimize

        problem.check_budgets()
        generator, probability = np.random.default_rng(seed), self.mutation
        sizes = np.array([len(options) for options in problem.options])

        class Tables(Problem):  # type: ignore[misc]
            def _evaluate(self, x: Any, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
                choices = _decode(problem, x)
                spent = [problem.spent(name, choices) for name in problem.costs]
                out['F'] = np.column_stack([problem.losses(choices), *spent])
                out['G'] = problem.excess(choices)[:, None]

        class DrawAnew(Mutation):  # type: ignore[misc]
            def _do(self, _: Any, genes: Any, **kwargs: Any) -> Any:
                drawn = generator.random(genes.shape) < probability
                return np.where(drawn, generator.integers(0, sizes, genes.shape), genes)

        start = generator.integers(0, sizes, (self.population, len(sizes)))
        # the ends of the front are hard to find from the middle
        start[:2] = np.stack([np.zeros_like(sizes), sizes - 1])
        algorithm = NSGA2(self.population, sampling=start, crossover=UniformCrossover(), mutation=DrawAnew())
        counts = {'n_var': len(sizes), 'n_obj': 1 + len(problem.costs), 'n_ieq_constr': 1}
        tables = Tables(**counts, xl=np.zeros(len(sizes)), xu=sizes - 1)
        result = minimize(tables, algorithm, ('n_gen', self.iterations), seed=seed)
        if result.X is None:
            raise BudgetError('expected budgets that can be kept together, but found no choice that keeps all of them')
        found = np.unique(_decode(problem, np.atleast_2d(result.X)), axis=0)
        return np.asarray(found[np.argsort(problem.losses(found), kind='stable')])


def _decode(problem: BitProblem, genes: Any) -> Choices:
    """Turns positions in the lists of what each layer may have into choices, ``(..., layers)``."""
    columns = [options[genes[..., i].astype(int)] for i, options in enumerate(problem.options)]
    choices = np.stack(columns, -1)
    # layers that read the same values follow the first of them
    return problem.follow(choices, {index: np.zeros(choices.shape[:-1], int) for index in range(len(problem.ties))})


def find_front(problem: BitProblem, name: str, seed: int = 0) -> list[list[float]]:
    """Returns cost ``name`` and loss of choices of which none is better in both than another, the cheapest first.

    Budgets play no part. The choices of NSGA-II are changed, point by point, in one layer or two as long as that gains
    within their cost. DependencyError is raised without pymoo.
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
    """Returns the choices that lose less than all cheaper ones, the cheapest first."""
    costs, losses = problem.spent(name, choices), problem.losses(choices)
    order = np.lexsort((losses, costs))
    before = np.minimum.accumulate(np.concatenate([[np.inf], losses[order][:-1]]))
    return np.asarray(choices[order[losses[order] < before]])
