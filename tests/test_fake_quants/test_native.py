"""Compiled kernels against the same arithmetic in torch's operations, in float64 or one by one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mmbrecq.fake_quants import native
from mmbrecq.fake_quants.native import SWITCH, Kernels, kernels, takes
from mmbrecq.fake_quants.ops import (
    FakeQuantizeFunction,
    Sigmoid,
    add_regulariser_gradient_,
    regulariser_factor,
    soft_weight_,
    through_sigmoid_,
)
from mmbrecq.qtype import QType

CURVE = Sigmoid(1.1, -0.1)
BOUNDS = (CURVE.at(0), CURVE.at(1))
# the second is larger than what one thread takes
SHAPES = [(5, 7, 3, 3), (40, 700)]

needs_compiler = pytest.mark.skipif(kernels() is None, reason='there is no C compiler')


@pytest.fixture
def compiled() -> Kernels:
    found = kernels()
    assert found is not None
    return found


@pytest.fixture
def fresh() -> Iterator[None]:
    kernels.cache_clear()
    yield
    kernels.cache_clear()


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@needs_compiler
@pytest.mark.parametrize('gains', [True, False], ids=['per-channel', 'one'])
@pytest.mark.parametrize('shape', SHAPES)
def test_soft_weight(compiled: Kernels, shape: tuple[int, ...], gains: bool) -> None:
    alpha, base, stride = 4 * normal(shape, 0), normal(shape, 1), normal(shape, 2)
    gain = 1 + 0.1 * normal((shape[0],) if gains else (1,), 3)
    sigma, weight = torch.empty(shape), torch.empty(shape)
    compiled.soft_weight(sigma, weight, alpha, base, stride, gain, BOUNDS)
    expected = [torch.empty(shape, dtype=torch.float64) for _ in range(2)]
    soft_weight_(*expected, alpha.double(), base.double(), stride.double(), CURVE)
    expected[1] *= gain.double().reshape(-1, *[1] * (len(shape) - 1))
    for ours, reference in zip((sigma, weight), expected, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-6, atol=2e-6)
    # exactly the bounds, else variables that have settled would have gradients
    assert sigma.min() == torch.tensor(BOUNDS[0])
    assert sigma.max() == torch.tensor(BOUNDS[1])


@needs_compiler
@pytest.mark.parametrize('beta', [None, 2.0, 4.3, 20.0])
@pytest.mark.parametrize('shape', SHAPES)
def test_rounding_gradient(compiled: Kernels, shape: tuple[int, ...], beta: float | None) -> None:
    grad, stride, weight = normal(shape, 0), normal(shape, 1), normal(shape, 2)
    sigma = torch.sigmoid(3 * normal(shape, 3)).clamp(*BOUNDS)
    sigma.view(-1)[0] = CURVE.at(0.5)
    gain = 1 + 0.1 * normal((shape[0],), 4)
    out = torch.empty(shape)
    factor = 0.0 if beta is None else regulariser_factor(CURVE, beta, 0.3)
    power = 0.0 if beta is None else (beta - 2) / 2
    bounds = (BOUNDS[0], CURVE.at(0.5), BOUNDS[1])
    gain_grad = compiled.rounding_gradient(out, grad, weight, stride, sigma, gain, bounds, power, factor)

    column = gain.double().reshape(-1, *[1] * (len(shape) - 1))
    expected = grad.double() * stride.double() * column
    if beta is not None:
        scratch = (torch.empty_like(expected), torch.empty_like(expected))
        add_regulariser_gradient_(expected, sigma.double(), CURVE, beta, 0.3, scratch)
    inside = (sigma > BOUNDS[0]) & (sigma < BOUNDS[1])
    through_sigmoid_(expected, sigma.double(), CURVE)
    torch.testing.assert_close(out.double(), expected * inside, rtol=1e-4, atol=2e-6)
    assert not inside.all()
    product = (grad.double() * weight.double()).flatten(1).sum(1) / gain.double()
    torch.testing.assert_close(gain_grad.double(), product, rtol=1e-5, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize('dropping', [True, False])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('size', [5, 40])
def test_fake_quantize(monkeypatch: pytest.MonkeyPatch, size: int, layout: torch.memory_format, dropping: bool) -> None:
    """The same bits as torch's operations give, and sums that are more exact."""
    qtype, zero_point = QType(3, symmetric=False, signed=False), torch.tensor(2)
    shape = (4, 6, size, size)
    x, upstream = (normal(shape, seed) for seed in (0, 1))
    # halves are rounded to even
    x.view(-1)[:8] = 0.25 * (torch.arange(8) - 3.5)
    x, upstream = x.contiguous(memory_format=layout), upstream.contiguous(memory_format=layout)
    keep = (normal(shape, 2) > 0).float().contiguous(memory_format=layout) if dropping else None
    results = []
    for enabled in (True, False):
        monkeypatch.setattr('mmbrecq.fake_quants.ops.kernels', kernels if enabled else lambda: None)
        a, scale = x.clone().requires_grad_(True), torch.tensor(0.25, requires_grad=True)
        out = FakeQuantizeFunction.apply(a, scale, zero_point, qtype, None, keep)
        out.backward(upstream)
        results.append((out.detach(), a.grad, scale.grad))
    (ours, grad, total), (expected, expected_grad, expected_total) = results
    assert torch.equal(ours, expected)
    assert torch.equal(grad, expected_grad)  # type: ignore[arg-type]
    assert ours.stride() == x.stride()
    assert float(total) == pytest.approx(float(expected_total), rel=1e-3, abs=1e-3)  # type: ignore[arg-type]


@needs_compiler
def test_sums_do_not_depend_on_the_number_of_threads(compiled: Kernels) -> None:
    grad, x, out = (normal((300_001,), seed) for seed in range(3))
    threads = torch.get_num_threads()
    totals = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            totals |= {compiled.fake_quantize_gradient(grad, x, out, None, -1.0, 1.0)[1] for _ in range(5)}
    finally:
        torch.set_num_threads(threads)
    assert len(totals) == 1
    inside = ((x > -1) & (x < 1)).double()
    expected = (grad.double() * (out.double() - inside * x.double())).sum()
    assert totals.pop() == pytest.approx(float(expected), rel=1e-5)


@needs_compiler
def test_what_is_not_finite_stays_so(compiled: Kernels) -> None:
    out = compiled.fake_quantize(torch.tensor([float('nan'), float('inf'), 0.3]), None, 0.1, -8, 7)
    assert torch.isnan(out[0])
    assert out[1:].tolist() == pytest.approx([0.7, 0.3])


@pytest.mark.usefixtures('fresh')
@pytest.mark.parametrize(('name', 'value'), [(SWITCH, '0'), ('CC', 'no-such-compiler'), ('CC', 'false')])
def test_without_a_compiler_there_are_none(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert kernels() is None


def test_they_are_compiled_once() -> None:
    assert kernels() is kernels()


def test_the_source_is_beside_the_module() -> None:
    assert f'#define BLOCK {native.BLOCK}\n' in native.SOURCE.read_text()


def test_what_kernels_take() -> None:
    x = torch.zeros(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert takes(x)
    assert takes(x, x.clone())
    assert takes(last, last.clone())
    assert not takes(x, last)
    assert not takes(x.double())
    assert not takes(x[:, :, ::2])
    assert not takes(x, torch.zeros(1).expand(2, 3, 4, 5))
