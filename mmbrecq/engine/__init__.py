"""The loops that quantize and test, the hooks around every reconstructed unit, and what the tools share."""

from mmbrecq.engine.analysis_loop import AnalysisLoop
from mmbrecq.engine.hooks import (
    ReconstructionCheckpointHook,
    ReconstructionHook,
    ReconstructionLoggerHook,
    ReconstructionProgressHook,
    ReconstructionScalarsHook,
)
from mmbrecq.engine.ptq_loop import PTQLoop
from mmbrecq.engine.test_loop import QuantizedTestLoop

__all__ = [
    'AnalysisLoop',
    'PTQLoop',
    'QuantizedTestLoop',
    'ReconstructionCheckpointHook',
    'ReconstructionHook',
    'ReconstructionLoggerHook',
    'ReconstructionProgressHook',
    'ReconstructionScalarsHook',
]
