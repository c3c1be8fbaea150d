"""No reconstruction at all: calibrated grids, weights rounded to nearest."""

from __future__ import annotations

from mmbrecq.reconstruction.reconstructor import BaseReconstructor
from mmbrecq.registry import RECONSTRUCTORS


@RECONSTRUCTORS.register_module()
class NearestReconstructor(BaseReconstructor):
    """Keeps the grids of the calibration and weights rounded to nearest.

    Args:
        memory_limit: As in :class:`BaseReconstructor`.
    """

    def __init__(self, memory_limit: int | str | None = None) -> None:
        super().__init__((), memory_limit=memory_limit)
