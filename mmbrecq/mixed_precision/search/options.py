"""Options of a search, as a config gives them, and budgets as a command line does."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmbrecq.errors import ConfigError

_BUDGET = re.compile(r'(?P<number>[0-9.]+(?:e[+-]?[0-9]+)?)\s*(?P<unit>[A-Za-z]*)', re.IGNORECASE)
_FACTORS = {
    '': 1.0,
    'b': 1.0,
    'bytes': 1.0,
    'kb': 1e3,
    'mb': 1e6,
    'gb': 1e9,
    'ms': 1.0,
    's': 1e3,
    'k': 1e3,
    'm': 1e6,
    'g': 1e9,
}


@dataclass(frozen=True)
class SearchOptions:
    """How bits are chosen.

    Args:
        costs: Configs of the cost models; one for every name that has a budget.
        searcher: Config of the searcher.
        budgets: ``{name of a cost: budget}``, see :func:`parse_budget`.
        result: A choice that has been made, as a file beside the config; then there is nothing to search.
        reuse: Whether ``tools/ptq.py`` takes the rounding that the analysis has learned for the chosen bits.
    """

    costs: Sequence[Mapping[str, Any]] = ({'type': 'ModelSize'}, {'type': 'BitOperations'})
    searcher: Mapping[str, Any] = field(default_factory=lambda: {'type': 'GeneticSearcher'})
    budgets: Mapping[str, str | float] = field(default_factory=dict)
    result: str = ''
    reuse: bool = True

    def __post_init__(self) -> None:
        if not self.costs:
            raise ConfigError(f'expected search.costs to be a list of cost models, but got {self.costs!r}')


def parse_budget(text: str | float, float_cost: float, where: str) -> float:
    """A budget in the unit of its cost.

    Args:
        text: A number, one with a unit (``'1.2MB'``, ``'3ms'``), or ``'0.1x'``: a share of what the float model costs.
        float_cost: What the float model costs.
        where: What has the budget, for the message.

    Raises:
        ConfigError: It is none of these, or not above 0.
    """
    value = _budget_value(str(text).strip(), float_cost)
    if value is None or not 0 < value < math.inf:
        raise ConfigError(
            f'expected the budget of {where} to be a number above 0, such as 1.2MB, 3ms or 0.1x of the float '
            f'model, but got {text!r}'
        )
    return value


def _budget_value(text: str, float_cost: float) -> float | None:
    found = _BUDGET.fullmatch(text)
    if found is None:
        return None
    try:
        number = float(found['number'])
    except ValueError:
        return None
    unit = found['unit'].lower()
    if unit == 'x':
        return number * float_cost
    return number * _FACTORS[unit] if unit in _FACTORS else None


def parse_budgets(words: Sequence[str]) -> dict[str, str]:
    """``['size=0.1x']`` as a dict; ConfigError where a word is no ``NAME=AMOUNT``, or a name comes twice."""
    budgets: dict[str, str] = {}
    for word in words:
        name, equals, amount = word.partition('=')
        if not (name and equals and amount) or name in budgets:
            raise ConfigError(f'expected --budget as NAME=AMOUNT, each name once, such as size=0.1x, but got {word!r}')
        budgets[name] = amount
    return budgets
