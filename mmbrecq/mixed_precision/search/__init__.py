"""The choice of bits: the problem as tables, and what searches it."""

from mmbrecq.mixed_precision.search.bits import build_problem, check_budgets, describe_choice
from mmbrecq.mixed_precision.search.config_file import write_bit_config
from mmbrecq.mixed_precision.search.front import find_front
from mmbrecq.mixed_precision.search.genetic import GeneticSearcher
from mmbrecq.mixed_precision.search.integer import IntegerProgram
from mmbrecq.mixed_precision.search.nsga2 import NSGA2Searcher
from mmbrecq.mixed_precision.search.options import SearchOptions, parse_budget, parse_budgets
from mmbrecq.mixed_precision.search.problem import BitProblem, Cost
from mmbrecq.mixed_precision.search.result import SearchResult

__all__ = [
    'BitProblem',
    'Cost',
    'GeneticSearcher',
    'IntegerProgram',
    'NSGA2Searcher',
    'SearchOptions',
    'SearchResult',
    'build_problem',
    'check_budgets',
    'describe_choice',
    'find_front',
    'parse_budget',
    'parse_budgets',
    'write_bit_config',
]
