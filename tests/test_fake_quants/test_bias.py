from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mmbrecq.fake_quants.bias import bake_bias, bias_correction, correct_bias, raise_weight_scale
from mmbrecq.fake_quants.weight import NearestRounding
from mmbrecq.qtype import QType


def corrected() -> tuple[nn.Module, torch.Tensor]:
    module = nn.Conv2d(2, 3, 1)
    bias = module.bias
    assert bias is not None
    before = bias.detach().clone()
    correct_bias(module)
    return module, before


def test_starts_at_the_float_bias() -> None:
    module, before = corrected()
    correction = bias_correction(module)
    assert correction is not None
    assert torch.equal(correction.offset, torch.zeros(3))
    for enabled in (False, True):
        correction.enabled = enabled
        assert torch.equal(module.bias, before)
    assert not any(p.requires_grad for n, p in module.named_parameters() if 'bias' in n)


def test_the_offset_counts_only_while_enabled() -> None:
    module, before = corrected()
    correction = bias_correction(module)
    assert correction is not None
    correction.offset.data.copy_(torch.tensor([1.0, -2.0, 0.5]))
    x = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    plain = module(x)
    assert torch.equal(module.bias, before)
    correction.enabled = True
    shifted = plain + torch.tensor([1.0, -2.0, 0.5]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(module(x), shifted)


def test_the_gradient_is_the_sum_over_all_else() -> None:
    module, _ = corrected()
    correction = bias_correction(module)
    assert correction is not None
    correction.enabled = True
    correction.offset.requires_grad_(True)
    upstream = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    module(torch.randn(4, 2, 5, 5)).backward(upstream)
    assert correction.offset.grad is not None
    torch.testing.assert_close(correction.offset.grad, upstream.sum((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert module.parametrizations['bias'].original.grad is None  # type: ignore[index,union-attr]


def test_baking_adds_the_offset_for_good() -> None:
    module, before = corrected()
    correction = bias_correction(module)
    assert correction is not None
    offset = torch.tensor([1.0, -2.0, 0.5])
    correction.offset.data.copy_(offset)
    bake_bias(module)
    assert torch.equal(module.bias, before + offset)
    assert bias_correction(module) is None
    assert not parametrize.is_parametrized(module)
    assert set(module.state_dict()) == {'weight', 'bias'}
    assert not module.bias.requires_grad


def test_a_module_without_bias_is_left_alone() -> None:
    module = nn.Conv2d(2, 3, 1, bias=False)
    correct_bias(module)
    assert bias_correction(module) is None
    assert not parametrize.is_parametrized(module)
    bake_bias(module)
    assert module.bias is None


def test_another_parametrization_is_no_correction() -> None:
    module = nn.Linear(2, 3)
    parametrize.register_parametrization(module, 'bias', nn.Identity())
    assert bias_correction(module) is None
    bake_bias(module)
    assert parametrize.is_parametrized(module, 'bias')


@pytest.mark.parametrize('per_channel', [True, False])
def test_a_bias_that_does_not_fit_raises_the_scale_of_its_weight(per_channel: bool) -> None:
    module = nn.Conv2d(2, 3, 1)
    module.bias.data.copy_(torch.tensor([-1000.0, 0.5, 10.0]))
    fake_quant = NearestRounding(QType(8, ch_axis=0 if per_channel else None), module.weight.shape)
    before = torch.tensor([2.0**-20, 2.0**-8, 2.0**-8]) if per_channel else torch.tensor(2.0**-20)
    weight = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    fake_quant.calibrate(weight, before, torch.zeros_like(before))
    raise_weight_scale(module, fake_quant, weight, [torch.tensor(0.5), torch.tensor([0.1, 0.25])], 2.0**20)
    # the smaller of 0.5 and 0.25 counts: 1000 / (0.25 * 2^20), to 8 significant bits
    raised = 0.003814697265625
    wanted = torch.tensor([raised, 2.0**-8, 2.0**-8]) if per_channel else torch.tensor(raised)
    torch.testing.assert_close(fake_quant.scale, wanted, rtol=2**-8, atol=0)
    assert torch.equal(fake_quant.scale[1:], before[1:]) if per_channel else fake_quant.scale > before
    scale = fake_quant.scale.reshape(-1, 1, 1, 1)
    assert torch.equal(fake_quant.codes.float(), torch.clamp(torch.round(weight / scale), -128, 127))


def test_a_bias_that_fits_changes_nothing() -> None:
    module = nn.Linear(2, 3)
    fake_quant = NearestRounding(QType(8, ch_axis=0), module.weight.shape)
    fake_quant.calibrate(module.weight.detach(), torch.full((3,), 0.01), torch.zeros(3))
    codes = fake_quant.codes.clone()
    # integers of their own, such as learned ones
    fake_quant.codes.add_(1)
    raise_weight_scale(module, fake_quant, module.weight.detach(), [torch.tensor(0.01)], 2.0**20)
    raise_weight_scale(nn.Linear(2, 3, bias=False), fake_quant, module.weight.detach(), [torch.tensor(0.01)], 0.0)
    raise_weight_scale(module, fake_quant, module.weight.detach(), [], 0.0)
    assert torch.equal(fake_quant.codes, codes + 1)
