"""Static verification of exported files: does a graph say what its runtime needs to hear."""

from mmbrecq.deploy.verify.onnx_graph import ExpectedQuantization, Grid
from mmbrecq.deploy.verify.verifier import PRESETS, RULES, Rule, Violation, check_file, verify_file

__all__ = ['PRESETS', 'RULES', 'ExpectedQuantization', 'Grid', 'Rule', 'Violation', 'check_file', 'verify_file']
