"""Fake quantization of weights and activations."""

from mmbrecq.fake_quants.activation import LSQ, FakeQuantize
from mmbrecq.fake_quants.weight import AdaRound, NearestRounding, PackedWeight, StraightThrough, WeightFakeQuantize

__all__ = [
    'LSQ', 'AdaRound', 'FakeQuantize', 'NearestRounding', 'PackedWeight', 'StraightThrough', 'WeightFakeQuantize',
]  # fmt: skip
