"""Adam by compiled kernels against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmbrecq.kernels.native import kernels
from mmbrecq.reconstruction.adam import Group, NativeAdam, TorchAdam, build_adam
from mmbrecq.reconstruction.schedules import constant, cosine

needs_compiler = pytest.mark.skipif(kernels() is None, reason='there is no C compiler')
SHAPES: list[list[tuple[int, ...]]] = [[(50_000,)], [(4, 1, 1, 1), (), (7,)], [(3, 5)]]


def groups() -> list[Group]:
    generator = torch.Generator().manual_seed(0)
    rates = [(0.1, constant), (0.02, cosine), (0.3, cosine)]
    return [
        ([nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes], lr, schedule)
        for shapes, (lr, schedule) in zip(SHAPES, rates, strict=True)
    ]


def parameters(of: list[Group]) -> list[nn.Parameter]:
    return [parameter for members, _, _ in of for parameter in members]


def run(adam: TorchAdam | NativeAdam, of: list[Group], left_out: int | None = None) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        adam.begin(step / 5)
        for index, parameter in enumerate(parameters(of)):
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if index == left_out else grad
        adam.step()


@needs_compiler
@pytest.mark.parametrize('left_out', [None, 0, 2], ids=str)
def test_steps_are_those_of_torch(left_out: int | None) -> None:
    ours, reference = groups(), groups()
    adam = build_adam(ours)
    assert isinstance(adam, NativeAdam)
    run(adam, ours, left_out)
    # torch's has no part in ours: its own rates and moments
    plain = torch.optim.Adam([{'params': members, 'lr': lr} for members, lr, _ in reference], fused=False)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        for group, (_, lr, schedule) in zip(plain.param_groups, reference, strict=True):
            group['lr'] = lr * schedule(step / 5)
        for index, parameter in enumerate(parameters(reference)):
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if index == left_out else grad
        plain.step()
    for parameter, expected in zip(parameters(ours), parameters(reference), strict=True):
        torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=1e-5, atol=1e-6)


@needs_compiler
def test_gradients_may_lie_in_memory_in_any_way() -> None:
    values = nn.Parameter(torch.zeros(2, 3))
    adam = build_adam([([values], 0.5, constant)])
    adam.begin(0.0)
    values.grad = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]).t()
    adam.step()
    # a first step of Adam is the learning rate, against the sign of the gradient
    assert values.tolist() == [pytest.approx([-0.5, 0.5, -0.5]), pytest.approx([0.5, -0.5, -0.5])]


@needs_compiler
def test_a_parameter_may_step_ahead() -> None:
    ours = groups()
    adam = build_adam(ours)
    adam.begin(0.0)
    ahead = adam.ahead(ours[0][0][0])
    assert ahead is not None
    (mean, square), step = ahead
    assert mean.shape == square.shape == (50_000,)
    # 0.1 over 1 - 0.9
    assert step.rate == pytest.approx(1.0)
    assert adam.ahead(nn.Parameter(torch.zeros(3))) is None
    before = ours[0][0][0].detach().clone()
    # whoever stepped ahead leaves no gradient
    adam.step()
    assert torch.equal(ours[0][0][0].detach(), before)


def test_other_kinds_of_parameters_are_left_to_torch() -> None:
    values = nn.Parameter(torch.ones(3, dtype=torch.float64))
    adam = build_adam([([values], 0.5, constant)])
    assert isinstance(adam, TorchAdam)
    adam.begin(0.0)
    assert adam.ahead(values) is None
    values.grad = torch.ones_like(values)
    adam.step()
    assert values.detach().tolist() == pytest.approx([0.5] * 3)
