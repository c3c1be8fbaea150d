"""Ranges of activations by what they do to the outputs of a unit, where an observer sees the values of each alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mmbrecq.data.groups import batches_of
from mmbrecq.distributed import mean_over
from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.reconstruction.batches import UnitData, UnitLoss

FACTORS = (0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.71, 0.84, 1.0, 1.19, 1.41, 2.0)
"""Multiples of an observed step size that are tried; 1 is kept where none is better by more than a fiftieth."""
IMAGES = 32


@torch.no_grad()
def fit_ranges(module: nn.Module, quantizers: Sequence[FakeQuantize], data: UnitData[Any], loss: UnitLoss) -> None:
    """Sets every step size, one after the other, to the multiple with which the unit computes its outputs best.

    Most of a softmax is so small that the squared error of the values is least where all of it is rounded to 0; the
    products with it know better. The first images of ``data`` are looked at, and fixed step sizes stay. Quantization of
    the unit is switched on by the caller.
    """
    batch = data.read(next(iter(batches_of(data.targets[0], IMAGES)), slice(0)), floats=False)

    def measure() -> float:
        value = batch.loss(module(*batch.quantized_inputs), loss) if len(batch) else 0.0
        return mean_over(float(value) * len(batch), len(batch))

    best = measure()
    for quantizer in quantizers:
        if quantizer.fixed:
            continue
        scale, zero_point, chosen = quantizer.scale.detach().clone(), quantizer.zero_point.clone(), 1.0
        least = 0.98 * best
        for factor in FACTORS:
            quantizer.set_grid(scale * factor, zero_point)
            if (value := measure()) < least:
                least, best, chosen = value, value, factor
        quantizer.set_grid(scale * chosen, zero_point)
