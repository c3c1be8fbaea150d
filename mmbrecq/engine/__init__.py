"""The loops that quantize and test, the hooks around every reconstructed unit, and what the tools share."""

from mmbrecq.engine.hooks import (
    ReconstructionCheckpointHook,
    ReconstructionHook,
    ReconstructionLoggerHook,
    ReconstructionProgressHook,
)
from mmbrecq.engine.ptq_loop import PTQLoop
from mmbrecq.engine.test_loop import QuantizedTestLoop

__all__ = [
    'PTQLoop',
    'QuantizedTestLoop',
    'ReconstructionCheckpointHook',
    'ReconstructionHook',
    'ReconstructionLoggerHook',
    'ReconstructionProgressHook',
]
