"""Registers the loops that quantize and test, and the hooks around every reconstructed unit."""

from mmbrecq.dependencies import check_dependencies
from mmbrecq.engine.analysis_loop import AnalysisLoop
from mmbrecq.engine.hooks import (
    ReconstructionHook,
    ReconstructionLoggerHook,
    ReconstructionProgressHook,
    ReconstructionScalarsHook,
)  # fmt: skip
from mmbrecq.engine.ptq_loop import PTQLoop
from mmbrecq.engine.test_loop import QuantizedTestLoop

check_dependencies()

__all__ = [
    'AnalysisLoop', 'PTQLoop', 'QuantizedTestLoop', 'ReconstructionHook', 'ReconstructionLoggerHook',
    'ReconstructionProgressHook', 'ReconstructionScalarsHook',
]  # fmt: skip
