from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import HSwish, Swish
from small_models import conv, images, net
from torch import Tensor, fx, nn

from mmbrecq.graph.roles import Roles
from mmbrecq.graph.symbolic import operation
from mmbrecq.graph.traced_graph import trace_image_graph


def last_node(function: Any, **modules: nn.Module) -> tuple[Roles, fx.Node]:
    """The node whose value is the output of ``function``, behind a convolution; a gain has either sign."""
    model = net(lambda self, x: function(self, self.conv(x)), conv=conv(), **modules)
    model.backbone.gain = nn.Parameter(torch.linspace(-1, 1, 4).view(4, 1, 1))
    model.backbone.positive = nn.Parameter(torch.ones(4, 1, 1))
    traced = trace_image_graph(model, images(2))
    roles = Roles(model, traced.graph)
    output = next(n for n in traced.graph.nodes if n.op == 'output')
    return roles, output.all_input_nodes[0]


class ReLU(nn.Module):
    """A stranger's, with a name of torch."""


@pytest.mark.parametrize(
    ('kind', 'target', 'module', 'name'),
    [
        ('call_module', 'pool', nn.MaxPool2d(2), 'maxpool2d'), ('call_function', F.max_pool2d, None, 'maxpool2d'),
        ('call_function', operator.truediv, None, 'div'), ('call_function', torch.div, None, 'div'),
        ('call_method', 'div', None, 'div'), ('call_module', 'act', nn.ReLU(), 'relu'),
        ('call_module', 'relu', ReLU(), ''), ('get_attr', 'relu', None, ''),
    ],
)  # fmt: skip
def test_an_operation_has_one_name(kind: str, target: Any, module: nn.Module | None, name: str) -> None:
    assert operation(fx.Graph().create_node(kind, target), module) == name


class _Named(nn.Conv2d):
    """Named for nothing in particular."""


@pytest.mark.parametrize(
    ('module', 'weighted'),
    [
        (conv(4, 2), True), (_Named(4, 2, 1), True), (nn.ConvTranspose2d(4, 2, 1), True), (nn.Linear(32, 2), True),
        (nn.BatchNorm2d(4), False), (nn.ReLU(), False), (nn.PReLU(), False),
    ],
)  # fmt: skip
def test_weighted_layers(module: nn.Module, weighted: bool) -> None:
    roles, node = last_node(lambda self, x: self.m(x + 0.0), m=module)
    assert roles.is_weighted(node) == weighted


@pytest.mark.parametrize(
    ('function', 'is_add'),
    [
        (lambda self, x: x + x.abs(), True),
        (lambda self, x: torch.add(x, x.abs()), True),
        (lambda self, x: x.add(x.abs()), True),
        (lambda self, x: x + 1.0, False),
        (lambda self, x: x * x.abs(), False),
        (lambda self, x: x - x.abs(), False),
    ],
)
def test_additions_of_two_feature_maps(function: Any, is_add: bool) -> None:
    roles, node = last_node(function)
    assert roles.is_add(node) == is_add


@pytest.mark.parametrize(
    ('function', 'expected'),
    [
        (lambda self, x: F.relu(x), True),
        (lambda self, x: torch.relu(x), True),
        (lambda self, x: x.sigmoid(), True),
        (lambda self, x: F.silu(x), True),
        (lambda self, x: self.m(x), True),
        (lambda self, x: self.swish(x), True),
        (lambda self, x: self.hswish(x), True),
        (lambda self, x: x.abs(), False),
        (lambda self, x: F.avg_pool2d(x, 2), False),
        (lambda self, x: self.pool(x), False),
    ],
)
def test_activation_functions(function: Any, expected: bool) -> None:
    roles, node = last_node(function, m=nn.GELU(), swish=Swish(), hswish=HSwish(), pool=nn.MaxPool2d(2))
    assert roles.is_activation(node) == expected


@pytest.mark.parametrize(
    ('function', 'expected'),
    [
        (lambda self, x: self.pool(x), True),
        (lambda self, x: x.flatten(1), True),
        (lambda self, x: x.view(x.size(0), -1), True),
        (lambda self, x: torch.cat([x, x.abs()], 1), True),
        (lambda self, x: x[:, 1:], True),
        (lambda self, x: x.permute(0, 2, 3, 1), True),
        (lambda self, x: F.max_pool2d(x, 2), True),
        (lambda self, x: F.avg_pool2d(x, 2), False),
        (lambda self, x: self.average(x), False),
        (lambda self, x: x + x.abs(), False),
        (lambda self, x: F.relu(x), False),
        (lambda self, x: self.upsample(x), True),
        (lambda self, x: self.bilinear(x), False),
        (lambda self, x: F.interpolate(x, scale_factor=2), True),
        (lambda self, x: F.interpolate(x, size=(4, 4), mode='nearest'), True),
        (lambda self, x: F.interpolate(x, (4, 4), None, 'nearest-exact'), True),
        (lambda self, x: F.interpolate(x, (4, 4), None, 'bilinear'), False),
        (lambda self, x: F.interpolate(x, size=(4, 4), mode='bicubic'), False),
    ],
)
def test_moves_leave_values_on_their_grid(function: Any, expected: bool) -> None:
    resizes = {'upsample': nn.Upsample(scale_factor=2), 'bilinear': nn.Upsample(scale_factor=2, mode='bilinear')}
    roles, node = last_node(function, pool=nn.MaxPool2d(2), average=nn.AvgPool2d(2), **resizes)
    assert roles.moves_only(node) == expected


@pytest.mark.parametrize(
    ('function', 'expected'),
    [
        (lambda self, x: F.relu(x), True),
        (lambda self, x: self.relu6(x), True),
        (lambda self, x: x.sigmoid(), True),
        (lambda self, x: self.pool(F.relu(x)), True),
        (lambda self, x: self.average(F.relu(x)).flatten(1), True),
        (lambda self, x: F.relu(x).mean((2, 3)), True),
        (lambda self, x: F.relu(x) + x.sigmoid(), True),
        (lambda self, x: F.relu(x) * x.sigmoid(), True),
        (lambda self, x: torch.cat([F.relu(x), x.sigmoid()], 1), True),
        (lambda self, x: x, False),
        (lambda self, x: F.silu(x), False),
        (lambda self, x: F.relu(x) + x, False),
        (lambda self, x: F.relu(x) * x, False),
        (lambda self, x: torch.cat([F.relu(x), x], 1), False),
        (lambda self, x: F.relu(x) - 1.0, False),
        (lambda self, x: self.average(x), False),
        (lambda self, x: F.relu(x) * -1.0, False),
        (lambda self, x: -1.0 * (-F.relu(x)), True),
        (lambda self, x: -F.relu(x), False),
        (lambda self, x: F.relu(x).neg(), False),
        (lambda self, x: F.relu(x) * self.gain, False),
        (lambda self, x: F.relu(x) * self.gain.abs(), True),
        (lambda self, x: F.relu(x) * self.positive, True),
        (lambda self, x: F.relu(x) + self.gain, False),
        (lambda self, x: F.relu(x) / self.positive, True),
        (lambda self, x: F.relu(x) / -2.0, False),
        (lambda self, x: F.relu(x) / self.gain, False),
        (lambda self, x: 1.0 - x.sigmoid(), True),
        (lambda self, x: 1.0 - F.relu(x), False),
        (lambda self, x: torch.sub(F.relu6(x), 6.0), False),
        (lambda self, x: F.relu6(x + 3.0) / 6.0, True),
        (lambda self, x: torch.sub(x.sigmoid(), x.sigmoid(), alpha=2), False),
        (lambda self, x: torch.add(F.relu(x), F.relu(x), alpha=-1), False),
        (lambda self, x: x.clamp(min=0), True),
        (lambda self, x: x.clamp(0.5, 2.0), True),
        (lambda self, x: torch.clamp(x, max=2.0), False),
        (lambda self, x: torch.clamp(F.relu(x), max=-1.0), False),
        (lambda self, x: torch.clamp(F.relu(x), max=self.gain), False),
        (lambda self, x: torch.maximum(x, x.sigmoid()), True),
        (lambda self, x: torch.minimum(x, x.sigmoid()), False),
        (lambda self, x: x.abs().mean(1, keepdim=True), True),
        (lambda self, x: x.square(), True),
        (lambda self, x: x * x, True),
        (lambda self, x: x**2, True),
        (lambda self, x: x**3, False),
        (lambda self, x: x.softmax(1), True),
        (lambda self, x: F.softplus(x), True),
        (lambda self, x: F.hardswish(x), False),
        (lambda self, x: torch.tanh(F.relu(x)), False),
        (lambda self, x: self.hardtanh(x), True),
        (lambda self, x: F.pad(F.relu(x), (1, 1)), True),
        (lambda self, x: F.pad(F.relu(x), (1, 1), value=-1.0), False),
        (lambda self, x: F.interpolate(F.relu(x), scale_factor=2, mode='bilinear'), True),
        (lambda self, x: F.interpolate(F.relu(x), scale_factor=2, mode='bicubic'), False),
        (lambda self, x: torch.stack([F.relu(x), x.sigmoid()]), True),
        (lambda self, x: torch.where(x > 0, x.abs(), x), False),
    ],
)
def test_sign_is_told_from_the_operators(function: Any, expected: bool) -> None:
    modules = {'relu6': nn.ReLU6(), 'pool': nn.MaxPool2d(2), 'average': nn.AvgPool2d(2), 'hardtanh': nn.Hardtanh(0, 2)}
    roles, node = last_node(function, **modules)
    assert roles.non_negative(node) == expected
    assert not expected or bool((node.meta['example'] >= 0).all())


def test_consumers_are_found_behind_moves() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.left(self.pool(y)) + self.right(self.pool(y)[:, :2]) + F.avg_pool2d(y, 2)[:, :2]

    model = net(forward, first=conv(), pool=nn.MaxPool2d(2), left=conv(4, 2), right=conv(2, 2))
    traced = trace_image_graph(model, images(2))
    roles = Roles(model, traced.graph)
    first = next(n for n in traced.graph.nodes if n.target == 'backbone.first')
    assert {str(n.target) for n in roles.consumers(first) if n.op == 'call_module'} == {
        'backbone.left', 'backbone.right'
    }  # fmt: skip
    assert {roles.operation(n) for n in roles.consumers(first)} == {'conv2d', 'avgpool2d'}


def test_only_floating_point_values_are_tensors() -> None:
    model = net(lambda self, x: self.conv(x).view(x.size(0), -1), conv=conv())
    traced = trace_image_graph(model, images(2))
    roles = Roles(model, traced.graph)
    assert [roles.is_tensor(n) for n in traced.graph.nodes if n.op in ('call_method', 'output')] == [False, True, False]
