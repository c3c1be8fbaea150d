"""From measured sensitivities and cost models to a problem, and from its solution to bits of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mmbrecq.errors import ConfigError
from mmbrecq.mixed_precision.costs import BaseCostModel, ModelSize
from mmbrecq.mixed_precision.search.options import parse_budget
from mmbrecq.mixed_precision.search.problem import BitProblem, Choices, Cost, Table
from mmbrecq.mixed_precision.search.result import SearchResult
from mmbrecq.mixed_precision.sensitivity.table import SensitivityTable


def build_problem(
    table: SensitivityTable, models: Sequence[BaseCostModel], budgets: Mapping[str, str | float]
) -> BitProblem:
    """The problem of the searched layers.

    A layer whose input is not searched reads activations of the bits that it was prepared with. What is not searched
    keeps its bits, and its cost is spent whatever is chosen.

    Args:
        table: Complete, see :meth:`SensitivityTable.check_complete`.
        models: Cost models of different names.
        budgets: See :func:`~mmbrecq.mixed_precision.search.options.parse_budget`.

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
    choices = table.choices
    weight_bits = np.array([weight for weight, _ in choices], float)
    pairs = {}
    for (first, second), row in table.pairs.items():
        extra = np.zeros((len(choices), len(choices)))
        for bits, value in row.items():
            extra[np.ix_(weight_bits == bits, weight_bits == bits)] = value
        pairs[index[first], index[second]] = extra
    read = {layer for group in table.values.values() for layer in group.layers}
    first_input = [activation == choices[0][1] for _, activation in choices]
    # to a layer whose input is not searched, all of these are one
    allowed = np.array([[True] * len(choices) if name in read else first_input for name in table.searched])
    ties = [[index[layer] for layer in group.layers] for group in table.values.values()]
    return BitProblem(table.searched, choices, table.losses(), pairs, costs, allowed, ties)


def check_budgets(table: SensitivityTable, models: Sequence[BaseCostModel], budgets: Mapping[str, str | float]) -> None:
    """Raises ConfigError or BudgetError where a budget is none, or below the least cost; no loss need be known yet."""
    zeros = {bits: 0.0 for bits in table.candidates}
    inputs = {bits: 0.0 for bits in table.activation_candidates}
    unmeasured = replace(
        table, pairs={}, loss=dict.fromkeys(table.searched, zeros), activation_loss=dict.fromkeys(table.values, inputs)
    )
    build_problem(unmeasured, models, budgets).check_budgets()


def float_cost(table: SensitivityTable, model: BaseCostModel) -> float:
    """What the float model costs."""
    rest = table.other_bytes if isinstance(model, ModelSize) else 0
    return rest + sum(model.cost(layer, (None, None)) for layer in table.layers)


def describe_choice(
    table: SensitivityTable, models: Sequence[BaseCostModel], problem: BitProblem, choice: Choices
) -> SearchResult:
    """The solution ``choice`` of ``problem`` in words."""
    chosen = {name: table.choices[index] for name, index in zip(table.searched, choice, strict=True)}
    read = {layer for group in table.values.values() for layer in group.layers}
    return SearchResult(
        kind=table.kind,
        bits={name: weight for name, (weight, _) in chosen.items()},
        activation_bits={name: bits for name, (_, bits) in chosen.items() if name in read and bits is not None},
        predicted=float(problem.losses(choice)),
        budgets={name: cost.budget for name, cost in problem.costs.items() if np.isfinite(cost.budget)},
        spent={model.name: float(problem.spent(model.name, choice)) for model in models},
        float_costs={model.name: float_cost(table, model) for model in models},
        units={model.name: model.unit for model in models},
    )


def _tables(table: SensitivityTable, model: BaseCostModel) -> tuple[Table, float]:
    """Costs of the searched layers, and the sum of the others."""
    rows, fixed = [], float(table.other_bytes if isinstance(model, ModelSize) else 0)
    read = {layer for group in table.values.values() for layer in group.layers}
    for layer in table.layers:
        if layer.name in table.searched:
            own = layer.name in read
            rows.append([model.cost(layer, (weight, bits if own else layer.bits[1])) for weight, bits in table.choices])
        else:
            fixed += model.cost(layer, layer.bits)
    return np.array(rows), fixed
