from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from mmbrecq.fake_quants.bias import bake_bias, bias_correction, correct_bias


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
