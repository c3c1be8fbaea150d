"""Block reconstruction: learning rounding and step sizes unit by unit."""

from mmbrecq.reconstruction.losses import FisherLoss, MSELoss
from mmbrecq.reconstruction.low_rank import FisherLowRankLoss
from mmbrecq.reconstruction.methods import BRECQReconstructor, NearestReconstructor, QDropReconstructor
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.reconstruction.stages import Stage, StageOptions, Task

__all__ = [
    'BRECQReconstructor', 'FisherLoss', 'FisherLowRankLoss', 'MSELoss', 'NearestReconstructor', 'QDropReconstructor',
    'Stage', 'StageOptions', 'Task', 'UnitResult',
]  # fmt: skip
