"""The choice of bits: the problem as tables, and the searchers that solve it."""

from mmbrecq.mixed_precision.search.bits import (
    SearchOptions,
    SearchResult,
    build_problem,
    check_budgets,
    describe_choice,
    parse_budgets,
    write_bit_config,
)
from mmbrecq.mixed_precision.search.genetic import GeneticSearcher
from mmbrecq.mixed_precision.search.integer import IntegerProgram
from mmbrecq.mixed_precision.search.nsga2 import NSGA2Searcher, find_front
from mmbrecq.mixed_precision.search.problem import BitProblem, Cost

__all__ = [
    'BitProblem', 'Cost', 'GeneticSearcher', 'IntegerProgram', 'NSGA2Searcher', 'SearchOptions', 'SearchResult',
    'build_problem', 'check_budgets', 'describe_choice', 'find_front', 'parse_budgets', 'write_bit_config',
]  # fmt: skip
