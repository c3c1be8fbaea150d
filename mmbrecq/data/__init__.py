"""Calibration images: which ones are drawn, how they are read, and how they reach the model."""

from __future__ import annotations

from mmbrecq.data.data_errors import explain_data_error
from mmbrecq.data.sampling import CalibrationSet, build_calibration_set

__all__ = ['CalibrationSet', 'build_calibration_set', 'explain_data_error']
