"""The genetic search of the paper (Li et al., ICLR 2021, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from mmbrecq.errors import ConfigError
from mmbrecq.mixed_precision.search.local import descend, make_feasible
from mmbrecq.mixed_precision.search.problem import BitProblem, Choices
from mmbrecq.registry import SEARCHERS


@SEARCHERS.register_module()
class GeneticSearcher:
    """Half of each generation from crossing two of the best, half from mutating one of them.

    A child that breaks a budget is drawn again, up to ``resampling`` times, and then made cheaper where that loses
    least.
    One child of each generation is then changed in one layer or two as long as that gains, and the first generation has
    the choice that mending makes of the one that loses least. Neither is the paper's; without them tight budgets of
    large networks end some percent from the optimum.

    Args:
        population: Choices per generation.
        iterations: Generations.
        mutation: Probability that a gene of a mutant is drawn anew.
        parents: How many of the best may have children.
        resampling: Draws of a child before it is mended.
        refine: Whether this is done.
    """

    def __init__(
        self,
        population: int = 50,
        iterations: int = 100,
        mutation: float = 0.1,
        parents: int = 10,
        resampling: int = 20,
        refine: bool = True,
    ) -> None:
        for name, value in (('population', population), ('iterations', iterations), ('parents', parents)):
            if type(value) is not int or value < 1:
                raise ConfigError(f'expected {name} of a search to be an integer >= 1, but got {value!r}')
        if type(resampling) is not int or resampling < 0:
            raise ConfigError(f'expected resampling of a search to be an integer >= 0, but got {resampling!r}')
        if not 0 < mutation <= 1:
            raise ConfigError(f'expected mutation of a search to be in (0, 1], but got {mutation!r}')
        self.population, self.iterations, self.mutation = population, iterations, mutation
        self.parents, self.resampling, self.refine = parents, resampling, refine

    def search(self, problem: BitProblem, seed: int = 0) -> Choices:
        """The best choice found, ``(layers,)``; the same for the same seed.

        Raises:
            BudgetError: No choice keeps the budgets.
        """
        problem.check_budgets()
        draw = _Draws(problem, np.random.default_rng(seed))
        members = self._feasible(problem, self.population, draw.anew)
        half = self.population // 2
        if self.refine:
            members[0] = make_feasible(problem, problem.lossless)
        best = _best(problem, members, self.parents)
        for index in range(self.iterations):
            crossed = self._feasible(problem, half, partial(draw.crossed, best))
            mutated = self._feasible(problem, self.population - half, partial(draw.mutated, best, self.mutation))
            children = np.concatenate([crossed, mutated])
            if self.refine:
                # of another one each time, so that the parents do not become one family
                children[index % len(children)] = descend(problem, children[index % len(children)])
            best = _best(problem, np.concatenate([best, children]), self.parents)
        return np.asarray(_best(problem, best, 1)[0])

    def _feasible(self, problem: BitProblem, count: int, make: Callable[[int], Choices]) -> Choices:
        """Choices that keep the budgets: drawn by ``make``, drawn again where they do not, and at last mended."""
        members = make(count)
        for _ in range(self.resampling):
            broken = np.flatnonzero(~problem.feasible(members))
            if not len(broken):
                return members
            members[broken] = make(len(broken))
        for index in np.flatnonzero(~problem.feasible(members)):
            members[index] = make_feasible(problem, members[index])
        return members


class _Draws:
    """Random choices.

    Args:
        problem: Its candidates.
        generator: Source of all draws.
    """

    def __init__(self, problem: BitProblem, generator: np.random.Generator) -> None:
        self._problem, self._options, self._generator = problem, problem.options, generator

    def anew(self, count: int) -> Choices:
        """Every layer at random."""
        return self._tied(self._draw(count))

    def crossed(self, parents: Choices, count: int) -> Choices:
        """Each layer from one of two parents."""
        mothers, fathers = self._generator.integers(len(parents), size=(2, count))
        from_mother = self._generator.random((count, parents.shape[1])) < 0.5
        return self._tied(np.where(from_mother, parents[mothers], parents[fathers]))

    def mutated(self, parents: Choices, probability: float, count: int) -> Choices:
        """One parent, each of its layers drawn anew with ``probability``."""
        chosen = parents[self._generator.integers(len(parents), size=count)]
        drawn = self._generator.random(chosen.shape) < probability
        return self._tied(np.where(drawn, self._draw(count), chosen))

    def _draw(self, count: int) -> Choices:
        return np.stack([self._generator.choice(options, count) for options in self._options], 1)

    def _tied(self, choices: Choices) -> Choices:
        """Layers that read the same values follow a random one of them."""
        ties = self._problem.ties
        leaders = {index: self._generator.integers(len(tie), size=len(choices)) for index, tie in enumerate(ties)}
        return self._problem.follow(choices, leaders)


def _best(problem: BitProblem, choices: Choices, count: int) -> Choices:
    """The ``count`` choices of least loss, each once."""
    distinct = np.unique(choices, axis=0)
    return np.asarray(distinct[np.argsort(problem.losses(distinct), kind='stable')[:count]])
