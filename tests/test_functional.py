from __future__ import annotations

import numpy as np
import pytest
import torch

from mmbrecq.functional import (
    affine_from_range,
    dequantize,
    expand,
    quantize,
    shared_affine_from_range,
    short_scale,
)
from mmbrecq.qtype import QType

ASYMMETRIC, SIGNED = QType(4, symmetric=False, signed=False), QType(4)
GRIDS = [QType(2, symmetric=False, signed=False), ASYMMETRIC, SIGNED, QType(8, spare_bits=1)]


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qtype: QType) -> torch.Tensor:
    return dequantize(quantize(x, scale, zero_point, qtype), scale, zero_point, qtype.ch_axis)


def test_expand() -> None:
    values = torch.arange(3.0)
    assert expand(values, 4, 1).shape == (1, 3, 1, 1)
    assert expand(values, 2, 0).shape == (3, 1)
    assert expand(values, 1, 0).tolist() == [0, 1, 2]
    scalar = torch.tensor(2.0)
    assert expand(scalar, 4, None) is scalar


def test_short_scales_have_eight_significant_bits() -> None:
    scales = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 1000)
    mantissa, exponent = np.frexp(scales.double().numpy())
    expected = np.ldexp(np.rint(mantissa * 256) / 256, exponent)
    assert short_scale(scales).double().numpy().tolist() == expected.tolist()


def test_sums_of_low_bit_products_are_exact_with_short_scales() -> None:
    """Nine products of 2-bit weights and 4-bit activations, as a depthwise convolution adds them up, in two orders."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 16, (9, 1000), generator=generator)
    w = torch.randint(-2, 2, (9, 1000), generator=generator)
    scales = torch.rand(2, 1000, generator=generator) + 0.01

    def add_up(scales: torch.Tensor) -> list[torch.Tensor]:
        products = (x * scales[0]) * (w * scales[1])
        sums = []
        for rows in (products, products.flip(0)):
            total = torch.zeros(1000)
            for row in rows:
                total += row
            sums.append(total)
        return [*sums, products.double().sum(0).float()]

    forwards, backwards, exact = add_up(short_scale(scales))
    assert torch.equal(forwards, backwards)
    assert torch.equal(forwards, exact)
    forwards, backwards, _ = add_up(scales)
    assert not torch.equal(forwards, backwards)


def test_rounding_is_half_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert quantize(x, torch.tensor(1.0), torch.tensor(0.0), SIGNED).tolist() == [0, 2, 2, 0, -2, -2]


def test_values_are_cut_at_the_ends() -> None:
    x = torch.tensor([-1e9, -8.0, 7.0, 1e9])
    assert quantize(x, torch.tensor(1.0), torch.tensor(0.0), SIGNED).tolist() == [-8, -8, 7, 7]
    assert quantize(x, torch.tensor(1.0), torch.tensor(3.0), ASYMMETRIC).tolist() == [0, 0, 10, 15]


@pytest.mark.parametrize('ch_axis', [None, 0, 1])
def test_against_numpy(ch_axis: int | None) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0, 2, (3, 5, 4))
    qtype = QType(4, symmetric=False, signed=False, ch_axis=ch_axis)
    shape = [1, 1, 1]
    if ch_axis is not None:
        shape[ch_axis] = x.shape[ch_axis]
    scale, zero = rng.uniform(0.2, 0.6, shape), rng.integers(0, 16, shape).astype(float)
    codes = np.clip(np.rint(x / scale) + zero, 0, 15)
    given = [torch.from_numpy(v).reshape(qtype.scale_shape(torch.Size(x.shape))) for v in (scale, zero)]
    integers = quantize(torch.from_numpy(x), *given, qtype)
    np.testing.assert_array_equal(integers.numpy(), codes)
    np.testing.assert_allclose(dequantize(integers.to(torch.uint8), *given, ch_axis).numpy(), (codes - zero) * scale)
    np.testing.assert_allclose(fake_quantize(torch.from_numpy(x), *given, qtype).numpy(), (codes - zero) * scale)


def test_dequantize_takes_integers_and_gives_the_dtype_of_the_scale() -> None:
    out = dequantize(torch.tensor([0, 255], dtype=torch.uint8), torch.tensor(0.5), torch.tensor(3.0), None)
    assert out.dtype == torch.float32
    # not modulo 256
    assert out.tolist() == [-1.5, 126.0]


def test_values_of_the_grid_are_fixed_points() -> None:
    scale, zero = torch.tensor(0.3), torch.tensor(5.0)
    grid = dequantize(torch.arange(16.0), scale, zero, None)
    assert torch.equal(fake_quantize(grid, scale, zero, ASYMMETRIC), grid)


@pytest.mark.parametrize(
    ('low', 'high', 'qtype', 'scale', 'zero'),
    [
        (-1.0, 2.0, ASYMMETRIC, 3 / 15, 5),
        (0.0, 3.0, ASYMMETRIC, 3 / 15, 0),
        (-3.0, 0.0, ASYMMETRIC, 3 / 15, 15),
        # 0 is always in the range
        (1.0, 3.0, ASYMMETRIC, 3 / 15, 0),
        (-3.0, -1.0, ASYMMETRIC, 3 / 15, 15),
        # the negative side has one integer more
        (-8.0, 7.0, SIGNED, 1.0, 0),
        (-7.0, 7.0, SIGNED, 1.0, 0),
        (-16.0, 7.0, SIGNED, 2.0, 0),
        (0.0, 30.0, QType(4, symmetric=True, signed=False), 2.0, 0),
        (-64.0, 63.0, QType(8, spare_bits=1), 1.0, 0),
    ],
)
def test_grid_of_a_range(low: float, high: float, qtype: QType, scale: float, zero: int) -> None:
    got = affine_from_range(torch.tensor(low), torch.tensor(high), qtype)
    assert float(got[0]) == pytest.approx(scale)
    assert float(got[1]) == zero


@pytest.mark.parametrize('qtype', GRIDS)
def test_the_grid_covers_the_range_and_holds_zero(qtype: QType) -> None:
    rng = np.random.default_rng(1)
    low = torch.from_numpy(-rng.exponential(1, 200))
    high = torch.from_numpy(rng.exponential(1, 200))
    scale, zero = affine_from_range(low, high, qtype)
    assert (scale > 0).all()
    assert torch.equal(zero, zero.round())
    assert ((zero >= qtype.quant_min) & (zero <= qtype.quant_max)).all()
    # rounding the zero-point moves the ends by half a step at most
    slack = 0 if qtype.symmetric else 0.5
    assert ((qtype.quant_min - zero - slack) * scale <= low + 1e-12).all()
    assert ((qtype.quant_max - zero + slack) * scale >= high - 1e-12).all()
    per_channel = QType(qtype.bits, qtype.symmetric, qtype.signed, 0, qtype.spare_bits)
    nothing = torch.zeros(200, 1, dtype=torch.float64)
    assert torch.equal(fake_quantize(nothing, scale, zero, per_channel), nothing)


@pytest.mark.parametrize('qtype', GRIDS)
def test_a_range_of_zero_gives_a_usable_grid(qtype: QType) -> None:
    scale, zero = affine_from_range(torch.zeros(2), torch.zeros(2), qtype)
    assert (scale > 0).all()
    assert torch.isfinite(scale).all()
    assert fake_quantize(torch.zeros(()), scale[0], zero[0], qtype) == 0


@pytest.mark.parametrize('qtype', [g for g in GRIDS if not g.symmetric])
def test_channels_share_the_zero_point_that_costs_least(qtype: QType) -> None:
    low, high = -torch.tensor([0.3, 0.2, 4.0, 0.0]), torch.tensor([9.0, 0.1, 5.0, 0.0])
    scale, zero = shared_affine_from_range(low, high, qtype)
    assert zero.unique().numel() == 1 and (scale > 0).all()
    costs = []
    for offset in range(qtype.quant_min + 1, qtype.quant_max):
        sides = zip((offset - qtype.quant_min, qtype.quant_max - offset), (-low[:3], high[:3]), strict=True)
        needed = np.maximum(*[side.numpy() / levels for levels, side in sides])
        costs.append(float((needed / (high - low)[:3].numpy()) @ (needed / (high - low)[:3].numpy())))
        if offset == zero[0]:
            np.testing.assert_allclose(scale[:3], needed, rtol=1e-6)
    assert int(zero[0]) == qtype.quant_min + 1 + int(np.argmin(costs))
    # the channel without values
    assert float(scale[3]) == pytest.approx(float((high - low).max()) / (qtype.levels - 1) * 2**-16)
