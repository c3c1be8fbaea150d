"""Activation functions that quantizers compute while a unit is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from mmbrecq.fake_quants import LSQ
from mmbrecq.qtype import QType
from mmbrecq.reconstruction.optimize import rectified


class Functional(nn.Module):
    """A function as a module that tracing looks into.

    Args:
        function: Of one tensor.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Block(nn.Module):
    """A layer, an activation function, a quantizer and a layer.

    Args:
        activation: The function.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.activation, self.second = nn.Linear(5, 8), activation, nn.Linear(8, 3)
        self.quantizer = LSQ(QType(3, symmetric=False, signed=False))
        self.quantizer.set_grid(torch.tensor(0.2), torch.tensor(0))
        self.quantizer.enabled = True

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.second(self.quantizer(self.activation(self.first(x)))),)


class TwoReaders(Block):
    """The activation is read twice."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        y = self.activation(self.first(x))
        return (self.second(self.quantizer(y)) + y[:, :3],)


class TwoCalls(Block):
    """The quantizer is called twice."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        y = self.quantizer(self.activation(self.first(x)))
        return (self.second(self.quantizer(y)),)


class Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, LSQ) or super().is_leaf_module(module, name)


def traced(block: nn.Module) -> fx.GraphModule:
    torch.manual_seed(0)
    for parameter in block.parameters():
        if parameter.dim() > 0:
            nn.init.normal_(parameter)
    return fx.GraphModule(block, Tracer().trace(block))


def gradients(module: nn.Module, block: Block) -> list[Tensor]:
    """The output, and the gradients of input, step size and weights."""
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    scale = block.quantizer.scale.requires_grad_(True)
    (out,) = module(x)
    wanted = [x, scale, block.first.weight, block.first.bias, block.second.weight]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]


@pytest.mark.parametrize(
    ('activation', 'bounds'),
    [
        (nn.ReLU(), (0, float('inf'))),
        (nn.ReLU6(), (0, 6)),
        (nn.Hardtanh(0, 0.7), (0, 0.7)),
        (Functional(F.relu), (0, float('inf'))),
        (Functional(torch.relu), (0, float('inf'))),
        (Functional(lambda x: x.relu()), (0, float('inf'))),
        (Functional(F.relu6), (0, 6)),
    ],
)
def test_nothing_but_the_work_changes(activation: nn.Module, bounds: tuple[float, float]) -> None:
    block = Block(activation)
    module = traced(block)
    expected = gradients(module, block)
    with rectified(module) as fused:
        assert fused is not module
        assert isinstance(fused, fx.GraphModule)
        assert len(fused.graph.nodes) == len(module.graph.nodes) - 1
        assert block.quantizer.rectifier == bounds
        found = gradients(fused, block)
    assert block.quantizer.rectifier is None
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize(
    ('kind', 'activation'),
    [
        (Block, nn.SiLU()),
        (Block, nn.Sigmoid()),
        (TwoReaders, nn.ReLU()),
        (TwoCalls, nn.ReLU()),
        (Block, nn.LeakyReLU()),
    ],
)
def test_what_stays_as_it_is(kind: Any, activation: nn.Module) -> None:
    block = kind(activation)
    module = traced(block)
    with rectified(module) as same:
        assert same is module
        assert block.quantizer.rectifier is None


def test_a_quantizer_that_is_off_computes_nothing() -> None:
    block = Block(nn.ReLU())
    block.quantizer.enabled = False
    module = traced(block)
    with rectified(module) as same:
        assert same is module


def test_a_unit_that_is_no_graph() -> None:
    block = Block(nn.ReLU())
    with rectified(block) as same:
        assert same is block


def test_it_ends_with_an_error_too() -> None:
    block = Block(nn.ReLU())
    with pytest.raises(ZeroDivisionError), rectified(traced(block)):
        raise ZeroDivisionError
    assert block.quantizer.rectifier is None
