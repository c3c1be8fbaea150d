from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import calibrate, conv, images, net, relative_error, run
from torch import Tensor, nn

from mmbrecq.deploy.backends import DeployedModel
from mmbrecq.deploy.exporters import ONNXExporter, OpenVINOExporter
from mmbrecq.errors import GraphError
from mmbrecq.graph.traced_graph import trace_image_graph
from mmbrecq.presets import PRESETS
from mmbrecq.quantizers import BRECQQuantizer


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
    assert isinstance(model.backbone.bn, nn.Identity)
    assert 'backbone.bn' not in {n.target for n in traced.graph.nodes}
    torch.testing.assert_close(run(traced.compile(), x), wanted, rtol=1e-5, atol=1e-6)


def test_folded_batch_norm_of_a_linear_layer_equals_float() -> None:
    model = net(lambda self, x: self.flat(x), flat=FlatLinear())
    wanted = run(model, images())
    traced = trace_image_graph(model, images(2))
    assert isinstance(model.backbone.flat.bn, nn.Identity)
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


def _parts(self: Any, x: Tensor) -> Tensor:
    return torch.cat([self.a(x), torch.cat([self.b(x), self.c(x)], -3)], dim=1)


@pytest.mark.parametrize(
    ('index', 'layers'),
    [
        ((slice(None), slice(0, 2)), 'a'),
        ((slice(None), 1), 'a'),
        ((slice(None), -1), 'c'),
        ((slice(None), 4), 'c'),
        ((slice(None), slice(2, 3)), 'b'),
        ((slice(None), slice(None, None, 9), slice(None, None, 2)), 'a'),
        ((slice(None), slice(-3, None, 2)), 'c'),
        ((slice(None), slice(4, -1)), 'c'),
        ((slice(None), slice(-9, -5)), 'a'),
        ((slice(None), slice(-9, -6)), 'a'),
        # the whole of the second concatenation
        ((slice(None), slice(2, None)), 'bc'),
        ((slice(None), slice(1, 3)), 'abc'),
        ((slice(None), slice(3, 3)), 'abc'),
        ((..., 0), 'abc'),
        (1, 'abc'),
    ],
)
def test_an_index_of_a_concatenation_reads_the_part_that_it_reaches(index: Any, layers: str) -> None:
    model = net(lambda self, x: _parts(self, x)[index], a=conv(3, 2), b=conv(3, 1), c=conv(3, 4))
    wanted = run(model, images())
    traced = trace_image_graph(model, images(2))
    torch.testing.assert_close(run(traced.compile(), images()), wanted, rtol=1e-5, atol=1e-6)
    assert ''.join(str(n.target)[-1] for n in traced.graph.nodes if n.op == 'call_module') == layers


@pytest.mark.parametrize(('index', 'layers'), [(1, 'b'), (-1, 'c'), ((0, 1), 'a'), (slice(1), 'abc')])
def test_an_index_of_a_stack_reads_one_of_its_values(index: Any, layers: str) -> None:
    model = net(
        lambda self, x: torch.stack([self.a(x), self.b(x), self.c(x)])[index], a=conv(), b=conv(), c=conv()
    )  # fmt: skip
    wanted = run(model, images(2))
    traced = trace_image_graph(model, images(2))
    torch.testing.assert_close(run(traced.compile(), images(2)), wanted, rtol=1e-5, atol=1e-6)
    assert ''.join(str(n.target)[-1] for n in traced.graph.nodes if n.op == 'call_module') == layers


def test_an_index_of_a_concatenation_of_what_was_split_stays() -> None:
    model = net(lambda self, x: torch.cat(self.layer(x).chunk(3, 1), 2)[:, :, :8], layer=conv(3, 6))
    wanted = run(model, images())
    torch.testing.assert_close(run(trace_image_graph(model, images(2)).compile(), images()), wanted)


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
        (lambda self, x: self.bn(self.layer(x)), nn.InstanceNorm2d(3)),
    ],
    ids=['read twice', 'layer called twice', 'norm called twice', 'norm first', 'relu between', 'instance'],
)
def test_what_cannot_be_folded_stays(function: Any, norm: nn.Module) -> None:
    model = net(function, layer=conv(3, 3), bn=norm)
    wanted = run(model, images())
    traced = trace_image_graph(model, images(2))
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
    assert isinstance(model.backbone.bn, nn.Identity)
    torch.testing.assert_close(run(traced.compile(), images()), wanted, rtol=1e-5, atol=1e-6)


def normalised(norm: nn.Module) -> nn.Module:
    """``norm`` with statistics and an affine map other than 0 and 1."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    return norm


def _in_rows(self: Any, tokens: Tensor) -> Tensor:
    return self.bn(tokens.flatten(0, -2)).reshape_as(tokens)


@pytest.mark.parametrize(
    ('function', 'modules', 'is_folded'),
    [
        # tokens (N, 4, 4): the BatchNorm owns the tokens, the linear layer the channels
        (
            lambda self, x: self.bn(self.fc(self.conv(x).mean(2))), {'fc': nn.Linear(8, 8), 'bn': nn.BatchNorm1d(4)},
            False,
        ),
        (lambda self, x: self.bn(self.fc(self.conv(x))), {'fc': nn.Linear(8, 8), 'bn': nn.BatchNorm2d(4)}, False),
        (lambda self, x: self.bn(self.fc(x.mean((2, 3)))), {'fc': nn.Linear(3, 4), 'bn': nn.BatchNorm1d(4)}, True),
        (lambda self, x: self.bn(self.one(x.mean(2))), {'one': nn.Conv1d(3, 4, 3), 'bn': nn.BatchNorm1d(4)}, True),
        (lambda self, x: self.bn(self.conv(x)) + self.bn(self.two(x)), {'two': conv(), 'bn': nn.BatchNorm2d(4)}, False),
        (lambda self, x: self.bn(self.conv(x)) + self.conv(x), {'bn': nn.BatchNorm2d(4)}, False),
        (lambda self, x: self.bn(self.conv(x)) + self.conv(x * 2), {'bn': nn.BatchNorm2d(4)}, False),
        (lambda self, x: self.bn(self.conv(x)) * self.conv.weight.mean(), {'bn': nn.BatchNorm2d(4)}, False),
        (lambda self, x: self.bn(torch.relu(self.conv(x))), {'bn': nn.BatchNorm2d(4)}, False),
        # LeViT brings its tokens to rows, and back to the shape that they had
        (lambda self, x: _in_rows(self, self.fc(x)), {'fc': nn.Linear(8, 6), 'bn': nn.BatchNorm1d(6)}, True),
        (lambda self, x: self.bn(self.fc(x).reshape(-1, 3)), {'fc': nn.Linear(8, 6), 'bn': nn.BatchNorm1d(3)}, False),
        (lambda self, x: self.bn(self.conv(x).flatten(0, 2)), {'bn': nn.BatchNorm1d(8)}, False),
    ],
)  # fmt: skip
def test_only_the_batch_norm_of_the_output_channels_is_folded(
    function: Any, modules: dict[str, nn.Module], is_folded: bool
) -> None:
    model = net(function, conv=conv(), **modules)
    normalised(model.backbone.bn)
    x = images(3, size=8)
    wanted = run(model, x)
    traced = trace_image_graph(model, images(2, size=8))
    assert isinstance(model.backbone.bn, nn.Identity) == is_folded
    torch.testing.assert_close(run(traced.compile(), x), wanted, rtol=1e-5, atol=1e-5)


def test_a_layer_with_the_same_weight_keeps_it() -> None:
    model = net(lambda self, x: self.bn(self.conv(x)) + self.other(x), conv=conv(), other=conv(), bn=nn.BatchNorm2d(4))
    model.backbone.other.weight = model.backbone.conv.weight
    normalised(model.backbone.bn)
    wanted = run(model, images())
    traced = trace_image_graph(model, images(2))
    assert isinstance(model.backbone.bn, nn.Identity)
    torch.testing.assert_close(run(traced.compile(), images()), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ('function', 'owner'),
    [
        (lambda self, x: self.bn(self.conv(x)), 'backbone.bn'),
        (lambda self, x: F.batch_norm(self.conv(x), None, None, training=True), 'backbone'),
    ],
)
def test_statistics_of_the_batch_are_refused(function: Any, owner: str) -> None:
    model = net(function, conv=conv(), bn=nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(
        GraphError, match=f"^expected the BatchNorm of '{owner}' to have running statistics, but it norm"
    ):
        trace_image_graph(model, images(2))


@pytest.mark.parametrize(('preset', 'affine'), [*((preset, True) for preset in PRESETS), ('onnxruntime', False)])
def test_a_batch_norm_that_stays_is_exported(tmp_path: Path, preset: str, affine: bool) -> None:
    """Between a convolution and a rectifier, shared by two convolutions, and over tokens, with a gain or without."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x))) + torch.relu(self.bn(self.other(x)))
        tokens = self.tokens(self.proj(self.last(y).mean(2)))
        # the axes of what an index leaves have no size in the file
        return self.fc(self.scores(torch.cat([tokens.flatten(1), tokens.flatten(1)], 1)[:, torch.arange(32)]))

    model = net(
        forward, conv=conv(), other=conv(), bn=normalised(nn.BatchNorm2d(4)), last=conv(4, 4), proj=nn.Linear(8, 8),
        tokens=normalised(nn.BatchNorm1d(4, affine=affine)),
        scores=normalised(nn.BatchNorm1d(32, affine=affine)), fc=nn.Linear(32, 5),
    )  # fmt: skip
    example, x = images(2, size=8), images(5, seed=1, size=8)
    prepared = BRECQQuantizer({'bits': 8}, {'bits': 8}, preset).prepare(model.eval(), example)
    calibrate(prepared, [images(8, size=8)]).pack()
    exporter = OpenVINOExporter() if preset == 'openvino' else ONNXExporter()
    deployed = DeployedModel(prepared.model, exporter.export(prepared.image_graph, example, tmp_path))
    assert relative_error(deployed.image_backend(x)[0], run(prepared, x)) < 1e-2
