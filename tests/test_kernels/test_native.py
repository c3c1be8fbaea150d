"""Compiled kernels against the same arithmetic in torch's operations, in float64 or one by one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mmbrecq.fake_quants.masks import mix_
from mmbrecq.fake_quants.ops import (
    UNBOUNDED,
    Sigmoid,
    add_regulariser_gradient_,
    fake_quantize,
    regulariser_factor,
    soft_weight_,
    through_sigmoid_,
)
from mmbrecq.kernels import native
from mmbrecq.kernels.native import (
    BLOCK,
    SWITCH,
    Curve,
    Kernel,
    Variable,
    as_array,
    is_dense,
    kernel,
    kernel_state,
    kernels,
)
from mmbrecq.qtype import QType

CURVE = Sigmoid(1.1, -0.1)
BOUNDS = (CURVE.at(0), CURVE.at(1))
TABLE_CURVE = Curve(CURVE.gamma, CURVE.stretch, BOUNDS[0], CURVE.at(0.5), BOUNDS[1])
# the second is larger than what one thread computes, a row of the third than a block
SHAPES = [(5, 7, 3, 3), (40, 900), (2, 9000)]

needs_compiler = pytest.mark.skipif(kernels() is None, reason='there is no C compiler')


@pytest.fixture
def compiled() -> dict[str, Kernel]:
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


class Layer:
    """A layer whose rounding is learned.

    Args:
        shape: Shape of its weight.
        per_channel: Whether it has a scale and a gain for each channel.
    """

    def __init__(self, shape: tuple[int, ...], per_channel: bool = True) -> None:
        self.alpha, self.grad = 4 * normal(shape, 0), normal(shape, 1)
        # integers from -3 to 4, some of them with one way to go only
        self.grid = (3 * normal(shape, 2)).round().clamp(-6, 8).to(torch.int16)
        rows = (shape[0], *[1] * (len(shape) - 1)) if per_channel else (1,)
        self.scale, self.gain = 0.1 + normal(rows, 3).abs(), 1 + 0.1 * normal(rows, 4)
        self.weight, self.out = torch.empty(shape), torch.full(shape, 7.0)
        self.gain_grad = torch.empty(shape[0])

    @property
    def line(self) -> tuple[Tensor, Tensor]:
        """What the weight is at ``sigma`` 0, and how it rises with it, without the gain; float64."""
        step = self.scale.double() * (self.grid & 1)
        return self.scale.double() * (self.grid >> 1) + step * CURVE.gamma, step * CURVE.stretch


@needs_compiler
@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize('shape', SHAPES)
def test_soft_weights(compiled: dict[str, Kernel], shape: tuple[int, ...], per_channel: bool) -> None:
    layer = Layer(shape, per_channel)
    compiled['soft_weight'](
        shape[0], layer.alpha, layer.grid, layer.scale, layer.gain, layer.weight, TABLE_CURVE
    )  # fmt: skip
    sigma, expected = (torch.empty(shape, dtype=torch.float64) for _ in range(2))
    soft_weight_(sigma, expected, layer.alpha.double(), *layer.line, CURVE)
    torch.testing.assert_close(layer.weight.double(), expected * layer.gain.double(), rtol=1e-6, atol=4e-6)


@needs_compiler
@pytest.mark.parametrize('beta', [None, 2.0, 4.3, 20.0])
@pytest.mark.parametrize('shape', SHAPES)
def test_rounding_gradients(compiled: dict[str, Kernel], shape: tuple[int, ...], beta: float | None) -> None:
    layer = Layer(shape)
    factor = 0.0 if beta is None else regulariser_factor(CURVE, beta, 0.3)
    power = 0.0 if beta is None else (beta - 2) / 2
    compiled['rounding_gradient'](
        shape[0], layer.alpha, layer.grid, layer.scale, layer.gain, layer.grad, layer.out, layer.gain_grad,
        TABLE_CURVE, power, factor,
    )  # fmt: skip

    sigma, weight = (torch.empty(shape, dtype=torch.float64) for _ in range(2))
    soft_weight_(sigma, weight, layer.alpha.double(), *layer.line, CURVE)
    expected = layer.grad.double() * layer.line[1] * layer.gain.double()
    if beta is not None:
        scratch = (torch.empty_like(expected), torch.empty_like(expected))
        add_regulariser_gradient_(expected, sigma, CURVE, beta, 0.3, scratch)
    inside = (sigma > BOUNDS[0]) & (sigma < BOUNDS[1])
    through_sigmoid_(expected, sigma, CURVE)
    # the power is rough, and what the regulariser and the loss make may nearly cancel
    torch.testing.assert_close(layer.out.double(), expected * inside, rtol=2e-4, atol=5e-5)
    # variables that have settled have none at all
    assert not inside.all()
    assert bool((layer.out[~inside] == 0).all())
    product = (layer.grad.double() * weight).flatten(1).sum(1)
    torch.testing.assert_close(layer.gain_grad.double(), product, rtol=1e-5, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize('rectifier', [None, (0.0, math.inf), (0.0, 0.9)])
@pytest.mark.parametrize('dropping', [True, False])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('size', [5, 40])
def test_fake_quantize(
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    layout: torch.memory_format,
    dropping: bool,
    rectifier: tuple[float, float] | None,
) -> None:
    """The same bits as torch's operations give, and sums that are more exact."""
    qtype, zero_point = QType(3, symmetric=False, signed=False), torch.tensor(2)
    shape = (4, 6, size, size)
    x, upstream = (normal(shape, seed) for seed in (0, 1))
    # halves are rounded to even
    x.view(-1)[:8] = 0.25 * (torch.arange(8) - 3.5)
    x, upstream = x.contiguous(memory_format=layout), upstream.contiguous(memory_format=layout)
    keep = (normal(shape, 2) > 0).byte().contiguous(memory_format=layout) if dropping else None
    results = []
    for disabled in (set(), {'fake_quantize'}):
        monkeypatch.setattr(native, 'DISABLED', disabled)
        a, scale = x.clone().requires_grad_(True), torch.tensor(0.25, requires_grad=True)
        out = fake_quantize(a, scale, zero_point, qtype, None, keep, rectifier)
        out.backward(upstream)
        results.append((out.detach(), a.grad, scale.grad))
    (ours, grad, total), (expected, expected_grad, expected_total) = results
    assert torch.equal(ours, expected)
    assert torch.equal(grad, expected_grad)  # type: ignore[arg-type]
    assert ours.stride() == x.stride()
    assert float(total) == pytest.approx(float(expected_total), rel=1e-3, abs=1e-3)  # type: ignore[arg-type]


@needs_compiler
def test_a_gradient_may_lie_in_memory_in_any_way() -> None:
    x, scale = normal((3, 4), 0).requires_grad_(True), torch.tensor(0.25)
    out = fake_quantize(x, scale, torch.tensor(0), QType(4))
    (grad,) = torch.autograd.grad(out, x, normal((4, 3), 1).t())
    inside = ((x / scale).abs() < 7.5) & (x / scale > -8.5)
    assert torch.equal(grad, normal((4, 3), 1).t() * inside)


@needs_compiler
def test_sums_do_not_depend_on_the_number_of_threads(compiled: dict[str, Kernel]) -> None:
    grad, x, out = (normal((300_001,), seed) for seed in range(3))
    threads = torch.get_num_threads()
    totals = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(5):
                sums = torch.empty(-(-len(x) // BLOCK), dtype=torch.float64)
                compiled['fake_quantize_gradient'](grad, x, out, None, torch.empty_like(x), sums, -1.0, 1.0, *UNBOUNDED)
                totals.add(float(sums[0]))
    finally:
        torch.set_num_threads(threads)
    assert len(totals) == 1
    inside = ((x > -1) & (x < 1)).double()
    expected = (grad.double() * (out.double() - inside * x.double())).sum()
    assert totals.pop() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize('disabled', [set(), {'mix'}])
def test_inputs_are_mixed_by_a_mask(monkeypatch: pytest.MonkeyPatch, disabled: set[str]) -> None:
    monkeypatch.setattr(native, 'DISABLED', disabled)
    x, other, keep = normal((4, 5, 9, 300), 0), normal((4, 5, 9, 300), 1), normal((4, 5, 9, 300), 2) > 0
    expected = torch.where(keep, x, other)
    mix_(x, other, keep.byte())
    assert torch.equal(x, expected)


@needs_compiler
def test_nan_propagates(compiled: dict[str, Kernel]) -> None:
    out = torch.empty(3)
    compiled['fake_quantize'](torch.tensor([float('nan'), float('inf'), 0.3]), None, out, 0.1, -8, 7, *UNBOUNDED)
    assert torch.isnan(out[0])
    assert out[1:].tolist() == pytest.approx([0.7, 0.3])


@needs_compiler
def test_arrays_that_do_not_fit_are_refused(compiled: dict[str, Kernel]) -> None:
    x = torch.zeros(4, 6)
    with pytest.raises(AssertionError, match='^expected arrays of the same length for fake_quantize, but got other'):
        compiled['fake_quantize'](x, None, torch.zeros(5), 0.1, -8, 7, *UNBOUNDED)
    with pytest.raises(AssertionError, match='same length for mix'):
        compiled['mix'](x, x.clone(), torch.zeros(23, dtype=torch.uint8))
    with pytest.raises(AssertionError, match='same length for soft_weight'):
        compiled['soft_weight'](4, x, x.short(), torch.zeros(3), torch.ones(1), x.clone(), TABLE_CURVE)
    with pytest.raises(AssertionError, match='same length for rounding_gradient'):
        compiled['rounding_gradient'](
            4, x, x.short(), torch.zeros(4), torch.ones(1), x, x.clone(), torch.zeros(3), TABLE_CURVE, 1.0, 0.0
        )
    sums = torch.zeros(0, dtype=torch.float64)
    with pytest.raises(AssertionError, match='same length for fake_quantize_gradient'):
        compiled['fake_quantize_gradient'](x, x, x, None, x.clone(), sums, -1.0, 1.0, *UNBOUNDED)
    variable = Variable(*(as_array(tensor) for tensor in (x, x.clone(), x.clone(), torch.zeros(23))), 0.1)
    with pytest.raises(AssertionError, match='same length for adam'):
        compiled['adam'](1, (Variable * 1)(variable), 0.1, 0.999, 0.001, 1e-8, 1.0)
    with pytest.raises(AssertionError, match=r'^expected dense torch.float32 on the CPU, but got torch.float64$'):
        compiled['fake_quantize'](x.double(), None, x, 0.1, -8, 7, *UNBOUNDED)
    with pytest.raises(AssertionError, match='dense'):
        compiled['fake_quantize'](x[:, ::2], None, torch.zeros(12), 0.1, -8, 7, *UNBOUNDED)


@pytest.mark.usefixtures('fresh')
@pytest.mark.parametrize(
    ('name', 'value', 'told'),
    [
        (SWITCH, '0', None),
        ('CC', 'no-such-compiler', "no-such-compiler fails: .*No such file or directory: 'no-such-compiler'"),
        ('CC', 'false', r"false fails: Command '.*' returned non-zero exit status 1"),
    ],
)
def test_without_a_compiler_there_are_none_and_a_failure_is_told_once(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str | None
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(native, 'print_log', lambda text, *_: lines.append(text))
    monkeypatch.setenv(name, value)
    assert kernels() is None and kernel_state() == 'none'
    assert len(lines) == (told is not None)
    if told is not None:
        assert re.fullmatch(f"kernels are not compiled, torch's operations do their work: {told}", lines[0])


def test_they_are_compiled_once() -> None:
    assert kernels() is kernels()


def test_the_source_is_beside_the_module() -> None:
    assert f'#define BLOCK {native.BLOCK}\n' in native.SOURCE.read_text()


@needs_compiler
def test_what_kernels_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(*tensors: Tensor) -> bool:
        return kernel('fake_quantize', *tensors) is not None

    x = torch.zeros(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert chosen(x) and chosen(x, x.clone()) and chosen(x, x.byte()) and chosen(last, last.clone())
    assert not chosen(x, last)
    assert not chosen(x.double()) and not chosen(x, x.double())
    assert not chosen(x[:, :, ::2]) and not is_dense(x[:, :, ::2])
    assert not chosen(x, torch.zeros(1).expand(2, 3, 4, 5))
    assert kernel('convolution', x) is None
    monkeypatch.setattr(native, 'DISABLED', {'fake_quantize'})
    assert not chosen(x)
    assert kernel('soft_weight', x) is not None
