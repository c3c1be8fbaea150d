"""Budgets and options of a search, the problem made of measured sensitivities and costs, and the chosen bits."""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmbrecq.building import check_integer, expect
from mmbrecq.errors import BudgetError, ConfigError
from mmbrecq.mixed_precision.costs.models import BaseCostModel, ModelSize
from mmbrecq.mixed_precision.search.problem import BitProblem, Choices, Cost
from mmbrecq.mixed_precision.sensitivity.table import SensitivityTable
from mmbrecq.qtype import MAX_BITS, MIN_BITS
from mmbrecq.quantizers.options import FLOAT
from mmbrecq.runs.storage import write_text_atomic
from mmbrecq.schema import save_json

DROP = 'drop'
"""Name of the budget of the drop; all other budgets are of costs."""
PRECISION = 0.005
"""A choice is the cheapest where none that costs less by this share is predicted to be as good."""


@dataclass
class Trial:
    """One choice of bits that was evaluated: its cost, its loss by the tables, and the measured drop in points."""

    spent: float
    predicted: float
    drop: float
    chosen: bool = False


def drop_budget(budgets: Mapping[str, str | float]) -> float | None:
    """Returns the points that may be lost, None where there is no such budget; ConfigError where it is none.

    Example:
        >>> drop_budget({'size': '0.1x', 'drop': '1.5'})
        1.5
    """
    if DROP not in budgets:
        return None
    try:
        points = float(str(budgets[DROP]))
    except ValueError:
        points = -1.0
    expect(0 <= points < math.inf, 'the budget of drop to be points of the metric, >= 0', budgets[DROP])
    return points


def cost_to_lower(names: Iterable[str], budgets: Mapping[str, str | float]) -> str:
    """Returns the cost that is made least: the first without a budget of its own, or else the first."""
    return min(names, key=lambda name: name in budgets)


def find_cheapest(
    problem: BitProblem,
    cost: str,
    search: Callable[[BitProblem], Choices],
    measure: Callable[[Choices], float],
    points: float,
) -> tuple[Choices, list[Trial]]:
    """Finds the cheapest choice of bits whose measured drop stays within a budget.

    Of all choices that cost no more than some amount, the tables predict which one loses least, and an evaluation says
    whether that one keeps the budget. The least amount at which it does is found by bisection.

    ``search`` returns the choice within the budgets of a problem that is predicted to lose least, ``measure`` the drop
    of a choice in points. Returned are the choice, ``(layers,)``, and all that were evaluated, in this order. If the
    most accurate choice, by the tables, drops by more than ``points``, BudgetError names its drop.
    """
    trials: dict[bytes, Trial] = {}
    own = problem.costs[cost]

    def attempt(limit: float) -> tuple[Choices, float]:
        budget = replace(own, budget=min(limit, own.budget))
        choice = search(replace(problem, costs={**problem.costs, cost: budget}))
        key = choice.tobytes()
        if key not in trials:
            trials[key] = Trial(float(problem.spent(cost, choice)), float(problem.losses(choice)), measure(choice))
        return choice, trials[key].drop

    best, drop = attempt(math.inf)
    # what is not a number keeps no budget
    if not drop <= points:
        raise BudgetError(
            f'expected a budget of drop that can be kept, but got {points:.4g} points: the choice of these layers and '
            f'candidates that is predicted to lose least drops by {drop:.4g} on the held-out images'
        )
    others = any(math.isfinite(problem.costs[name].budget) for name in problem.costs if name != cost)
    low = limit = float(problem.spent(cost, problem.least(own.table)))
    high = float(problem.spent(cost, best))
    while limit < high:
        try:
            choice, drop = attempt(limit)
        except BudgetError:
            # the other budgets may leave no choice that is so cheap
            if not others:
                raise
            drop = math.inf
        if drop <= points:
            best, high = choice, float(problem.spent(cost, choice))
        else:
            low = limit
        limit = math.sqrt(max(low, high / 64) * high) if high - low > PRECISION * high else high
    trials[best.tobytes()].chosen = True
    return best, list(trials.values())


LOSSES = ('outputs', 'fisher')
RESULT = 'search.json'
"""File beside a written config that has what was chosen, and why."""
_BUDGET = re.compile(r'([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?\s*([A-Za-z]*)', re.IGNORECASE)
_FACTORS = {
    '': 1.0, 'b': 1.0, 'bytes': 1.0, 'kb': 1e3, 'mb': 1e6, 'gb': 1e9, 'ms': 1.0, 's': 1e3, 'k': 1e3, 'm': 1e6, 'g': 1e9,
}  # fmt: skip


@dataclass(frozen=True)
class SearchOptions:
    """Options of an analysis and of the search that follows it, as a config gives them.

    Args:
        candidates: Numbers of bits of weights, 2 to 8, and ``'float'``.
        activation_candidates: Numbers of bits of activations, 2 to 8; empty leaves them as the config has them.
        pairs: Whether two layers of a unit are measured together, at the fewest bits.
        images: How many of the calibration images the losses are measured on; None for all.
        loss: ``outputs``, how far the outputs are from the float ones, or ``fisher``, by how much the task loss of the
            annotated images rises, see :class:`~mmbrecq.mixed_precision.sensitivity.measure.OutputLoss`.
        costs: Configs of the cost models; one for every name that has a budget.
        searcher: Config of the searcher.
        budgets: ``{name of a cost: budget}``, see :func:`parse_budget`, and the points of accuracy that may be lost as
            ``drop``.
        held_out: Images of the calibration data, beyond those of the calibration, on which a drop is measured.
        result: Bits that have been chosen, as a file beside the config; then there is nothing to search.
        reuse: Whether ``tools/ptq.py`` takes the rounding that the analysis has learned for the chosen bits.
    """

    candidates: Sequence[int | str] = (2, 4, 8)
    activation_candidates: Sequence[int] = ()
    pairs: bool = True
    images: int | None = None
    loss: str = 'outputs'
    costs: Sequence[Mapping[str, Any]] = ({'type': 'ModelSize'}, {'type': 'BitOperations'})
    searcher: Mapping[str, Any] = field(default_factory=lambda: {'type': 'GeneticSearcher'})
    budgets: Mapping[str, str | float] = field(default_factory=dict)
    held_out: int = 512
    result: str = ''
    reuse: bool = True

    def __post_init__(self) -> None:
        numbers = [b for b in self.candidates if b != FLOAT]
        valid = bool(numbers) and len(self.candidates) > 1 and _are_bits(numbers) and self.candidates.count(FLOAT) < 2
        integers = f'different integers in {MIN_BITS}..{MAX_BITS}'
        what = f"search.candidates to be two or more {integers}, one of which may be '{FLOAT}'"
        expect(valid, what, self.candidates)
        inputs = self.activation_candidates
        expect(_are_bits(inputs), f'search.activation_candidates to be {integers}', inputs)
        if self.images is not None:
            check_integer(self.images, 1, 'search.images')
        expect(self.loss in LOSSES, f'search.loss to be one of {list(LOSSES)}', self.loss)
        expect(bool(self.costs), 'search.costs to be a list of cost models', self.costs)
        check_integer(self.held_out, 1, 'search.held_out')
        drop_budget(self.budgets)

    @property
    def bits(self) -> list[int]:
        """The candidates that are numbers, the fewest bits first."""
        return sorted(b for b in self.candidates if isinstance(b, int))


def _are_bits(values: Sequence[Any]) -> bool:
    """Returns whether all values are numbers of bits, each of them once."""
    return all(type(b) is int and MIN_BITS <= b <= MAX_BITS for b in values) and len({*values}) == len(values)


def parse_budget(text: str | float, float_cost: float, where: str) -> float:
    """Returns a budget in the unit of its cost.

    Args:
        text: A number, one with a unit (``'1.2MB'``, ``'3ms'``), or ``'0.1x'``: a share of the float model's cost.
        float_cost: Cost of the float model.
        where: Name of the cost, for the message.

    Raises:
        ConfigError: It is none of these, or not above 0.

    Example:
        >>> parse_budget('1.2MB', 44e6, 'size'), parse_budget('0.5x', 44e6, 'size')
        (1200000.0, 22000000.0)
    """
    found = _BUDGET.fullmatch(str(text).strip())
    factor = {**_FACTORS, 'x': float_cost}.get(found[3].lower()) if found else None
    value = 0.0 if found is None or factor is None else float(found[1] + (found[2] or '')) * factor
    example = 'such as 1.2MB, 3ms or 0.1x of the float model'
    expect(0 < value < math.inf, f'the budget of {where} to be a number above 0, {example}', text)
    return value


def parse_budgets(words: Sequence[str]) -> dict[str, str]:
    """Returns ``['size=0.1x']`` as a dict; ConfigError where a word is no ``NAME=AMOUNT``, or a name comes twice."""
    budgets: dict[str, str] = {}
    for word in words:
        name, equals, amount = word.partition('=')
        valid = bool(name and equals and amount) and name not in budgets
        expect(valid, '--budget as NAME=AMOUNT, each name once, such as size=0.1x', word)
        budgets[name] = amount
    return budgets


def build_problem(
    table: SensitivityTable, models: Sequence[BaseCostModel], budgets: Mapping[str, str | float]
) -> BitProblem:
    """Builds the problem of the searched layers of a complete table.

    A layer whose input is not searched reads activations of the bits that it was prepared with. What is not searched
    keeps its bits, and its cost is spent whatever is chosen. ConfigError is raised if a budget is none, see
    :func:`parse_budget`, or names neither a cost of one of the models nor the drop, or if two models have one name.
    """
    names = [model.name for model in models]
    budgets = {name: amount for name, amount in budgets.items() if name != DROP}
    for name in budgets:
        if name not in names:
            raise ConfigError(f'expected budgets of the costs {", ".join(names)}, but got one of {name!r}')
    if len(set(names)) < len(names):
        raise ConfigError(f'expected cost models of different names, but got {", ".join(names)}')
    costs = {model.name: _cost(table, model, budgets.get(model.name)) for model in models}
    index = {name: i for i, name in enumerate(table.searched)}
    choices = table.choices
    weight_bits = np.array([weight for weight, _ in choices], float)
    pairs = {}
    for (first, second), row in table.pairs.items():
        extra = np.zeros((len(choices), len(choices)))
        for bits, value in row.items():
            extra[np.ix_(weight_bits == bits, weight_bits == bits)] = value
        pairs[index[first], index[second]] = extra
    first_input = [activation == choices[0][1] for _, activation in choices]
    # to a layer whose input is not searched, all of these are one
    allowed = np.array([[True] * len(choices) if name in table.group_of else first_input for name in table.searched])
    ties = [[index[layer] for layer in group.layers] for group in table.values.values()]
    return BitProblem(table.searched, choices, table.losses(), pairs, costs, allowed, ties)


def check_budgets(table: SensitivityTable, models: Sequence[BaseCostModel], budgets: Mapping[str, str | float]) -> None:
    """Raises ConfigError or BudgetError where a budget is none, or below the least cost; no loss need be known yet."""
    zeros = dict.fromkeys([*table.candidates, *table.activation_candidates], 0.0)
    of_weights, of_values = dict.fromkeys(table.searched, zeros), dict.fromkeys(table.values, zeros)
    plain = replace(table, pairs={}, loss=of_weights, activation_loss=of_values)
    build_problem(plain, models, budgets).check_budgets()


def float_cost(table: SensitivityTable, model: BaseCostModel) -> float:
    """Returns the cost of the float model."""
    rest = table.other_bytes if isinstance(model, ModelSize) else 0
    return rest + sum(model.cost(layer, (None, None)) for layer in table.layers)


def _cost(table: SensitivityTable, model: BaseCostModel, budget: str | float | None) -> Cost:
    """Costs of the searched layers, the sum of the others, and the budget."""
    model.prepare(table.layers)
    rows, fixed = [], float(table.other_bytes if isinstance(model, ModelSize) else 0)
    for layer in table.layers:
        if layer.name in table.searched:
            own = layer.name in table.group_of
            rows.append([model.cost(layer, (weight, bits if own else layer.bits[1])) for weight, bits in table.choices])
        else:
            fixed += model.cost(layer, layer.bits)
    limit = np.inf if budget is None else parse_budget(budget, float_cost(table, model), model.name)
    return Cost(np.array(rows), limit, fixed, model.unit)


@dataclass
class SearchResult:
    """The chosen bits, their predicted loss and their costs; ``search.json`` keeps it.

    Attributes:
        kind: Of the loss, see :class:`~mmbrecq.mixed_precision.sensitivity.measure.OutputLoss`.
        bits: Of the weight of every searched layer, None for float.
        activation_bits: Of the input of those whose activations were searched.
        predicted: Rise of the loss, by the tables.
        measured: The same of the quantized model with what was searched quantized and all else in float; None until it
            is known.
        asked: Budgets as they were asked for, by the name of the cost.
        budgets: The same in the unit of the cost.
        spent: Cost by name, with what does not depend on the bits.
        float_costs: Cost of the float model.
        units: Unit of every cost.
        front_cost: Name of the cost of the front; empty where none was searched.
        front: Cost and loss of choices of which none is better in both than another, the cheapest first.
        metric: Name of the metric whose drop was measured; empty without a budget of it.
        held_out: Number of images that it was measured on.
        trials: The choices that were evaluated for it, by their cost ``front_cost``.
        images: How many calibration images the losses are of; None for all.
        inputs: What the reconstructed states depend on.
        states: Folder of the states, from that of the file.
    """

    kind: str
    bits: dict[str, int | None]
    activation_bits: dict[str, int]
    predicted: float
    measured: float | None = None
    asked: dict[str, str] = field(default_factory=dict)
    budgets: dict[str, float] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    float_costs: dict[str, float] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    front_cost: str = ''
    front: list[list[float]] = field(default_factory=list)
    metric: str = ''
    held_out: int = 0
    trials: list[Trial] = field(default_factory=list)
    images: int | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    states: str = ''

    @property
    def drop(self) -> float | None:
        """The measured drop, in points; None without a budget of it."""
        return next((trial.drop for trial in self.trials if trial.chosen), None)

    def overrides(self) -> list[dict[str, object]]:
        """Returns the bits as the quantizer's ``overrides``."""
        inputs = {name: {'activation_bits': bits} for name, bits in self.activation_bits.items()}
        return [
            {'pattern': name, 'weight_bits': 'float' if bits is None else bits, **inputs.get(name, {})}
            for name, bits in self.bits.items()
        ]


def describe_choice(
    table: SensitivityTable, models: Sequence[BaseCostModel], problem: BitProblem, choice: Choices
) -> SearchResult:
    """Describes the solution ``choice`` of ``problem`` by bits, losses and costs."""
    chosen = {name: table.choices[index] for name, index in zip(table.searched, choice, strict=True)}
    return SearchResult(
        kind=table.kind,
        bits={name: weight for name, (weight, _) in chosen.items()},
        activation_bits={
            name: bits for name, (_, bits) in chosen.items() if name in table.group_of and bits is not None
        },
        predicted=float(problem.losses(choice)),
        budgets={name: cost.budget for name, cost in problem.costs.items() if np.isfinite(cost.budget)},
        spent={model.name: float(problem.spent(model.name, choice)) for model in models},
        float_costs={model.name: float_cost(table, model) for model in models},
        units={model.name: model.unit for model in models},
    )


def write_bit_config(
    path: Path, base: Path, float_checkpoint: str, result: SearchResult, overrides: Sequence[Mapping[str, Any]]
) -> None:
    """Writes a config that inherits ``base``, has the chosen bits, and runs in ``tools/ptq.py`` as it is.

    The result is saved beside it. ``float_checkpoint`` is a path from the working directory, or a URL, and
    ``overrides`` are those of ``base``, which stay.
    """

    # a path within a config is looked for beside it, and the new one stands elsewhere
    def relative(target: Path) -> str:
        return os.path.relpath(target.resolve(), path.parent.resolve())

    checkpoint = float_checkpoint if '://' in float_checkpoint else relative(Path(float_checkpoint))
    lines = [', '.join(f'{key}={value!r}' for key, value in o.items()) for o in [*overrides, *result.overrides()]]
    body = ''.join(f'        dict({line}),\n' for line in lines)
    asked = ', '.join(f'{name} {amount}' for name, amount in result.asked.items())
    head = f'# Bits chosen for {asked}\n_base_ = [{relative(base)!r}]\nfloat_checkpoint = {checkpoint!r}\n'
    search = f'search = dict(result={RESULT!r})\n'
    save_json(result, path.with_name(RESULT))
    write_text_atomic(f'{head}quantizer = dict(\n    overrides=[\n{body}    ]\n)\n{search}', path)
