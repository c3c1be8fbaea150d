"""Sensitivities: what every layer loses at every number of bits, measured after its reconstruction."""

from mmbrecq.mixed_precision.sensitivity.analyzer import STAGE, Analyzer
from mmbrecq.mixed_precision.sensitivity.options import AnalysisOptions, split_search
from mmbrecq.mixed_precision.sensitivity.table import SensitivityTable

__all__ = ['STAGE', 'AnalysisOptions', 'Analyzer', 'SensitivityTable', 'split_search']
