"""Draws, reads and preprocesses calibration images."""

from __future__ import annotations

from mmbrecq.data.sampling import CalibrationSet, build_calibration_set
from mmbrecq.data.source import explain_data_error

__all__ = ['CalibrationSet', 'build_calibration_set', 'explain_data_error']
