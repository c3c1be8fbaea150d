"""Observers: from values to the scale and zero-point of their grid."""

from mmbrecq.observers.base import BaseObserver, MinMaxObserver, MovingAverageObserver, build_observer
from mmbrecq.observers.histogram import HistogramObserver, PercentileObserver, StreamingHistogram
from mmbrecq.observers.mse import MSEObserver, mse_search

__all__ = [
    'BaseObserver', 'HistogramObserver', 'MSEObserver', 'MinMaxObserver', 'MovingAverageObserver', 'PercentileObserver',
    'StreamingHistogram', 'build_observer', 'mse_search',
]  # fmt: skip
