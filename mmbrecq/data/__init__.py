"""Draws, reads and preprocesses calibration images."""

from mmbrecq.data.images import CalibrationSet, build_calibration_set

__all__ = ['CalibrationSet', 'build_calibration_set']
