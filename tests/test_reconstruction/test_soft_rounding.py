"""The soft rounding of a layer against its formula, by compiled kernels and by torch's operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_grids import GRIDS, SHAPE, calibrated
from torch import Tensor

from mmbrecq.fake_quants import AdaRound
from mmbrecq.qtype import QType
from mmbrecq.reconstruction.soft_rounding import SoftRounding


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels-last'])
def layout(request: pytest.FixtureRequest) -> torch.memory_format:
    return request.param


@pytest.fixture(params=[set(), {'soft_weight'}], ids=['compiled', 'torch'], autouse=True)
def _disabled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mmbrecq.kernels.native.DISABLED', request.param)


def started(qtype: QType, layout: torch.memory_format) -> tuple[AdaRound, SoftRounding, Tensor]:
    """A weight on a grid too small for its outer values."""
    rounding, weight = calibrated(AdaRound, qtype)
    return rounding, SoftRounding(rounding, weight, layout), weight


def in_numpy(rounding: AdaRound, weight: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``weight / scale`` in single precision, the zero-point and the scale."""
    shape = [1] * 4
    if rounding.qtype.ch_axis is not None:
        shape[rounding.qtype.ch_axis] = -1
    scale, zero = (v.double().numpy().reshape(shape) for v in (rounding.scale, rounding.zero_point))
    return weight.numpy() / scale.astype(np.float32), zero, scale


def h_of(alpha: Tensor) -> np.ndarray:
    return np.clip(1.2 / (1 + np.exp(-alpha.detach().double().numpy())) - 0.1, 0, 1)


@pytest.mark.parametrize('qtype', GRIDS)
def test_it_starts_at_the_float_weight(qtype: QType, layout: torch.memory_format) -> None:
    """h(alpha) is the fraction, so a weight inside the grid is its own soft-quantized value; others are cut."""
    rounding, soft, weight = started(qtype, layout)
    ratio, zero, scale = in_numpy(rounding, weight)
    np.testing.assert_allclose(h_of(soft.alpha), ratio - np.floor(ratio), atol=1e-5)
    expected = np.clip(weight.double().numpy(), (qtype.quant_min - zero) * scale, (qtype.quant_max - zero) * scale)
    soft.update(None)
    np.testing.assert_allclose(soft.weight.numpy(), expected, atol=2e-6)
    assert (expected != weight.numpy()).any()


@pytest.mark.parametrize('qtype', GRIDS)
def test_left_alone_it_is_nearest_rounding(qtype: QType, layout: torch.memory_format) -> None:
    rounding, soft, _ = started(qtype, layout)
    nearest = rounding.codes.clone()
    soft.finish()
    assert torch.equal(rounding.codes, nearest)


@pytest.mark.parametrize('qtype', GRIDS)
def test_what_is_learned(qtype: QType, layout: torch.memory_format) -> None:
    """The weight follows alpha within the grid, times the gain; it is rounded up where h reaches a half."""
    rounding, soft, weight = started(qtype, layout)
    learned = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)) * 2
    soft.alpha.data.copy_(learned)
    ratio, zero, scale = in_numpy(rounding, weight)
    # one step below the grid is cut, not rounded up into it
    below = np.floor(ratio) + zero < qtype.quant_min
    low, h = np.clip(np.floor(ratio) + zero, qtype.quant_min, qtype.quant_max), np.where(below, 0, h_of(learned))
    values = (np.clip(low + h, qtype.quant_min, qtype.quant_max) - zero) * scale
    for gain in (None, torch.tensor(3.0)):
        soft.update(gain)
        np.testing.assert_allclose(soft.weight.numpy(), values * (1 if gain is None else 3), atol=1e-5)
    soft.finish()
    np.testing.assert_array_equal(rounding.codes.numpy(), np.clip(low + (h >= 0.5), qtype.quant_min, qtype.quant_max))
    assert rounding.codes.dtype == qtype.container and not list(rounding.parameters())


def test_hard_and_soft_weight_agree_where_alpha_has_settled(layout: torch.memory_format) -> None:
    rounding, soft, _ = started(QType(3, ch_axis=0), layout)
    soft.alpha.data.copy_(20 * torch.sign(torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))))
    soft.update(None)
    soft.finish()
    torch.testing.assert_close(rounding.values, soft.weight, rtol=1e-6, atol=1e-6)
