"""Grids that roundings are learned on, and a weight on one of them."""

from __future__ import annotations

from typing import TypeVar

import pytest
import torch
from torch import Tensor

from mmbrecq.fake_quants import WeightFakeQuantize
from mmbrecq.qtype import QType

Rounding = TypeVar('Rounding', bound=WeightFakeQuantize)

SHAPE = (6, 4, 3, 3)
GRIDS = [
    pytest.param(QType(2, symmetric=False, signed=False, ch_axis=0), id='asymmetric-2'),
    pytest.param(QType(4, symmetric=True, signed=True, ch_axis=0), id='symmetric-4'),
    pytest.param(QType(3, symmetric=True, signed=True), id='per-tensor-3'),
    pytest.param(QType(4, symmetric=False, signed=False, ch_axis=1), id='second-axis-4'),
]


def problem(qtype: QType, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and a grid too small for its outer values."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    size = () if qtype.ch_axis is None else (shape[qtype.ch_axis],)
    scale = (1 + torch.rand(size, generator=generator)) * 2 / qtype.levels
    zero_point = torch.zeros(size)
    if not qtype.symmetric:
        zero_point = torch.randint(1, qtype.quant_max, size, generator=generator).float()
    return weight, scale, zero_point


def calibrated(kind: type[Rounding], qtype: QType) -> tuple[Rounding, Tensor]:
    """A weight on a grid too small for its outer values."""
    weight, scale, zero_point = problem(qtype)
    rounding = kind(qtype, weight.shape)
    rounding.calibrate(weight, scale, zero_point)
    return rounding, weight
