"""Static verification of exported files: does a graph say what its runtime needs to hear."""

from mmbrecq.verify.rules import PRESETS, RULES, Rule
from mmbrecq.verify.verifier import check_file, verify_file
from mmbrecq.verify.violation import ExpectedQuantization, Violation

__all__ = ['PRESETS', 'RULES', 'ExpectedQuantization', 'Rule', 'Violation', 'check_file', 'verify_file']
