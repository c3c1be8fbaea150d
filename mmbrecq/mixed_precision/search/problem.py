"""The choice of bits as a problem of tables: the loss and the costs of every candidate of every layer.

    min_c  L(c)   subject to   H_k(c) <= budget_k

``L(c) = sum_i loss[i, c_i] + sum_(i, j) pair[i, j][c_i, c_j]`` (Li et al., ICLR 2021, section 3.4): the loss of each
layer alone, and the loss of two layers of one block together beyond that. Costs are sums over layers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mmbrecq.errors import BudgetError

Choices = NDArray[np.int64]
"""Index of the chosen candidate of every layer, ``(..., layers)``."""
Table = NDArray[np.float64]


@dataclass(frozen=True)
class Cost:
    """Costs ``(layers, candidates)``, finite, >= 0; the most that may be spent; the part of it that is always spent."""

    table: Table
    budget: float = math.inf
    fixed: float = 0.0
    unit: str = ''


@dataclass(frozen=True)
class BitProblem:
    """Tables over layers and candidates.

    Args:
        layers: Names.
        candidates: What each layer may have, the same number for all, such as ``((2, 8), (4, 8), (8, 8))``.
        loss: ``(layers, candidates)``, the rise of the loss with that layer alone at that candidate.
        pairs: For two layers, by index and in this order, ``(candidates, candidates)``: the rise of the loss with both,
            beyond the sum of the two.
        costs: By name.
        allowed: ``(layers, candidates)`` of bool, what may be chosen; None for everything.
        ties: Groups of layers, by index, that read the same values: the second number of their candidates is the same.
            The candidates are then all pairs of some first and some second numbers, and these layers may have all.
    """

    layers: Sequence[str]
    candidates: Sequence[tuple[int | None, int | None]]
    loss: Table
    pairs: Mapping[tuple[int, int], Table] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)
    allowed: NDArray[np.bool_] | None = None
    ties: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.candidates))
        tables = [self.loss, *(cost.table for cost in self.costs.values())]
        assert all(table.shape == shape and np.isfinite(table).all() for table in tables)
        assert all(i < j and table.shape == (shape[1], shape[1]) for (i, j), table in self.pairs.items())
        assert self.allowed is None or self.allowed.any(1).all()

    @property
    def options(self) -> list[NDArray[np.int64]]:
        """Candidates that each layer may have, as indices."""
        everything = np.ones((len(self.layers), len(self.candidates)), bool)
        return [np.flatnonzero(row) for row in (everything if self.allowed is None else self.allowed)]

    def losses(self, choices: Choices) -> Table:
        """Returns the predicted loss of ``(..., layers)`` choices, ``(...)``."""
        total = np.asarray(self.loss[np.arange(len(self.layers)), choices].sum(-1))
        for (i, j), table in self.pairs.items():
            total = total + table[choices[..., i], choices[..., j]]
        return np.asarray(total)

    def spent(self, name: str, choices: Choices) -> Table:
        """Returns the cost ``name`` of choices, ``(...)``."""
        cost = self.costs[name]
        return np.asarray(cost.table[np.arange(len(self.layers)), choices].sum(-1) + cost.fixed)

    def feasible(self, choices: Choices) -> NDArray[np.bool_]:
        """Returns whether choices keep every budget, ``(...)``."""
        return np.asarray(self.excess(choices) == 0)

    def excess(self, choices: Choices) -> Table:
        """Returns by how much choices exceed the budgets: the sum of the excesses, each over its budget, ``(...)``."""
        total = np.zeros(choices.shape[:-1])
        for name, cost in self.costs.items():
            if np.isfinite(cost.budget):
                over = self.spent(name, choices) - cost.budget * (1 + 1e-12)
                total += np.maximum(over, 0) / max(cost.budget, 1e-300)
        return total

    def follow(self, choices: Choices, leaders: Mapping[int, Choices]) -> Choices:
        """Returns choices in which the layers of every tie have the second number of one of them, ``(..., layers)``.

        ``leaders`` has, by the index of a tie, the index within it of the layer that the others follow, ``(...)``.
        """
        choices = choices.copy()
        for index, members in leaders.items():
            tie = np.asarray(self.ties[index])
            leader = np.take_along_axis(choices[..., tie], np.asarray(members)[..., None], -1)
            choices[..., tie] = self._joined[choices[..., tie], leader]
        return choices

    @cached_property
    def _joined(self) -> Choices:
        """``(candidates, candidates)``: the candidate with the first number of one and the second of another."""
        index = {candidate: i for i, candidate in enumerate(self.candidates)}
        return np.array([[index[first[0], second[1]] for second in self.candidates] for first in self.candidates])

    def least(self, table: Table) -> Choices:
        """Returns the choice with the least sum over a table, such as the loss or a cost, ``(layers,)``."""
        chosen = np.array([options[np.argmin(table[i, options])] for i, options in enumerate(self.options)])
        seconds = [second for _, second in self.candidates]
        for tie in self.ties:
            alternatives = []
            for second in dict.fromkeys(seconds):
                same = np.flatnonzero([value == second for value in seconds])
                own = same[np.argmin(table[list(tie)][:, same], 1)]
                alternatives.append((float(table[list(tie), own].sum()), own))
            chosen[list(tie)] = min(alternatives, key=lambda alternative: alternative[0])[1]
        return chosen

    def check_budgets(self) -> None:
        """Raises BudgetError where a budget lies below the least cost, and says what that is."""
        for name, cost in self.costs.items():
            least = float(self.spent(name, self.least(cost.table)))
            if least > cost.budget * (1 + 1e-12):
                unit = f' {cost.unit}' if cost.unit else ''
                raise BudgetError(
                    f'expected a budget of {name} that can be kept, but got {cost.budget:.6g}{unit}: the least cost of '
                    f'these layers and candidates is {least:.6g}{unit}'
                )
