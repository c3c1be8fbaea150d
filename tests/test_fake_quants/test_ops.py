"""Closed-form gradients against the chain of elementary operations that they replace, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmbrecq.fake_quants.ops import (
    DequantizeFunction,
    FakeQuantizeFunction,
    OutputGradient,
    Sigmoid,
    add_regulariser_gradient_,
    soft_weight_,
    through_sigmoid_,
)
from mmbrecq.qtype import QType

ZETA, GAMMA = 1.1, -0.1

GRIDS = [
    pytest.param(QType(4, symmetric=False, signed=False), 5, id='asymmetric'),
    pytest.param(QType(3, symmetric=True, signed=True), 0, id='symmetric'),
    pytest.param(QType(8, symmetric=False, signed=False), 0, id='zero-point-at-the-bound'),
    pytest.param(QType(4, symmetric=False, signed=False, ch_axis=1), [3, 0, 15, 8, 7], id='per-channel'),
    pytest.param(QType(2, symmetric=True, signed=True, ch_axis=0), [0, 0, 0, 0], id='first-axis'),
]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def straight_through_round(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()


def naive_fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
    if qtype.ch_axis is not None:
        shape = [1] * x.dim()
        shape[qtype.ch_axis] = -1
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    codes = torch.clamp(straight_through_round(x / scale) + zero_point, qtype.quant_min, qtype.quant_max)
    return (codes - zero_point) * scale


@pytest.mark.parametrize('shape', [(4, 5, 3, 2), (4, 5)], ids=['4d', '2d'])
@pytest.mark.parametrize(('qtype', 'zero'), GRIDS)
def test_fake_quantize_is_the_straight_through_chain(
    qtype: QType, zero: int | list[int], shape: tuple[int, ...]
) -> None:
    zero_point = torch.tensor(zero, dtype=torch.float64)
    scale = 0.1 + 0.4 * torch.rand(zero_point.shape, generator=generator(), dtype=torch.float64)
    # wide enough to be cut at both ends
    x = torch.randn(shape, generator=generator(), dtype=torch.float64) * scale.max() * qtype.levels
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for function in (naive_fake_quantize, lambda *args: FakeQuantizeFunction.apply(*args, None, None)):
        a, b = x.clone().requires_grad_(True), scale.clone().requires_grad_(True)
        out = function(a, b, zero_point, qtype)
        out.backward(upstream)
        results.append((out.detach(), a.grad, b.grad))
    for naive, ours in zip(*results, strict=True):
        assert naive is not None
        assert ours.shape == naive.shape
        torch.testing.assert_close(ours, naive, rtol=1e-12, atol=1e-12)
    cut = results[0][1] == 0
    assert cut.any()
    assert not cut.all()


def test_gradient_of_the_scale_by_hand() -> None:
    """The grid 0..3 with zero-point 1 and scale 1/2 holds -1/2, 0, 1/2 and 1; the first and last value are cut."""
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = torch.tensor([1.3, 0.6, -0.1, -3.0], dtype=torch.float64, requires_grad=True)
    zero_point = torch.tensor(1.0, dtype=torch.float64)
    out = FakeQuantizeFunction.apply(x, scale, zero_point, QType(2, symmetric=False, signed=False), None, None)
    out.sum().backward()
    assert out.tolist() == [1.0, 0.5, 0.0, -0.5]
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    # bound 2, then round(1.2) - 1.2, then round(-0.2) + 0.2, then bound -1
    assert float(scale.grad) == pytest.approx(2 - 0.2 + 0.2 - 1)  # type: ignore[arg-type]


def test_fake_quantize_gives_only_the_gradients_asked_for() -> None:
    x, scale = torch.randn(3, 2), torch.tensor(0.3)
    qtype = QType(4)
    only_x = FakeQuantizeFunction.apply(x.requires_grad_(True), scale, torch.tensor(0), qtype, None, None)
    only_x.sum().backward()
    assert x.grad is not None
    assert scale.grad is None
    scale.requires_grad_(True)
    FakeQuantizeFunction.apply(x.detach(), scale, torch.tensor(0), qtype, None, None).sum().backward()
    assert scale.grad is not None
    assert scale.grad.shape == ()


def test_fake_quantize_leaves_its_input_alone() -> None:
    x = torch.randn(3, 4)
    before = x.clone()
    FakeQuantizeFunction.apply(x, torch.tensor(0.3), torch.tensor(0), QType(2), None, None)
    assert torch.equal(x, before)


@pytest.mark.parametrize(('qtype', 'zero'), GRIDS[:2])
def test_the_order_in_memory_changes_nothing(qtype: QType, zero: int) -> None:
    x, upstream = (torch.randn(4, 5, 3, 2, generator=generator()) for _ in range(2))
    results = []
    for layouts in (
        (torch.contiguous_format,) * 2,
        (torch.channels_last,) * 2,
        (torch.channels_last, torch.contiguous_format),
    ):
        scale = torch.tensor(0.3, requires_grad=True)
        a = x.detach().contiguous(memory_format=layouts[0]).clone().requires_grad_(True)
        out = FakeQuantizeFunction.apply(a, scale, torch.tensor(zero), qtype, None, None)
        out.backward(upstream.contiguous(memory_format=layouts[1]))
        assert out.stride() == a.stride()
        results.append((out.detach(), a.grad, scale.grad))
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, expected)


def naive_soft_round(alpha: Tensor, base: Tensor, step: Tensor, beta: float | None) -> tuple[Tensor, Tensor]:
    h = torch.clamp(torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0, 1)
    loss = torch.zeros((), dtype=alpha.dtype) if beta is None else (1 - (2 * h - 1).abs() ** beta).sum()
    return base + step * h, loss


@pytest.mark.parametrize('beta', [None, 1.5, 2.0, 3.7, 20.0])
def test_soft_rounding_by_hand_is_the_naive_chain(beta: float | None) -> None:
    # the ends saturate, in the middle h = 1/2
    alpha = torch.cat([torch.linspace(-6, 6, 41), torch.tensor([0.0])]).double().reshape(6, 7)
    low = torch.randn(6, 7, generator=generator(), dtype=torch.float64)
    step = torch.rand(6, 1, generator=generator(), dtype=torch.float64).expand(6, 7).clone()
    step[2] = 0  # clipped weights
    upstream = torch.randn(6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    naive = alpha.clone().requires_grad_(True)
    expected, loss = naive_soft_round(naive, low, step, beta)
    ((expected * upstream).sum() + 0.03 * loss).backward()

    curve = Sigmoid(ZETA, GAMMA)
    sigma, weight = torch.empty_like(alpha), torch.empty_like(alpha)
    soft_weight_(sigma, weight, alpha, low + step * GAMMA, step * curve.stretch, curve)
    torch.testing.assert_close(weight, expected.detach(), rtol=1e-12, atol=1e-12)
    grad = upstream * step * curve.stretch
    if beta is not None:
        scratch = (torch.empty_like(alpha), torch.empty_like(alpha))
        by_scalars = grad.clone()
        add_regulariser_gradient_(by_scalars, sigma, curve, *torch.tensor([beta, 0.03]).double(), scratch)
        add_regulariser_gradient_(grad, sigma, curve, beta, 0.03, scratch)
        torch.testing.assert_close(by_scalars, grad, rtol=1e-5, atol=1e-6)
    through_sigmoid_(grad, sigma, curve)
    assert naive.grad is not None
    # at a half the root of a rounding error is left, with an exponent below 2
    torch.testing.assert_close(grad, naive.grad, rtol=1e-10, atol=1e-9)
    assert (grad == 0).any()
    assert (grad != 0).any()


@pytest.mark.parametrize('beta', [1.5, 2.0, 20.0])
def test_the_regulariser_is_flat_at_a_half(beta: float) -> None:
    # gamma 0 and zeta 1: h is the plain sigmoid, which is exactly 1/2 at 0
    half, grad = torch.full((3,), 0.5), torch.zeros(3)
    for exponent in (beta, torch.tensor(beta)):
        add_regulariser_gradient_(grad, half, Sigmoid(1.0, 0.0), exponent, 1.0, (torch.empty(3), torch.empty(3)))
        assert torch.equal(grad, torch.zeros(3))


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize(
    ('make', 'shape', 'axis'),
    [
        (lambda bias: torch.nn.Conv2d(4, 6, 3, groups=2, bias=bias), (3, 4, 5, 5), 1),
        (lambda bias: torch.nn.ConvTranspose2d(4, 6, 2, bias=bias), (3, 4, 5, 5), 1),
        (lambda bias: torch.nn.Linear(4, 6, bias=bias), (3, 4), -1),
        (lambda bias: torch.nn.Linear(4, 6, bias=bias), (2, 5, 4), -1),
    ],
    ids=['grouped', 'transposed', 'linear', 'tokens'],
)
@pytest.mark.parametrize('per_channel', [True, False])
def test_gradients_from_the_output_are_those_of_the_weight(
    make: Any, shape: Any, axis: int, bias: bool, per_channel: bool
) -> None:
    torch.manual_seed(0)
    layer = make(bias).double().requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight_axis = 1 if isinstance(layer, torch.nn.ConvTranspose2d) else 0
    sizes = [1] * layer.weight.dim()
    if per_channel:
        sizes[weight_axis] = 6
    gain = (0.5 + torch.rand(sizes, dtype=torch.float64)).requires_grad_(True)
    offset = torch.randn(6, dtype=torch.float64, requires_grad=True) if bias else None
    parameters = {'weight': layer.weight * gain}
    if bias:
        parameters['bias'] = layer.bias + offset
    expected = torch.func.functional_call(layer, parameters, (x,))
    upstream = torch.randn_like(expected)
    wanted = [t for t in (x, gain, offset) if t is not None]
    naive = torch.autograd.grad(expected, wanted, upstream)
    fixed = {name: value.detach() for name, value in parameters.items()}
    output = torch.func.functional_call(layer, fixed, (x,))
    ours = OutputGradient.apply(output, gain, offset, fixed.get('bias'), axis)
    assert torch.equal(ours, output)
    for a, b in zip(torch.autograd.grad(ours, wanted, upstream), naive, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_soft_rounding_is_a_rectified_sigmoid() -> None:
    alpha = np.linspace(-9, 9, 37)
    expected = np.clip(1.2 / (1 + np.exp(-alpha)) - 0.1, 0, 1)
    np.testing.assert_allclose(Sigmoid(ZETA, GAMMA).soft(torch.from_numpy(alpha)).numpy(), expected, atol=1e-14)


def test_initial_alpha_starts_at_the_fraction() -> None:
    fraction = torch.tensor([0.0, 1e-3, 0.25, 0.5, 0.75, 0.999], dtype=torch.float64)
    curve = Sigmoid(ZETA, GAMMA)
    torch.testing.assert_close(curve.soft(curve.inverse(fraction)), fraction, rtol=0, atol=1e-14)
    # 1/2 is the centre of the sigmoid
    assert float(curve.inverse(fraction)[3]) == pytest.approx(0, abs=1e-12)
    # single precision too ends above 0 for every fraction that a float32 can hold below 1
    assert torch.isfinite(Sigmoid(ZETA, GAMMA).inverse(torch.tensor([0.0, 1 - 2**-24]))).all()


@pytest.mark.parametrize('ch_axis', [None, 0, 1])
def test_dequantize_function(ch_axis: int | None) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (3, 4, 2)).astype(np.int8)
    count = 1 if ch_axis is None else codes.shape[ch_axis]
    scale = rng.uniform(0.1, 1, count).astype(np.float32)
    zero = rng.integers(-8, 8, count).astype(np.int8)
    shape = [1, 1, 1]
    if ch_axis is not None:
        shape[ch_axis] = -1
    expected = (codes.astype(np.float32) - zero.astype(np.float32).reshape(shape)) * scale.reshape(shape)
    if ch_axis is None:
        scale, zero = scale[0], zero[0]
    args = [torch.tensor(v) for v in (codes, scale, zero)]
    out = DequantizeFunction.apply(*args, ch_axis)
    assert out.dtype == torch.float32
    np.testing.assert_array_equal(out.numpy(), expected)
