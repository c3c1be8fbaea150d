"""Sensitivities: what every layer loses at every number of bits, measured after its reconstruction."""

from mmbrecq.mixed_precision.sensitivity.analyzer import STAGE, Analyzer
from mmbrecq.mixed_precision.sensitivity.table import AnalysisOptions, SensitivityTable

__all__ = ['STAGE', 'AnalysisOptions', 'Analyzer', 'SensitivityTable']
