"""Small changes of a choice: until it keeps the budgets, and until none of them gains."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmbrecq.errors import BudgetError
from mmbrecq.mixed_precision.search.problem import BitProblem, Choices, Table


def make_feasible(problem: BitProblem, choice: Choices) -> Choices:
    """Changes a layer at a time until every budget is kept, each time the one that loses least for what it saves.

    Raises:
        BudgetError: Each budget can be kept, but this search finds no choice that keeps all of them.
    """
    choice = choice.copy()
    for _ in range(len(problem.layers) * len(problem.candidates)):
        excess = _excess(problem, choice[None])[0]
        if excess <= 0:
            return choice
        changes = single_changes(problem, choice)
        saved = excess - _excess(problem, changes)
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
    """Every choice that differs in one layer and those tied to it, ``(changes, layers)``."""
    layers, options = _moves(problem, choice)
    return _changed(problem, np.repeat(choice[None], len(layers), 0), layers, options)


def _double_changes(problem: BitProblem, choice: Choices) -> Choices:
    """Every choice that differs in two layers."""
    layers, options = _moves(problem, choice)
    first, second = np.triu_indices(len(layers), 1)
    apart = layers[first] != layers[second]
    first, second = first[apart], second[apart]
    changed = _changed(problem, np.repeat(choice[None], len(first), 0), layers[first], options[first])
    return _changed(problem, changed, layers[second], options[second])


def _changed(problem: BitProblem, choices: Choices, layers: Choices, options: Choices) -> Choices:
    """Each of the choices with one layer changed; those that are tied to it follow."""
    choices[np.arange(len(choices)), layers] = options
    for index, tie in enumerate(problem.ties):
        for place, layer in enumerate(tie):
            rows = np.flatnonzero(layers == layer)
            choices[rows] = problem.follow(choices[rows], {index: np.full(len(rows), place)})
    return choices


def _moves(problem: BitProblem, choice: Choices) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Layer and new candidate of every change of one layer."""
    moves = [(i, o) for i, options in enumerate(problem.options) for o in options if o != choice[i]]
    layers, options = np.array(moves, np.int64).reshape(-1, 2).T
    return layers, options


def _excess(problem: BitProblem, choices: Choices) -> Table:
    """By how much choices break the budgets: the sum of the excesses, each over its budget; 0 where all are kept."""
    total = np.zeros(choices.shape[:-1])
    for name, cost in problem.costs.items():
        if np.isfinite(cost.budget):
            over = problem.spent(name, choices) - cost.budget * (1 + 1e-12)
            total += np.maximum(over, 0) / max(cost.budget, 1e-300)
    return total
