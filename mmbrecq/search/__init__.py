"""The choice of bits: the problem as tables, and what searches it."""

from mmbrecq.search.bits import ChosenBits, build_problem, chosen_bits
from mmbrecq.search.config_file import write_bit_config
from mmbrecq.search.genetic import GeneticSearcher
from mmbrecq.search.integer import IntegerProgram
from mmbrecq.search.nsga2 import NSGA2Searcher
from mmbrecq.search.options import SearchOptions, parse_budget, parse_budgets
from mmbrecq.search.problem import BitProblem, Cost

__all__ = [
    'BitProblem',
    'ChosenBits',
    'Cost',
    'GeneticSearcher',
    'IntegerProgram',
    'NSGA2Searcher',
    'SearchOptions',
    'build_problem',
    'chosen_bits',
    'parse_budget',
    'parse_budgets',
    'write_bit_config',
]
