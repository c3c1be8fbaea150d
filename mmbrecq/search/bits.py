"""From measured sensitivities and cost models to a problem, and from its solution to bits of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmbrecq.costs import BaseCostModel, ModelSize
from mmbrecq.errors import ConfigError
from mmbrecq.search.options import parse_budget
from mmbrecq.search.problem import BitProblem, Choices, Cost, Table
from mmbrecq.sensitivity.table import SensitivityTable


@dataclass(frozen=True)
class ChosenBits:
    """What a search has chosen.

    Args:
        bits: Of the weight of every searched layer.
        loss: Predicted rise of the loss.
        spent: Cost by name, with what does not depend on the choice.
        float_costs: What the float model costs.
    """

    bits: dict[str, int]
    loss: float
    spent: dict[str, float]
    float_costs: dict[str, float]


def build_problem(
    table: SensitivityTable, models: Sequence[BaseCostModel], budgets: Mapping[str, str | float]
) -> BitProblem:
    """The problem of the searched layers.

    A layer reads activations of the bits that it was prepared with. What is not searched keeps its bits, and its cost
    is spent whatever is chosen.

    Args:
        table: Complete, see :meth:`SensitivityTable.check_complete`.
        models: Cost models of different names.
        budgets: See :func:`~mmbrecq.search.options.parse_budget`.

    Raises:
        ConfigError: A budget is no budget, or names a cost that no model has.
    """
    names = [model.name for model in models]
    for name in budgets:
        if name not in names:
            raise ConfigError(f'expected budgets of the costs {", ".join(names)}, but got one of {name!r}')
    if len(set(names)) < len(names):
        raise ConfigError(f'expected cost models of different names, but got {", ".join(names)}')
    costs = {}
    for model in models:
        model.prepare(table.layers)
        cost_table, fixed = _tables(table, model)
        limit = np.inf
        if model.name in budgets:
            limit = parse_budget(budgets[model.name], float_cost(table, model), model.name)
        costs[model.name] = Cost(cost_table, limit, fixed, model.unit)
    index = {name: i for i, name in enumerate(table.searched)}
    pairs = {}
    for (first, second), row in table.pairs.items():
        extra = np.zeros((len(table.candidates), len(table.candidates)))
        for bits, value in row.items():
            extra[table.candidates.index(bits), table.candidates.index(bits)] = value
        pairs[index[first], index[second]] = extra
    return BitProblem(table.searched, [(bits, None) for bits in table.candidates], table.losses(), pairs, costs)


def float_cost(table: SensitivityTable, model: BaseCostModel) -> float:
    """What the float model costs."""
    rest = table.other_bytes if isinstance(model, ModelSize) else 0
    return rest + sum(model.cost(layer, (None, None)) for layer in table.layers)


def chosen_bits(
    table: SensitivityTable, models: Sequence[BaseCostModel], problem: BitProblem, choice: Choices
) -> ChosenBits:
    """The solution ``choice`` of ``problem`` in words."""
    bits = {name: table.candidates[index] for name, index in zip(table.searched, choice, strict=True)}
    spent = {model.name: float(problem.spent(model.name, choice)) for model in models}
    return ChosenBits(bits, float(problem.losses(choice)), spent, {m.name: float_cost(table, m) for m in models})


def _tables(table: SensitivityTable, model: BaseCostModel) -> tuple[Table, float]:
    """Costs of the searched layers, and the sum of the others."""
    rows, fixed = [], float(table.other_bytes if isinstance(model, ModelSize) else 0)
    searched = set(table.searched)
    for layer in table.layers:
        if layer.name in searched:
            rows.append([model.cost(layer, (bits, layer.bits[1])) for bits in table.candidates])
        else:
            fixed += model.cost(layer, layer.bits)
    return np.array(rows), fixed
