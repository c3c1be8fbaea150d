from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import conv, images, net, run
from torch import Tensor, nn

from mmbrecq.graph.traced_graph import trace_image_graph


class FlatLinear(nn.Module):
    """A linear layer over the pixels' means, with a BatchNorm of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(3, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x.mean((2, 3))))


@pytest.mark.parametrize(
    'modules',
    [
        {'layer': conv(3, 6), 'bn': nn.BatchNorm2d(6)},
        {'layer': conv(3, 6, bias=False), 'bn': nn.BatchNorm2d(6, eps=0.1)},
        {'layer': conv(3, 6, groups=3, bias=False), 'bn': nn.BatchNorm2d(6)},
        {'layer': nn.ConvTranspose2d(3, 6, 2, stride=2, bias=False), 'bn': nn.BatchNorm2d(6)},
        {'layer': nn.ConvTranspose2d(3, 6, 2, stride=2, groups=3), 'bn': nn.BatchNorm2d(6)},
        {'layer': conv(3, 6), 'bn': nn.BatchNorm2d(6, affine=False)},
    ],
)
def test_folded_batch_norm_equals_float(modules: dict[str, nn.Module]) -> None:
    model = net(lambda self, x: torch.relu(self.bn(self.layer(x))), **modules)
    x = images()
    wanted = run(model, x)
    traced = trace_image_graph(model, images(2))
    assert traced.folded == ['backbone.layer']
    assert isinstance(model.backbone.bn, nn.Identity)
    assert 'backbone.bn' not in {n.target for n in traced.graph.nodes}
    torch.testing.assert_close(run(traced.compile(), x), wanted, rtol=1e-5, atol=1e-6)


def test_folded_batch_norm_of_a_linear_layer_equals_float() -> None:
    model = net(lambda self, x: self.flat(x), flat=FlatLinear())
    wanted = run(model, images())
    traced = trace_image_graph(model, images(2))
    assert traced.folded == ['backbone.flat.fc']
    torch.testing.assert_close(run(traced.compile(), images()), wanted, rtol=1e-5, atol=1e-6)


def test_folded_weight_and_bias_are_the_closed_form() -> None:
    layer, norm = conv(3, 6), nn.BatchNorm2d(6, eps=0.01)
    model = net(lambda self, x: self.bn(self.layer(x)), layer=layer, bn=norm)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    factor = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + 0.01)
    trace_image_graph(model, images(2))
    wanted = (bias - norm.running_mean.double()) * factor + norm.bias.detach().double()
    torch.testing.assert_close(layer.weight.detach(), (weight * factor[:, None, None, None]).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.bias.detach(), wanted.float(), rtol=1e-6, atol=1e-8)


def _twice_read(self: Any, x: Tensor) -> Tensor:
    y = self.layer(x)
    return self.bn(y) + y


@pytest.mark.parametrize(
    ('function', 'norm'),
    [
        (_twice_read, nn.BatchNorm2d(3)),
        (lambda self, x: self.bn(self.layer(self.layer(x))), nn.BatchNorm2d(3)),
        (lambda self, x: self.bn(self.layer(self.bn(x))), nn.BatchNorm2d(3)),
        (lambda self, x: self.layer(self.bn(x)), nn.BatchNorm2d(3)),
        (lambda self, x: self.bn(torch.relu(self.layer(x))), nn.BatchNorm2d(3)),
        (lambda self, x: self.bn(self.layer(x)), nn.BatchNorm2d(3, track_running_stats=False)),
        (lambda self, x: self.bn(self.layer(x)), nn.InstanceNorm2d(3)),
    ],
    ids=['read twice', 'layer called twice', 'norm called twice', 'norm first', 'relu between', 'no stats', 'instance'],
)
def test_what_cannot_be_folded_stays(function: Any, norm: nn.Module) -> None:
    model = net(function, layer=conv(3, 3), bn=norm)
    wanted = run(model, images())
    traced = trace_image_graph(model, images(2))
    assert traced.folded == []
    assert model.backbone.bn is norm
    torch.testing.assert_close(run(traced.compile(), images()), wanted, rtol=0, atol=0)


def _iadd(self: Any, x: Tensor) -> Tensor:
    x += 1.0
    x *= 2.0
    x -= 0.5
    return self.layer(x)


@pytest.mark.parametrize(
    'function',
    [
        _iadd,
        lambda self, x: self.layer(F.relu(x, inplace=True)),
        lambda self, x: self.layer(self.relu(x)),
        lambda self, x: self.layer(x.relu_()),
        lambda self, x: self.layer(x.clamp_(0, 1).add_(1.0)),
    ],
    ids=['operators', 'function', 'module', 'method', 'methods'],
)
def test_nothing_is_overwritten(function: Any) -> None:
    model = net(function, layer=conv(3, 3), relu=nn.ReLU(inplace=True))
    wanted = run(model, images())
    traced = trace_image_graph(model, images(2)).compile()
    x = images()
    torch.testing.assert_close(run(traced, x), wanted, rtol=0, atol=0)
    assert torch.equal(x, images())


def test_identities_of_evaluation_are_dropped() -> None:
    model = net(
        lambda self, x: self.last(self.dropout(self.identity(self.layer(x)))),
        layer=conv(3, 3), identity=nn.Identity(), dropout=nn.Dropout(0.9), last=conv(3, 2),
    )  # fmt: skip
    wanted = run(model, images())
    traced = trace_image_graph(model.train(), images(2))
    assert [n.target for n in traced.graph.nodes if n.op == 'call_module'] == ['backbone.layer', 'backbone.last']
    torch.testing.assert_close(run(traced.compile(), images()), wanted, rtol=0, atol=0)


def test_identity_frees_a_batch_norm_for_folding() -> None:
    model = net(
        lambda self, x: self.bn(self.identity(self.layer(x))),
        layer=conv(3, 3), identity=nn.Identity(), bn=nn.BatchNorm2d(3),
    )  # fmt: skip
    wanted = run(model, images())
    traced = trace_image_graph(model, images(2))
    assert traced.folded == ['backbone.layer']
    torch.testing.assert_close(run(traced.compile(), images()), wanted, rtol=1e-5, atol=1e-6)
