from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import conv, images, net, run
from torch import Tensor, nn

from mmbrecq.errors import GraphError
from mmbrecq.graph.traced_graph import TracedGraph, trace_image_graph


def trace(function: Callable[[Any, Tensor], Any], **modules: nn.Module) -> tuple[Callable[[Tensor], Any], TracedGraph]:
    """The model that applies ``function`` to 8 channels of 8 x 8, untraced, and its graph."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        layers = {'first': conv(3, 8), 'last': conv(8, 4), **copy.deepcopy(modules)}
        return net(lambda self, x: self.last(function(self, self.first(x))), **layers)

    return model(), trace_image_graph(model(), images(2, size=8))


def statement(write: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        write(x)
        return x

    return forward


def _augmented(self: Any, x: Tensor) -> Tensor:
    y = x
    y += 1.0
    y *= x
    y /= 2.0
    y -= 0.5
    return x


def _assigned(self: Any, x: Tensor) -> Tensor:
    x[:, 0] = x[:, -1]
    x[:, 1:3, 2:-1] = 0.5
    x[:, [4, 6]] = x[:, 5:6] * 1.0
    x[:, ::3] *= 2.0
    x[..., 1] = torch.ones(8)
    return x


def _masked(self: Any, x: Tensor) -> Tensor:
    x[x < 0] = 0.1
    x[x > 1] *= 0.5
    return x


def _filled(self: Any, x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], x.shape[1], x.shape[2] + 2, x.shape[3])
    y[:, :, 1 : 1 + x.shape[2]] = x
    return y[:, :, 1:-1]


def _shifted(self: Any, x: Tensor) -> Tensor:
    y, part = torch.empty_like(x), x.shape[1] // 2
    y[:, :part] = x[:, part:]
    y[:, part:].copy_(x[:, :part])
    return y


def _siblings(self: Any, x: Tensor) -> Tensor:
    left, right = x[:, :5], x[:, 3:]
    left.add_(1.0)
    right.mul_(2.0)
    return torch.cat([right, left[:, :3]], 1)


def _parts(self: Any, x: Tensor) -> Tensor:
    x.chunk(4, 1)[1].neg_()
    x.split([2, 6], dim=1)[1].add_(1.0)
    x.unbind(1)[-1].mul_(3.0)
    return x


def _before_and_after(self: Any, x: Tensor) -> Tensor:
    flat = x.flatten(2)
    before = flat * 2.0
    x.exp_()
    return before.view_as(x) + flat.view_as(x)


WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    'method': statement(lambda x: x.abs_().clamp_(max=0.5)),
    'function': statement(lambda x: F.hardtanh_(torch.relu_(x), 0.1, 0.4)),
    'inplace': statement(lambda x: F.leaky_relu(F.silu(x, True), 0.2, inplace=True)),
    'out': statement(lambda x: torch.add(x, 1.0, out=x)),
    'module': lambda self, x: (self.act(x), x)[1],
    'operators': _augmented,
    'assignment': _assigned,
    'mask': _masked,
    'new tensor': _filled,
    'copy': _shifted,
    'flatten': statement(lambda x: x.flatten(1)[:, 3:].mul_(2.0)),
    'view': statement(lambda x: x.view(x.shape[0], 2, 4, 8, 8)[:, 1].fill_(0.3)),
    'permute': statement(lambda x: x.permute(0, 2, 3, 1).mul_(torch.arange(8.0))),
    'transpose': statement(lambda x: x.transpose(1, 2)[:, 2:4].zero_()),
    'select': statement(lambda x: x.select(1, -1).add_(x.narrow(1, 2, 1).squeeze(1))),
    'unsqueeze': statement(lambda x: x.unsqueeze(1).mT.detach().sub_(0.2)),
    'siblings': _siblings,
    'parts': _parts,
    'before and after': _before_and_after,
    'indices': statement(lambda x: x.index_fill_(1, torch.tensor([1, 5]), 2.0)),
}


@pytest.mark.parametrize('write', WRITES.values(), ids=WRITES)
def test_writes_have_their_effect_and_overwrite_nothing(write: Callable[[Any, Tensor], Any]) -> None:
    model, traced = trace(write, act=nn.ReLU6(inplace=True))
    assert not traced.opaque
    graph = traced.compile()
    for count in (1, 3):
        x = images(count, seed=1, size=8)
        torch.testing.assert_close(run(graph, x), run(model, x.clone()), rtol=0, atol=0)
        assert torch.equal(x, images(count, seed=1, size=8))


def test_the_values_that_a_unit_caches_are_not_overwritten() -> None:
    _, traced = trace(WRITES['siblings'])
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    class Keeps(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                kept[n.name] = (result, result.clone())
            return result

    with torch.no_grad():
        Keeps(traced.compile()).run(images(2, size=8))
    assert len(kept) > 8 and all(torch.equal(now, then) for now, then in kept.values())


class _Writes(nn.Module):
    """Cannot be traced, and writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor:
            raise TypeError('expected a tensor')
        x += 1.0
        return self.inner(x)


def test_an_opaque_module_writes_into_a_copy() -> None:
    model, traced = trace(lambda self, x: self.odd(torch.relu(x)), odd=_Writes())
    assert list(traced.opaque) == ['backbone.odd']
    (call,) = (n for n in traced.graph.nodes if n.target == 'backbone.odd')
    assert call.args[0].target == 'clone'
    torch.testing.assert_close(run(traced.compile(), images()), run(model, images()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        (lambda self, x: self.odd(x) + x, 'odd writes into its input, which is read afterwards'),
        (
            statement(lambda x: x.diagonal(dim1=2, dim2=3).zero_()),
            'write into a view by diagonal of shape .* cannot',
        ),
        (statement(lambda x: x.uniform_()), 'uniform_ writes into a tensor'),
        (lambda self, x: x + self.first.weight.mul_(2.0).sum(), 'mul_ writes into first.weight'),
        (lambda self, x: torch.zeros(2, 8, 8, 8).add_(x), r'constants to stay constant, but add_ writes into one'),
    ],
)
def test_what_cannot_be_followed_makes_the_module_opaque(function: Any, message: str) -> None:
    with pytest.raises(GraphError, match='cannot be traced: test_functionalize.py:.*' + message):
        _ = trace_image_graph(_plain(function), images(2, size=8))


def _plain(function: Callable[[Any, Tensor], Any]) -> nn.Module:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.odd = conv(3, 8), _Writes()

        def forward(self, x: Tensor) -> Any:
            return function(self, self.first(x))

    return Plain().eval()
