"""Adam against torch's own optimizer, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmbrecq.kernels import native
from mmbrecq.reconstruction.variables import Adam


def halved(progress: float) -> float:
    return 1 - progress / 2


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """The last is larger than what one thread computes, the one before lies with its channels innermost."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (3, 1), (8, 4, 3, 3), (200, 300)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    tensors[2] = tensors[2].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(tensor) for tensor in tensors]


@pytest.mark.parametrize('disabled', [set(), {'adam'}])
def test_steps_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, disabled: set[str]) -> None:
    monkeypatch.setattr(native, 'DISABLED', disabled)
    ours, theirs = parameters(torch.float32), parameters(torch.float64)
    adam = Adam([(ours[:1], 0.01, halved), (ours[1:], 0.1, math.cos)])
    reference = torch.optim.Adam([{'params': theirs[:1]}, {'params': theirs[1:]}])
    generator = torch.Generator().manual_seed(1)
    for count in range(6):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            # a variable that takes no part in an iteration stays where it is, and another keeps its gradient
            grad = None if index == 1 and count == 2 else torch.randn(a.shape, generator=generator)
            a.grad, b.grad = grad, None if grad is None else grad.double()
        rates = (0.01 * halved(count / 6), 0.1 * math.cos(count / 6))
        for group, rate in zip(reference.param_groups, rates, strict=True):
            group['lr'] = rate
        adam.step(count / 6)
        reference.step()
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        # torch counts the steps of each variable, the kernel those of all
        if index != 1 or disabled:
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_gradients_of_another_order_in_memory() -> None:
    (weight,) = (nn.Parameter(torch.zeros(2, 3)) for _ in range(1))
    adam = Adam([([weight], 0.5, lambda progress: 1.0)])
    weight.grad = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]).t()
    adam.step(0.0)
    # the first step of Adam is the sign of the gradient
    torch.testing.assert_close(weight.data, torch.tensor([[-0.5, 0.5, -0.5], [0.5, -0.5, -0.5]]))
