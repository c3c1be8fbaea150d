"""The genetic search of the paper (Li et al., ICLR 2021, algorithm 2), and the local search that refines choices."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mmbrecq.building import check_integer, check_number
from mmbrecq.errors import BudgetError
from mmbrecq.mixed_precision.search.problem import BitProblem, Choices
from mmbrecq.registry import SEARCHERS


@SEARCHERS.register_module()
@dataclass(frozen=True)
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

    population: int = 50
    iterations: int = 100
    mutation: float = 0.1
    parents: int = 10
    resampling: int = 20
    refine: bool = True

    def __post_init__(self) -> None:
        for name, least in (('population', 1), ('iterations', 1), ('parents', 1), ('resampling', 0)):
            check_integer(getattr(self, name), least, f'{name} of a search')
        check_number(self.mutation, '(0, 1]', 'mutation of a search')

    def search(self, problem: BitProblem, seed: int = 0) -> Choices:
        """Returns the best choice found, ``(layers,)``, the same for the same seed; BudgetError if there is none."""
        problem.check_budgets()
        draw = _Draws(problem, np.random.default_rng(seed))
        members = self._feasible(problem, self.population, draw.anew)
        half = self.population // 2
        if self.refine:
            members[0] = make_feasible(problem, problem.least(problem.loss))
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
        """Returns choices that keep the budgets: drawn by ``make``, drawn again where they do not, at last mended."""
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
    """Draws choices of a problem from one generator."""

    def __init__(self, problem: BitProblem, generator: np.random.Generator) -> None:
        self._problem, self._options, self._generator = problem, problem.options, generator

    def anew(self, count: int) -> Choices:
        """Draws every layer at random."""
        return self._tied(self._draw(count))

    def crossed(self, parents: Choices, count: int) -> Choices:
        """Takes each layer from one of two parents."""
        mothers, fathers = self._generator.integers(len(parents), size=(2, count))
        from_mother = self._generator.random((count, parents.shape[1])) < 0.5
        return self._tied(np.where(from_mother, parents[mothers], parents[fathers]))

    def mutated(self, parents: Choices, probability: float, count: int) -> Choices:
        """Draws each layer of one parent anew with ``probability``."""
        chosen = parents[self._generator.integers(len(parents), size=count)]
        drawn = self._generator.random(chosen.shape) < probability
        return self._tied(np.where(drawn, self._draw(count), chosen))

    def _draw(self, count: int) -> Choices:
        return np.stack([self._generator.choice(options, count) for options in self._options], 1)

    def _tied(self, choices: Choices) -> Choices:
        """Lets layers that read the same values follow a random one of them."""
        ties = self._problem.ties
        leaders = {index: self._generator.integers(len(tie), size=len(choices)) for index, tie in enumerate(ties)}
        return self._problem.follow(choices, leaders)


def _best(problem: BitProblem, choices: Choices, count: int) -> Choices:
    """Returns the ``count`` choices of least loss, each once."""
    distinct = np.unique(choices, axis=0)
    return np.asarray(distinct[np.argsort(problem.losses(distinct), kind='stable')[:count]])


def make_feasible(problem: BitProblem, choice: Choices) -> Choices:
    """Changes a layer at a time until every budget is kept, each time the one that loses least for its saving.

    BudgetError is raised where this finds no choice that keeps all budgets.
    """
    choice = choice.copy()
    for _ in range(len(problem.layers) * len(problem.candidates)):
        excess = problem.excess(choice)
        if excess <= 0:
            return choice
        changes = single_changes(problem, choice)
        saved = excess - problem.excess(changes)
        lost = problem.losses(changes) - problem.losses(choice)
        helpful = np.flatnonzero(saved > 0)
        if not len(helpful):
            break
        # what loses nothing comes first, the largest saving of it
        price = np.where(lost > 0, lost / np.where(saved > 0, saved, 1), lost - saved)
        choice = changes[helpful[np.argmin(price[helpful])]]
    if problem.feasible(choice):
        return choice
    budgets = ', '.join(f'{name} {cost.budget:.6g} {cost.unit}'.rstrip() for name, cost in problem.costs.items())
    raise BudgetError(f'expected budgets that can be kept together, but found no choice that keeps all of {budgets}')


def descend(problem: BitProblem, choice: Choices) -> Choices:
    """Changes one layer, or two at once, as long as that lowers the loss within the budgets."""
    while True:
        loss = float(problem.losses(choice))
        for changes in (single_changes(problem, choice), _double_changes(problem, choice)):
            kept = changes[problem.feasible(changes)]
            if len(kept):
                losses = problem.losses(kept)
                if losses.min() < loss - 1e-12 * abs(loss):
                    choice = kept[np.argmin(losses)]
                    break
        else:
            return choice


def single_changes(problem: BitProblem, choice: Choices) -> Choices:
    """Returns every choice that differs in one layer and those tied to it, ``(changes, layers)``."""
    layers, options = _moves(problem, choice)
    return _changed(problem, np.repeat(choice[None], len(layers), 0), layers, options)


def _double_changes(problem: BitProblem, choice: Choices) -> Choices:
    """Returns every choice that differs in two layers."""
    layers, options = _moves(problem, choice)
    first, second = np.triu_indices(len(layers), 1)
    apart = layers[first] != layers[second]
    changed, second = single_changes(problem, choice)[first[apart]], second[apart]
    return _changed(problem, changed, layers[second], options[second])


def _changed(problem: BitProblem, choices: Choices, layers: Choices, options: Choices) -> Choices:
    """Changes one layer of each of the choices; those that are tied to it follow."""
    choices[np.arange(len(choices)), layers] = options
    for index, tie in enumerate(problem.ties):
        for member, layer in enumerate(tie):
            rows = np.flatnonzero(layers == layer)
            choices[rows] = problem.follow(choices[rows], {index: np.full(len(rows), member)})
    return choices


def _moves(problem: BitProblem, choice: Choices) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns layer and new candidate of every change of one layer."""
    moves = [(i, o) for i, options in enumerate(problem.options) for o in options if o != choice[i]]
    layers, options = np.array(moves, np.int64).reshape(-1, 2).T
    return layers, options
