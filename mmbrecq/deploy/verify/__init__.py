"""Static verification of exported files: does a graph say what its runtime needs to hear."""

from mmbrecq.deploy.verify.verifier import PRESETS, RULES, Rule, check_file, verify_file
from mmbrecq.deploy.verify.violation import ExpectedQuantization, Grid, Violation

__all__ = ['PRESETS', 'RULES', 'ExpectedQuantization', 'Grid', 'Rule', 'Violation', 'check_file', 'verify_file']
