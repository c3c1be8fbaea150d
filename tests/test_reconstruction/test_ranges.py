from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmbrecq
from mmbrecq.fake_quants.activation import LSQ
from mmbrecq.qtype import QType
from mmbrecq.reconstruction import UnitResult
from mmbrecq.reconstruction.batches import UnitData
from mmbrecq.reconstruction.callbacks import Callback
from mmbrecq.reconstruction.losses import MSELoss
from mmbrecq.reconstruction.optimize import RANGE_FACTORS, fit_ranges
from mmbrecq.reconstruction.values import MemoryValues

CPU = torch.device('cpu')


class Attention(nn.Module):
    """A softmax over many positions, on a grid, times values."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.quantizer = LSQ(QType(4, symmetric=False, signed=False))
        self.quantizer.set_grid(torch.tensor(scale), torch.tensor(0))
        self.quantizer.enabled = True

    def forward(self, scores: Tensor, values: Tensor) -> tuple[Tensor]:
        return (self.quantizer(scores.softmax(-1)) @ values,)


def problem() -> tuple[Tensor, Tensor, UnitData[Any]]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(24, 4, 64, generator=generator)
    values = 1 + torch.randn(24, 64, 5, generator=generator)
    inputs = [MemoryValues(x, CPU) for x in (scores, values)]
    target = MemoryValues(scores.softmax(-1) @ values, CPU)
    return scores, values, UnitData(inputs, inputs, [target])


def error_with(scale: float, scores: Tensor, values: Tensor) -> float:
    """The squared error of the products with a softmax rounded to multiples of ``scale``, 15 at most."""
    softmax = scores.double().softmax(-1)
    rounded = scale * (softmax / scale).round().clamp(0, 15)
    return float(((rounded - softmax) @ values.double()).square().sum())


@pytest.mark.parametrize('scale', [0.064, 0.016, 0.5])
def test_the_multiple_with_the_least_error_behind_it_is_taken(scale: float) -> None:
    scores, values, data = problem()
    module = Attention(scale)
    fit_ranges(module, [module.quantizer], data, MSELoss())
    # scales keep 8 significant bits
    best = min(RANGE_FACTORS, key=lambda factor: error_with(factor * scale, scores, values))
    assert float(module.quantizer.scale) == pytest.approx(best * scale, rel=2**-8)
    assert best < 1


def test_what_cannot_be_bettered_or_is_fixed_stays() -> None:
    scores, values, data = problem()
    best = min((0.064 * factor for factor in RANGE_FACTORS), key=lambda scale: error_with(scale, scores, values))
    module, fixed = Attention(best), Attention(0.5)
    module.quantizer.fixed = fixed.quantizer.fixed = True
    fit_ranges(fixed, [fixed.quantizer], data, MSELoss())
    assert float(fixed.quantizer.scale) == 0.5
    before = module.quantizer.scale.clone()
    fit_ranges(module, [module.quantizer], data, MSELoss())
    assert torch.equal(module.quantizer.scale, before)


class Tokens(nn.Module):
    """Tokens of 12 channels, one a hundred times as large as the others, and a stream that two blocks add to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        x = x * torch.cat([x.new_full((1, 1, 1), 100.0), x.new_ones(1, x.shape[1] - 1, 1)], 1)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x)).relu()
        return x


def test_units_of_tokens_are_measured_relative_to_each_token() -> None:
    powers: list[float] = []

    class Listener(Callback):
        def after_unit(self, stage: Any, unit: Any, result: UnitResult, progress: Any) -> None:
            powers.append(result.power / len(unit.outputs))

    torch.manual_seed(0)
    mmbrecq.quantize(Tokens().eval(), torch.randn(8, 3, 16, 16), method='qdrop', iterations=2, callbacks=[Listener()])
    # an output of zeros is off by the power of every token, of which each has 12 channels
    assert powers == pytest.approx([12] * 3, rel=0.02)
