"""What is optimised in a unit; gradients carried on by hand are held against autograd through the fake quantizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from mmbrecq.fake_quants import AdaRound, NearestRounding
from mmbrecq.fake_quants.bias import bias_correction, correct_bias
from mmbrecq.fake_quants.weight import WeightFakeQuantize, original_weight, weight_fake_quant
from mmbrecq.functional import affine_from_range
from mmbrecq.kernels.native import kernels
from mmbrecq.qtype import QType
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction import Stage, StageOptions
from mmbrecq.reconstruction.variables import Variables, cosine

Prepare = Callable[..., QuantizedModel]
RATES = {'lr': 0.1, 'bias_lr': 0.2, 'weight_scale_lr': 0.3, 'activation_lr': 0.4}


def variables_of(model: QuantizedModel, rounding: bool = True, scale: bool = True, **options: Any) -> Variables:
    unit = model.image_graph.units[1]
    stage = Stage('joint', StageOptions(**{**RATES, **options}), rounding, scale)
    return Variables(unit.module, model.image_graph.unit_weights(unit), model.image_graph.unit_quantizers(unit), stage)


def rates(variables: Variables) -> dict[float, int]:
    """Number of tensors by learning rate."""
    return {lr: len(parameters) for parameters, lr, _ in variables.groups}


def state_of(model: QuantizedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def disturb(variables: Variables, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameters, _, _ in variables.groups:
        for parameter in parameters:
            parameter.data.add_(torch.rand(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    ('rounding', 'scale', 'options', 'expected'),
    [
        (True, False, {}, {0.1: 2, 0.2: 2, 0.3: 2}),
        (False, True, {}, {0.2: 2, 0.3: 2, 0.4: 2}),
        (True, True, {}, {0.1: 2, 0.2: 2, 0.3: 2, 0.4: 2}),
        (True, False, {'bias_lr': 0.0, 'weight_scale_lr': 0.0}, {0.1: 2}),
        (False, True, {'bias_lr': 0.0, 'weight_scale_lr': 0.0}, {0.4: 2}),
        (False, False, {'bias_lr': 0.0, 'weight_scale_lr': 0.0}, {}),
    ],
)
def test_what_is_learned(prepared: Prepare, rounding: bool, scale: bool, options: Any, expected: Any) -> None:
    """The block has two layers and two activation quantizers."""
    variables = variables_of(prepared(), rounding, scale, **options)
    assert rates(variables) == expected
    assert all(p.requires_grad for parameters, _, _ in variables.groups for p in parameters)


def test_a_fixed_step_size_is_not_learned(prepared: Prepare) -> None:
    model = prepared()
    quantizer = model.image_graph.unit_quantizers(model.image_graph.units[1])[0]
    quantizer.fixed = True
    assert rates(variables_of(model)) == {0.1: 2, 0.2: 2, 0.3: 2, 0.4: 1}
    assert not quantizer.scale.requires_grad


def test_by_default_a_step_size_is_learned_in_fractions_of_itself(prepared: Prepare) -> None:
    model = prepared()
    quantizers = model.image_graph.unit_quantizers(model.image_graph.units[1])
    quantizers[0].set_grid(torch.tensor(40.0), quantizers[0].zero_point)
    quantizers[1].set_grid(torch.tensor(0.5), quantizers[1].zero_point)
    found = variables_of(model, activation_lr=None, bias_lr=0.0)
    assert rates(found) == {0.1: 2, 0.3: 2, 0.2: 1, 0.0025: 1}


def test_only_rounding_keeps_its_learning_rate(prepared: Prepare) -> None:
    for _, lr, schedule in variables_of(prepared()).groups:
        assert schedule(0.0) == 1
        assert schedule(1.0) == pytest.approx(1 if lr == RATES['lr'] else 0)


def test_other_units_are_left_alone(prepared: Prepare) -> None:
    model = prepared()
    before = state_of(model)
    variables = variables_of(model)
    disturb(variables)
    variables.finish()
    changed = {name for name, tensor in state_of(model).items() if not torch.equal(tensor, before[name])}
    own = ('backbone.first.', 'activation_quantizers.relu_1.', 'activation_quantizers.relu_2.')
    assert changed
    assert all(name.startswith(own) for name in changed)


def test_finishing_fixes_everything(prepared: Prepare) -> None:
    model = prepared()
    names = set(state_of(model))
    variables = variables_of(model)
    disturb(variables)
    variables.finish()
    unit = model.image_graph.units[1]
    assert set(state_of(model)) == names
    for module, fake_quant in model.image_graph.unit_weights(unit):
        correction = bias_correction(module)
        assert correction is not None
        assert not correction.offset.requires_grad
        assert correction.offset.abs().min() > 0
        assert not list(fake_quant.parameters())
    assert not any(p.requires_grad for q in model.image_graph.unit_quantizers(unit) for p in q.parameters())


BETA, ROUND_WEIGHT = 3.0, 0.02


class Block(nn.Module):
    """A convolution used twice, one without bias, a depthwise one and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.plain = nn.Conv2d(4, 6, 1, bias=False)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.twice(torch.relu(self.twice(x))))
        return self.fc(torch.relu(self.depthwise(self.plain(y))).mean((2, 3)))


def block_of(rounding: type[WeightFakeQuantize]) -> fx.GraphModule:
    torch.manual_seed(0)
    block = Block().double()
    for index, module in enumerate(m for m in block.modules() if isinstance(m, (nn.Conv2d, nn.Linear))):
        # the first layer has one scale, the others one for each channel
        qtype = QType(3, symmetric=False, signed=False, ch_axis=None if index == 0 else 0)
        weight = module.weight.detach().clone()
        fake_quant = rounding(qtype, weight.shape).double()
        axes = tuple(range(weight.dim()))[0 if index == 0 else 1 :]
        fake_quant.calibrate(weight, *affine_from_range(weight.amin(axes), weight.amax(axes), qtype))
        fake_quant.enabled = True
        module.weight.requires_grad_(False)
        parametrize.register_parametrization(module, 'weight', fake_quant, unsafe=True)
        correct_bias(module)
        correction = bias_correction(module)
        if correction is not None:
            correction.double()
            correction.enabled = True
    return fx.symbolic_trace(block)


def weights_of(block: nn.Module) -> list[tuple[nn.Module, WeightFakeQuantize]]:
    pairs = [(m, weight_fake_quant(m)) for m in block.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return [(m, fq) for m, fq in pairs if fq is not None]


def learning_of(
    block: nn.Module, rounding: bool = True, layout: torch.memory_format = torch.contiguous_format, called: bool = True
) -> Variables:
    """The variables of a block; where it is not known what is called, nothing is found from the outputs of layers."""
    stage = Stage('weights', StageOptions(round_weight=ROUND_WEIGHT), rounding, False)
    return Variables(block if called else nn.Identity(), weights_of(block), [], stage, layout)


def loss_of(block: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 6, 6, generator=generator, dtype=torch.float64)
    return (block(x) - torch.randn(3, 5, generator=generator, dtype=torch.float64)).square().sum()


def soft_values(fake_quant: WeightFakeQuantize, weight: Tensor, alpha: Tensor | None) -> Tensor:
    """The quantized weight by autograd's own operations: soft of a variable, else that of the integers."""
    qtype, shape = fake_quant.qtype, [-1 if fake_quant.scale.dim() else 1] + [1] * (weight.dim() - 1)
    scale, zero = fake_quant.scale.reshape(shape), fake_quant.zero_point.double().reshape(shape)
    if alpha is None:
        return (fake_quant.codes.double() - zero) * scale
    low = torch.floor(weight / scale) + zero
    h = torch.clamp(torch.sigmoid(alpha) * 1.2 - 0.1, 0, 1) * ((low >= qtype.quant_min) & (low < qtype.quant_max))
    return (low.clamp(qtype.quant_min, qtype.quant_max) - zero + h) * scale


def by_autograd(rounding: type[WeightFakeQuantize], learn: bool, beta: float | None) -> dict[str, Tensor]:
    """Gradients of rounding, gains and offsets, each as one vector."""
    block, alphas, gains = block_of(rounding), [], []
    for module, fake_quant in weights_of(block):
        weight, alpha = original_weight(module), None
        gains.append(torch.ones([len(weight)] + [1] * (weight.dim() - 1), dtype=torch.float64))
        if not fake_quant.scale.dim():
            gains[-1] = torch.ones((), dtype=torch.float64)
        if learn and rounding is AdaRound:
            fraction = weight / fake_quant.scale.reshape(gains[-1].shape)
            alpha = -torch.log(1.2 / (fraction - fraction.floor() + 0.1) - 1)
            alphas.append(alpha.requires_grad_(True))
        fake_quant.learned = soft_values(fake_quant, weight, alpha) * gains[-1].requires_grad_(True)
    offsets = [c.offset.requires_grad_(True) for m, _ in weights_of(block) if (c := bias_correction(m)) is not None]
    total = loss_of(block)
    if beta is not None:
        for alpha in alphas:
            h = torch.clamp(torch.sigmoid(alpha) * 1.2 - 0.1, 0, 1)
            total = total + ROUND_WEIGHT * (1 - (2 * h - 1).abs() ** beta).sum()
    total.backward()
    groups = {'alphas': alphas, 'gains': gains, 'offsets': offsets}
    return {name: _vector([p.grad for p in parameters]) for name, parameters in groups.items()}  # type: ignore[misc]


def _vector(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]) if tensors else torch.zeros(0)


@pytest.mark.parametrize('called', [True, False], ids=['called', 'unknown'])
@pytest.mark.parametrize('beta', [None, BETA])
@pytest.mark.parametrize(
    ('rounding', 'learn'), [(AdaRound, True), (AdaRound, False), (NearestRounding, True)], ids=['soft', 'hard', 'fixed']
)
def test_gradients_are_those_of_autograd(rounding: Any, learn: bool, beta: float | None, called: bool) -> None:
    expected = by_autograd(rounding, learn, beta)
    block = block_of(rounding)
    weights = learning_of(block, learn, called=called)
    with weights.in_force():
        loss_of(block).backward()
        weights.collect_gradients(beta)
    for name, gradient in expected.items():
        ours = _vector([p.grad for p in getattr(weights, name)])
        torch.testing.assert_close(ours, gradient, rtol=1e-7, atol=1e-9)


def test_channels_innermost_change_no_gradient() -> None:
    gradients: list[list[Any]] = []
    for layout in (torch.contiguous_format, torch.channels_last):
        block = block_of(AdaRound)
        weights = learning_of(block, layout=layout)
        with weights.in_force():
            assert weights_of(block)[0][0].weight.is_contiguous(memory_format=layout)
            loss_of(block).backward()
            weights.collect_gradients(BETA)
        assert all(a.is_contiguous(memory_format=layout) for a in weights.alphas if a.dim() == 4)
        gradients.append([alpha.grad for alpha in weights.alphas])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.skipif(kernels() is None, reason='there is no C compiler')
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_compiled_kernels_change_no_gradient(monkeypatch: pytest.MonkeyPatch, layout: torch.memory_format) -> None:
    results = []
    for disabled in (set(), {'soft_weight', 'rounding_gradient'}):
        monkeypatch.setattr('mmbrecq.kernels.native.DISABLED', disabled)
        block = block_of(AdaRound).float()
        weights = learning_of(block, layout=layout)
        move(weights)
        weights.update()
        x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1))
        with weights.in_force():
            block(x).square().sum().backward()
            weights.collect_gradients(BETA)
            results.append([m.weight.detach().clone() for m, _ in weights_of(block)])
        results[-1] += [p.grad for p in (*weights.alphas, *weights.gains, *weights.offsets)]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(params=[AdaRound, NearestRounding])
def learning(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, Variables]]:
    block = block_of(request.param)
    yield block, learning_of(block)


def move(weights: Variables) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in (*weights.alphas, *weights.gains, *weights.offsets):
        parameter.data.add_(0.3 * torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype))


def test_an_update_takes_over_what_was_learned(learning: tuple[nn.Module, Variables]) -> None:
    """The tensors in force are the values of the formulas."""
    block, weights = learning
    move(weights)
    pairs, alphas = weights_of(block), weights.alphas or [None] * len(weights.gains)
    values = [soft_values(fq, original_weight(m), a).detach() for (m, fq), a in zip(pairs, alphas, strict=True)]
    expected = [value * gain.detach() for value, gain in zip(values, weights.gains, strict=True)]
    with weights.in_force():
        before = [m.weight.detach().clone() for m, _ in weights_of(block)]
        weights.update()
        for module, old, new in zip((m for m, _ in weights_of(block)), before, expected, strict=True):
            torch.testing.assert_close(module.weight.detach(), new)
            assert not torch.equal(old, new)


def test_everything_is_let_go(learning: tuple[nn.Module, Variables]) -> None:
    block, weights = learning
    with pytest.raises(ZeroDivisionError), weights.in_force():
        assert all(fq.learned is not None for _, fq in weights_of(block))
        raise ZeroDivisionError
    for module, fq in weights_of(block):
        correction = bias_correction(module)
        assert fq.learned is None
        assert correction is None or correction.learned is None
        assert not module._forward_hooks
    weights.finish()
    assert not any(list(fq.parameters()) for _, fq in weights_of(block))


def test_the_gain_ends_in_the_scale() -> None:
    """The integers stay; the scale keeps eight significant bits."""
    block = block_of(NearestRounding).float()
    weights = learning_of(block)
    pairs = weights_of(block)
    before = [(fq.codes.clone(), fq.scale.clone()) for _, fq in pairs]
    factors = [0.5 + torch.rand(g.shape, generator=torch.Generator().manual_seed(6)) for g in weights.gains]
    for gain, factor in zip(weights.gains, factors, strict=True):
        gain.data.copy_(factor)
    weights.finish()
    for (_, fq), (codes, scale), factor in zip(pairs, before, factors, strict=True):
        torch.testing.assert_close(fq.scale, scale * factor.reshape(scale.shape), rtol=2**-8, atol=0)
        assert torch.equal(fq.scale, fq.scale.bfloat16().float()) and torch.equal(fq.codes, codes)


def test_a_layer_that_is_not_called_keeps_its_rounding() -> None:
    block = block_of(AdaRound)
    weights = learning_of(block, called=False)
    with weights.in_force():
        block.plain(torch.randn(1, 4, 2, 2, dtype=torch.float64)).sum().backward()  # type: ignore[operator]
        weights.collect_gradients(None)
    first, second = (alpha.grad for alpha in weights.alphas[:2])
    assert first is not None and not first.any()
    assert second is not None and second.any()


@pytest.mark.parametrize('t', [0, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])
def test_half_a_cosine(t: float) -> None:
    assert cosine(t) == pytest.approx(math.cos(math.pi * t / 2) ** 2)


def test_cosine_stays_at_zero() -> None:
    assert cosine(1.0) == pytest.approx(0, abs=1e-15)
    assert cosine(1.7) == pytest.approx(0, abs=1e-15)
