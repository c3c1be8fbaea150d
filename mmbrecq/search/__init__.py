"""The choice of bits: the problem as tables, and what searches it."""

from mmbrecq.search.bits import build_problem, check_budgets, describe_choice
from mmbrecq.search.config_file import write_bit_config
from mmbrecq.search.front import find_front
from mmbrecq.search.genetic import GeneticSearcher
from mmbrecq.search.integer import IntegerProgram
from mmbrecq.search.nsga2 import NSGA2Searcher
from mmbrecq.search.options import SearchOptions, parse_budget, parse_budgets
from mmbrecq.search.problem import BitProblem, Cost
from mmbrecq.search.result import SearchResult

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
