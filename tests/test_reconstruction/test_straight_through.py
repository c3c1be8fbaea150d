"""Straight-through rounding against its formula and against autograd's gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_grids import GRIDS, SHAPE, calibrated
from torch import Tensor

from mmbrecq.fake_quants import StraightThrough
from mmbrecq.functional import expand
from mmbrecq.qtype import QType
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction import QDropReconstructor, Task
from mmbrecq.reconstruction.callbacks import Callback
from mmbrecq.reconstruction.soft_rounding import StraightThroughRounding


def started(qtype: QType) -> tuple[StraightThrough, StraightThroughRounding, Tensor]:
    """A weight on a grid too small for its outer values."""
    rounding, weight = calibrated(StraightThrough, qtype)
    return rounding, StraightThroughRounding(rounding, weight, torch.channels_last), weight


@pytest.mark.parametrize('qtype', GRIDS)
def test_left_alone_it_is_nearest_rounding(qtype: QType) -> None:
    rounding, soft, _ = started(qtype)
    codes = rounding.codes.clone()
    soft.update(None)
    torch.testing.assert_close(soft.weight, rounding.values)
    soft.finish()
    assert torch.equal(rounding.codes, codes)


@pytest.mark.parametrize('qtype', GRIDS)
@pytest.mark.parametrize('gained', [False, True])
def test_gradients_are_those_of_autograd_without_the_rounding(qtype: QType, gained: bool) -> None:
    """``w = (clamp(v) + (round(v) - v as a constant) - z) * s * gain`` by elementary operations."""
    rounding, soft, _ = started(qtype)
    gain = torch.nn.Parameter(torch.full_like(expand(rounding.scale, 4, qtype.ch_axis), 1.5)) if gained else None
    scale, zero = (expand(v.float(), 4, qtype.ch_axis) for v in (rounding.scale, rounding.zero_point))
    steps = soft.steps.detach().clone().requires_grad_(True)
    low, high = qtype.quant_min, qtype.quant_max
    # clamped where rounding leaves the grid
    inside = steps.clamp(low - 0.5, high + 0.5)
    rounded = steps.detach().round().clamp(low, high)
    factor = torch.ones_like(scale) if gain is None else gain.detach().clone().requires_grad_(True)
    weight = (inside + (rounded - inside).detach() - zero) * scale * factor
    grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    weight.backward(grad)

    soft.update(gain)
    torch.testing.assert_close(soft.weight, weight.detach())
    soft.collect(grad, gain, None, 0.0)
    torch.testing.assert_close(soft.steps.grad, steps.grad)
    assert bool((steps.grad == 0).any())
    if gain is not None:
        torch.testing.assert_close(gain.grad, factor.grad)


def test_a_weight_moves_by_more_than_a_step() -> None:
    rounding, soft, _ = started(QType(4, symmetric=False, signed=False, ch_axis=0))
    codes = rounding.codes.int()
    with torch.no_grad():
        soft.steps.add_(2)
    soft.finish()
    # those below the grid stay below it
    assert torch.equal(rounding.codes.int()[codes > 0], (codes + 2).clamp(max=15)[codes > 0])


def test_it_is_learned_by_a_reconstruction(prepared: Callable[..., QuantizedModel], task: Callable[..., Task]) -> None:
    weight = {'bits': 2, 'observer': {'type': 'MinMaxObserver'}, 'rounding': {'type': 'StraightThrough'}}
    work = task(prepared(weight=weight))
    reconstructor = QDropReconstructor({'iterations': 60, 'batch_size': 8})
    before = {name: fq.codes.clone() for name, _, fq in work.model.weights()}
    results = reconstructor.run(work, reconstructor.plan(work), Callback())
    assert sum(result.loss_after for result in results) < 0.8 * sum(result.loss_before for result in results)
    assert any(not torch.equal(before[name], fq.codes) for name, _, fq in work.model.weights())
