"""Observers: from values to the scale and zero-point of their grid."""

from __future__ import annotations

from mmbrecq.observers.base import BaseObserver, build_observer
from mmbrecq.observers.histogram import StreamingHistogram
from mmbrecq.observers.kl import HistogramObserver
from mmbrecq.observers.minmax import MinMaxObserver
from mmbrecq.observers.moving_average import MovingAverageObserver
from mmbrecq.observers.mse import MSEObserver
from mmbrecq.observers.percentile import PercentileObserver
from mmbrecq.observers.search import mse_search

__all__ = [
    'BaseObserver',
    'HistogramObserver',
    'MSEObserver',
    'MinMaxObserver',
    'MovingAverageObserver',
    'PercentileObserver',
    'StreamingHistogram',
    'build_observer',
    'mse_search',
]
