"""The choice of bits: the problem as tables, and what searches it."""

from mmbrecq.search.genetic import GeneticSearcher
from mmbrecq.search.integer import IntegerProgram
from mmbrecq.search.nsga2 import NSGA2Searcher
from mmbrecq.search.problem import BitProblem, Cost

__all__ = ['BitProblem', 'Cost', 'GeneticSearcher', 'IntegerProgram', 'NSGA2Searcher']
