"""Calibration: ranges of channels, grids of weights and of activations, computed from values."""
