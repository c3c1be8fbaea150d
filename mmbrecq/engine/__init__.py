"""The loops that quantize and test, the hooks around every reconstructed unit, and what the tools share."""

from mmbrecq.dependencies import check_dependencies
from mmbrecq.engine.analysis_loop import AnalysisLoop
from mmbrecq.engine.hooks import (
    ReconstructionHook,
    ReconstructionLoggerHook,
    ReconstructionProgressHook,
    ReconstructionScalarsHook,
)
from mmbrecq.engine.ptq_loop import PTQLoop
from mmbrecq.engine.test_loop import QuantizedTestLoop

check_dependencies()

__all__ = [
    'AnalysisLoop',
    'PTQLoop',
    'QuantizedTestLoop',
    'ReconstructionHook',
    'ReconstructionLoggerHook',
    'ReconstructionProgressHook',
    'ReconstructionScalarsHook',
]
