"""Layers that compute their weight, and functions that compute a layer, against the float model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import conv, images, net, packed, prepare, run
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mmbrecq.graph.traced_graph import trace_image_graph


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.flatten(1).std(1).view(-1, 1, 1, 1), self.bias, self.stride, self.padding)


class Padded(nn.Conv2d):
    """Pads by itself, as EfficientNets do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


class LowRank(nn.Linear):
    """A linear layer with an update of low rank beside it."""

    def __init__(self) -> None:
        super().__init__(4, 6)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


class Halving(nn.Conv2d):
    """Computes what it reads before its class does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 0.5)


class WithOnes(nn.Conv2d):
    """Reads another channel beside its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, torch.ones_like(x[:, :1])], 1))


class Dynamic(nn.Conv2d):
    """Its weight depends on the image."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean(), self.bias)


class Rectified(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def parametrized() -> nn.Module:
    layer = conv(3, 6)
    nn.utils.parametrize.register_parametrization(layer, 'weight', Doubled())
    return layer


def layers_of(model: nn.Module) -> set[str]:
    """Paths of the layers that the traced graph calls; its outputs are the model's."""
    x = images(3, seed=1)
    wanted = run(model, x)
    traced = trace_image_graph(model, images(2))
    torch.testing.assert_close(run(traced.compile(), x), wanted, rtol=1e-5, atol=1e-5)
    return {path.removeprefix('backbone.') for node in traced.graph.nodes for path in node.meta.get('layers', ())}


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize(
    'build',
    [
        lambda: Standardised(3, 6, 3, padding=1), parametrized,
        lambda: parametrizations.weight_norm(conv(3, 6)), lambda: nn.utils.weight_norm(conv(3, 6)),
        lambda: parametrizations.spectral_norm(conv(3, 6)), lambda: nn.utils.spectral_norm(conv(3, 6)),
        lambda: parametrizations.weight_norm(nn.ConvTranspose2d(3, 6, 2, stride=2)),
    ],
)  # fmt: skip
def test_a_constant_weight_is_baked(build: Any) -> None:
    torch.manual_seed(0)
    model = net(lambda self, x: torch.relu(self.bn(self.layer(x))), layer=build(), bn=nn.BatchNorm2d(6))
    model.backbone.bn.running_var.uniform_(0.5, 2.0)
    assert layers_of(model.eval()) == {'layer'}
    assert type(model.backbone.layer) in (nn.Conv2d, nn.ConvTranspose2d)
    assert isinstance(model.backbone.bn, nn.Identity)


@pytest.mark.parametrize(
    ('layer', 'expected'),
    [
        (Padded(3, 6, 2), {'layer'}),
        (Rectified(3, 6, 1), {'layer.conv2d_layer'}),
        (Halving(3, 6, 1), {'layer.conv2d_layer'}),
        (WithOnes(4, 6, 1), {'layer.conv2d_layer'}),
        (Dynamic(3, 6, 1), set()),
        (LowRank(), {'layer.linear_layer', 'layer.linear_1_layer', 'layer.linear_2_layer'}),
    ],
)
def test_what_is_no_plain_layer(layer: nn.Module, expected: set[str]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.layer(x if isinstance(layer, nn.Conv2d) else x.permute(0, 2, 3, 1))

    channels = layer.weight.shape[1] - isinstance(layer, WithOnes)
    assert layers_of(net(forward, first=conv(3, channels), layer=layer)) == {'first', *expected}


def test_functions_on_weights_of_modules_and_parameters() -> None:
    """Shared or not, put together from several, transposed, on a weight of a module that is called too."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.stem.weight, self.stem.bias, padding=1).flatten(2).transpose(1, 2)
        bias = torch.cat([self.query, torch.zeros_like(self.query), self.query])
        x = F.linear(x, weight=self.qkv.weight, bias=bias)[..., :4] + self.called(x)
        x = x + F.linear(x, self.called.weight) + x @ self.gain
        return F.linear(x, torch.stack([self.gain[0], self.gain[1]])) + F.linear(x, self.gain[:2]).relu()

    model = net(forward, stem=conv(3, 4), qkv=nn.Linear(4, 12), called=nn.Linear(4, 4))
    model.backbone.gain, model.backbone.query = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
    functions = {'linear_1_layer', 'matmul_layer', 'linear_2_layer', 'linear_3_layer'}
    assert layers_of(model) == {'stem', 'qkv', 'called', *functions}


def test_the_layer_that_takes_the_place_of_another_is_listed_alone() -> None:
    model = net(lambda self, x: self.last(self.layer(x)), layer=Halving(3, 4, 1), last=conv(4, 2))
    prepared = prepare(model, 'openvino')
    found = [(layer.name, layer.float_reason) for layer in prepared.layers]
    assert found == [('backbone.layer.conv2d_layer', None), ('backbone.last', None)]


@pytest.mark.parametrize('preset', ['openvino', 'onnxruntime', 'tensorrt'])
def test_layers_that_no_input_reaches_are_constants(preset: str) -> None:
    """Swin V2 computes its position biases from a table of distances."""

    def forward(self: Any, x: Tensor) -> Tensor:
        bias = self.outer(torch.relu(self.inner(self.table)))
        return self.last(self.stem(x) + bias.t().reshape(1, 4, 1, 1))

    model = net(forward, stem=conv(), inner=nn.Linear(2, 5), outer=nn.Linear(5, 4), last=conv(4, 2))
    model.backbone.register_buffer('table', torch.tensor([[0.5, -1.0]]))
    wanted = run(model, images())
    prepared = prepare(model, preset)
    reasons = {layer.name.removeprefix('backbone.'): layer.float_reason for layer in prepared.layers}
    constant = 'it lies on no path from the images to the outputs'
    assert reasons == {'stem': None, 'inner': constant, 'outer': constant, 'last': None}
    with prepared.quantization(weights=False, activations=False):
        torch.testing.assert_close(run(prepared, images()), wanted, rtol=1e-5, atol=1e-5)


def test_two_calls_on_one_weight_are_one_layer() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.gain), self.gain)

    model = net(forward, unused=conv())
    model.backbone.gain = nn.Parameter(torch.randn(3, 3, 1, 1))
    assert layers_of(model) == {'conv2d_layer'}


def test_a_prepared_state_loads_into_a_model_that_was_prepared_alike() -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)

        def forward(self: Any, x: Tensor) -> Tensor:
            x = torch.relu(self.layer(x)).flatten(2).transpose(1, 2)
            return self.attention(F.linear(x, self.qkv.weight), x, x)[0].mean(1)

        attention = nn.MultiheadAttention(4, 2, batch_first=True)
        return net(forward, layer=Standardised(3, 4, 1), qkv=nn.Linear(4, 4), attention=attention)

    model, other = packed(build(0), 'openvino'), prepare(build(1), 'openvino')
    assert {layer.name for layer in model.layers if layer.weight_bits} >= {'backbone.layer', 'backbone.qkv'}
    assert len([layer for layer in model.layers if layer.weight_bits]) == 6
    other.pack()
    other.model.load_state_dict(model.model.state_dict(), strict=True)
    torch.testing.assert_close(run(other, images()), run(model, images()), rtol=0, atol=0)


@pytest.mark.parametrize('batch_first', [True, False])
@pytest.mark.parametrize(
    ('inputs', 'call', 'options', 'count'),
    [
        (lambda x: (x, x, x), {'need_weights': False}, {}, 2),
        (lambda x: (x, x, x), {}, {'bias': False}, 2),
        (lambda x: (x, x * 2, x * 2), {'average_attn_weights': False}, {}, 4),
        (lambda x: (x, x[..., :3], x[..., :5]), {}, {'kdim': 3, 'vdim': 5}, 4),
        (lambda x: (x, x, x), {'attn_mask': torch.triu(torch.ones(16, 16), 1).bool(), 'is_causal': True}, {}, 2),
        (lambda x: (x, x, x), {'attn_mask': torch.randn(16, 16), 'need_weights': False}, {}, 2),
    ],
)
def test_multi_head_attention_is_its_linear_layers(
    inputs: Any, call: dict[str, Any], options: dict[str, Any], count: int, batch_first: bool
) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = F.avg_pool2d(x, 8).flatten(1).unflatten(1, (16, 3)) @ torch.ones(3, 8)
            x = x if batch_first else x.transpose(0, 1)
            return tuple(out for out in self.attention(*inputs(x), **call) if out is not None)

    torch.manual_seed(0)
    model = net(lambda self, x: self.block(x), block=Attention())
    if options.get('bias', True):
        nn.init.normal_(model.backbone.block.attention.out_proj.bias)
    assert len([path for path in layers_of(model) if path.startswith('block.attention')]) == count


def test_transformer_of_torch_is_its_layers() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = net(
        lambda self, x: self.encoder(self.stem(x).flatten(2).transpose(1, 2)),
        stem=nn.Conv2d(3, 8, 8, 8), encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
    )  # fmt: skip
    assert len(layers_of(model.eval())) == 9
