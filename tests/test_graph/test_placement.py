from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import classifier, conv, images, net, relative_error, residual, run
from torch import Tensor, nn

from mmbrecq.fake_quants.ops import UNBOUNDED
from mmbrecq.graph.placement import QuantizerPosition, find_positions
from mmbrecq.graph.roles import Roles
from mmbrecq.graph.traced_graph import trace_image_graph
from mmbrecq.presets import PRESETS
from mmbrecq.qtype import QType
from mmbrecq.quantizers import BRECQQuantizer


def places(model: nn.Module, preset: str) -> list[QuantizerPosition]:
    traced = trace_image_graph(model, images(2))
    return find_positions(Roles(model, traced.graph), PRESETS[preset])


def targets(found: list[QuantizerPosition]) -> list[str]:
    """The producers, modules by their last name and functions by their node's."""
    return [
        '+'.join(str(n.target).removeprefix('backbone.') if n.op == 'call_module' else n.name for n in place.nodes)
        for place in found
    ]


BY_CHANNEL = {'openvino', 'onnxruntime', 'tensorrt'}

BEFORE_LAYERS = ['inputs', 'stem_relu', 'relu1', 'out_relu', 'gap']


@pytest.mark.parametrize(
    ('preset', 'expected'),
    [
        ('academic', BEFORE_LAYERS),
        ('openvino', BEFORE_LAYERS),
        # the runtime computes an integer convolution only where its output is quantized
        ('onnxruntime', ['inputs', 'stem_relu', 'relu1', 'conv2', 'down', 'out_relu', 'gap']),
        # of the two convolutions that meet in the add, the one on the shortcut
        ('tensorrt', ['inputs', 'stem_relu', 'relu1', 'down', 'out_relu', 'gap']),
    ],
)
def test_residual_block(preset: str, expected: list[str]) -> None:
    found = places(residual(), preset)
    assert targets(found) == expected
    assert len({place.name for place in found}) == len(found)


@pytest.mark.parametrize('preset', PRESETS)
def test_what_is_computed_from_grids_alone_has_a_full_scale(preset: str) -> None:
    """The add is, where both convolutions before it are quantized."""
    full = targets([place for place in places(residual(), preset) if place.full_scale])
    assert full == (['out_relu', 'gap'] if preset == 'onnxruntime' else ['gap'])


@pytest.mark.parametrize('preset', PRESETS)
def test_sum_of_two_activations_has_a_full_scale(preset: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        return self.last(F.silu(self.conv(x)) + x)

    model = net(forward, stem=conv(), conv=conv(4, 4), last=conv(4, 2))
    full = targets([place for place in places(model, preset) if place.full_scale])
    assert full == (['silu', 'silu_1', 'add'] if preset == 'onnxruntime' else ['add'])


def test_places_know_their_readers_and_their_sign() -> None:
    found = dict(zip(BEFORE_LAYERS, places(residual(), 'academic'), strict=True))
    readers = {name: [layer.removeprefix('backbone.') for layer in place.layers] for name, place in found.items()}
    assert readers == {
        'inputs': ['stem'], 'stem_relu': ['conv1', 'down'], 'relu1': ['conv2'], 'out_relu': [], 'gap': ['fc']
    }  # fmt: skip
    assert {name for name, place in found.items() if not place.non_negative} == {'inputs'}


@pytest.mark.parametrize('preset', PRESETS)
def test_identity_shortcut(preset: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem_relu(self.stem(x))
        return self.last(F.relu(self.conv(x) + x))

    model = net(forward, stem=conv(), stem_relu=nn.ReLU(), conv=conv(4, 4), last=conv(4, 2))
    of_the_runtime = ['conv'] if preset == 'onnxruntime' else []
    assert targets(places(model, preset)) == ['inputs', 'stem_relu', *of_the_runtime, 'relu']


@pytest.mark.parametrize(
    ('preset', 'expected'),
    [
        ('academic', ['inputs', 'silu', 'relu6']),
        ('openvino', ['inputs', 'silu', 'relu6']),
        ('onnxruntime', ['inputs', 'first', 'silu', 'relu6']),
        ('tensorrt', ['inputs', 'silu', 'relu6']),
    ],
)
def test_activation_that_a_target_does_not_fuse(preset: str, expected: list[str]) -> None:
    model = net(
        lambda self, x: self.third(self.relu6(self.second(self.silu(self.first(x))))),
        first=conv(), silu=nn.SiLU(), second=conv(4, 4), relu6=nn.ReLU6(), third=conv(4, 2),
    )  # fmt: skip
    assert targets(places(model, preset)) == expected


@pytest.mark.parametrize(
    ('preset', 'expected'),
    [
        ('academic', ['inputs', 'relu1', 'relu2']),
        ('openvino', ['inputs', 'relu1+relu2']),
        # what the layer reads has to lie on one grid, but not its parts
        ('onnxruntime', ['inputs', 'relu1', 'relu2', 'cat']),
        ('tensorrt', ['inputs', 'relu1+relu2']),
    ],
)
def test_inputs_of_a_concatenation_share_a_grid(preset: str, expected: list[str]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        left, right = self.relu1(self.conv1(x)), self.relu2(self.conv2(x))
        return self.last(torch.cat([self.pool(left), self.pool(right)], dim=1))

    model = net(
        forward, conv1=conv(), conv2=conv(), relu1=nn.ReLU(), relu2=nn.ReLU(), pool=nn.MaxPool2d(2), last=conv(8, 2)
    )
    assert targets(places(model, preset)) == expected


def test_a_concatenation_is_quantized_where_a_layer_reads_several_values() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = F.relu(self.conv1(x)), F.relu(self.conv2(x))
        inner = torch.cat([a, b], 1)
        same = torch.cat([a, F.max_pool2d(a, 3, 1, 1)], 1)
        return self.last(F.max_pool2d(torch.cat([inner, b], 1), 2)) + self.side(F.max_pool2d(same, 2))

    model = net(forward, conv1=conv(), conv2=conv(), last=conv(12, 2), side=conv(8, 2))
    found = places(model, 'onnxruntime')
    assert targets(found)[:4] == ['inputs', 'relu', 'relu_1', 'cat_2']
    assert [place.eight_bits for place in found[:4]] == [False, False, False, True]


def test_chained_concatenations_share_one_grid() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        a, b, c = F.relu(self.conv1(x)), F.relu(self.conv2(x)), self.conv3(x)
        return self.last(torch.cat([torch.cat([a, b], 1), c], 1)) + self.side(c)

    model = net(forward, conv1=conv(), conv2=conv(), conv3=conv(), last=conv(12, 2), side=conv(4, 2))
    inputs, shared = places(model, 'openvino')
    assert targets([inputs, shared]) == ['inputs', 'relu+relu_1+conv3']
    assert not shared.non_negative
    assert set(shared.layers) == {'backbone.last', 'backbone.side'}


@pytest.mark.parametrize(
    ('preset', 'expected'),
    [('openvino', [('relu+second', False)]), ('onnxruntime', [('relu', True), ('second', False), ('cat', False)])],
)
def test_rectified_and_signed_values_of_a_concatenation(preset: str, expected: list[tuple[str, bool]]) -> None:
    """ONNX Runtime computes a rectifier within its convolution only where the zero-point is 0."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.last(torch.cat([F.relu(self.first(x)), self.second(x)], 1))

    found = places(net(forward, first=conv(), second=conv(), last=conv(8, 2)), preset)
    assert list(zip(targets(found), [place.non_negative for place in found], strict=True))[1:] == expected


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('name', ['resnet', 'mobilenetv2', 'vgg'])
def test_network_outputs_stay_float_and_every_layer_reads_a_grid(preset: str, name: str) -> None:
    model = classifier(name)
    traced = trace_image_graph(model, images(2))
    roles = Roles(model, traced.graph)
    found = find_positions(roles, PRESETS[preset])
    output = next(n for n in traced.graph.nodes if n.op == 'output')
    assert not any(node in output.all_input_nodes for place in found for node in place.nodes)
    read = {layer for place in found for layer in place.layers}
    assert read == {str(n.target) for n in traced.graph.nodes if roles.is_weighted(n)}
    # a rectifier that is computed within its layer leaves scales nowhere to go
    assert preset == 'openvino' or not any(place.per_channel for place in found)


@pytest.mark.parametrize(
    ('function', 'expected'),
    [
        (lambda self, x: [self.first(y) for y in self.conv(x).unbind(2)], ['inputs', 'conv']),
        (lambda self, x: self.first(self.conv(x).select(2, 1).swapaxes(0, 1).narrow(0, 0, 4)), ['inputs', 'conv']),
        # each of several values that are computed at once has a grid of its own
        (lambda self, x: self.first(sum(torch.var_mean(self.conv(x), 2))), ['inputs', 'add_1']),
        (lambda self, x: [self.first(y) for y in torch.var_mean(self.conv(x), 2)], ['inputs', 'getitem', 'getitem_1']),
    ],
)
@pytest.mark.parametrize('preset', ['academic', 'openvino'])
def test_values_that_come_several_at_once(function: Any, expected: list[str], preset: str) -> None:
    assert targets(places(net(function, conv=conv(), first=nn.Linear(32, 2)), preset)) == expected


def test_several_outputs_stay_float_unless_a_layer_reads_them() -> None:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.relu(self.conv1(x))
        return first, self.conv2(first)

    model = net(forward, conv1=conv(), relu=nn.ReLU(), conv2=conv(4, 2))
    assert targets(places(model, 'onnxruntime')) == ['inputs', 'relu']


class Opaque(nn.Module):
    """Cannot be traced, and reads what it is given in a convolution straight away."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):
            raise TypeError('not traceable')
        return self.conv(x)


@pytest.mark.parametrize('also', [False, True])
def test_an_opaque_module_reads_floats_and_quantizes_them_itself(also: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        return self.last(self.opaque(y)) + (self.last(y) if also else 0.0)

    model = net(forward, stem=conv(), opaque=Opaque(), last=conv(4, 4))
    found = places(model, 'openvino')
    assert targets(found) == ['inputs', *(['relu'] if also else []), 'opaque']
    assert [str(n) for position in found for n in position.float_readers] == (['backbone_opaque'] if also else [])


class RMSNorm(nn.Module):
    """Written out, as many models have it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


class CenteredNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        return centred / (centred.abs().mean(1, keepdim=True) + 1e-6)


class ChannelNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize(
    'norm', [ChannelNorm(), RMSNorm(), CenteredNorm(), nn.GroupNorm(1, 4), nn.InstanceNorm2d(4), nn.BatchNorm2d(4)]
)
def test_a_stream_that_layers_read_normalised_stays_in_float(norm: nn.Module, preset: str) -> None:
    """Through moves, constants and gains, and where a sum is read by the next sum alone."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x + self.first(self.norm(x))
        z = self.norm(y[:, :, 1:] * 0.5 + 1.0)
        w = y[:, :, 1:] + F.silu(self.second(z)) + F.silu(self.third(z))
        return self.last(self.norm(w))

    model = net(forward, stem=conv(), norm=norm, first=conv(4, 4), second=conv(4, 4), third=conv(4, 4), last=conv(4, 2))
    traced = trace_image_graph(model, images(2))
    roles = Roles(model, traced.graph)
    found = find_positions(roles, PRESETS[preset])
    read = {layer.removeprefix('backbone.') for place in found for layer in place.layers}
    assert not [n.name for place in found for n in place.nodes if roles.is_add(n)]
    assert read == {'stem', 'first', 'second', 'third', 'last'}


@pytest.mark.parametrize('preset', PRESETS)
def test_a_sum_that_a_layer_reads_is_quantized(preset: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x + self.first(self.norm(x))
        return self.last(self.norm(y) + y) + self.side(y)

    model = net(forward, stem=conv(), norm=nn.GroupNorm(1, 4), first=conv(4, 4), last=conv(4, 2), side=conv(4, 2))
    assert {'add', 'add_1'} <= set(targets(places(model, preset)))


def test_coordinates_that_a_logarithm_takes_back_stay_in_float() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        points, gate = self.points(x).sigmoid(), self.gate(x).sigmoid()
        inverse = torch.log(points.clamp(min=1e-5) / (1 - points).clamp(min=1e-5))
        return self.last(x * gate) + inverse

    model = net(forward, points=conv(), gate=conv(3, 3), last=conv())
    found = targets(places(model, 'openvino'))
    assert 'sigmoid_1' in found and 'sigmoid' not in found


def test_no_linear_layer_is_quantized_behind_itself() -> None:
    """ONNX Runtime computes a linear layer in integers whatever follows it, a convolution does not."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.fc(self.norm(x))

    model = net(
        forward, stem=conv(), norm=nn.LayerNorm(4), up=nn.Linear(4, 8), down=nn.Linear(8, 4), fc=nn.Linear(4, 2)
    )
    assert targets(places(model, 'onnxruntime')) == ['inputs', 'stem', 'norm', 'gelu', 'norm']


class Attention(nn.Module):
    """Self-attention over the pixels of a map, fused or written out."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.fused, self.qkv, self.proj = fused, nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 2, 2).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * 2**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize('fused', [True, False])
def test_operands_of_products_are_quantized_where_the_preset_or_the_config_says_so(fused: bool) -> None:
    torch.manual_seed(0)
    found = {}
    for preset, products in (*product(('academic', 'openvino'), (None, False)), ('openvino', True)):
        model = net(lambda self, x: self.attention(self.stem(x)), stem=conv(stride=4), attention=Attention(fused))
        wanted = run(model, images(2))
        quantizer = BRECQQuantizer({'bits': 8}, {'bits': 8}, preset, products=products, smoothing=0.0)
        graph = quantizer.prepare(model, images(2)).image_graph
        assert relative_error(run(graph, images(2)), wanted) < 1e-6
        found[preset, products] = graph
    counts = {key: len(graph.quantizers) for key, graph in found.items()}
    # images, the map, what the last layer reads; queries, keys, softmax, values
    assert counts == {
        ('academic', None): 7, ('academic', False): 3, ('openvino', None): 5, ('openvino', False): 3,
        ('openvino', True): 7,
    }  # fmt: skip
    graph = found['academic', None]
    products = [n for n in graph.traced.graph.nodes if getattr(n.target, '__name__', n.target) == 'matmul']
    assert len(products) == 2
    operands = [n for found in products for n in found.all_input_nodes]
    assert all(n.target in graph.quantizers for n in operands)
    # a softmax is never negative
    assert [graph.quantizers[str(n.target)].qtype.symmetric for n in operands] == [False, False, True, False]


@pytest.mark.parametrize(
    ('kernel', 'stride', 'is_shifted'), [(1, 1, True), (1, 2, True), (3, 1, False), (3, 2, False), (2, 2, False)]
)
def test_a_layer_that_pads_in_a_forward_of_its_own(kernel: int, stride: int, is_shifted: bool) -> None:
    """The one of EfficientNet does, by the size of its input, and has no padding by its attributes."""
    from mmcv.cnn.bricks import Conv2dAdaptivePadding

    model = net(lambda self, x: self.same(F.silu(x)), same=Conv2dAdaptivePadding(3, 3, kernel, stride))
    assert model.backbone.same.padding == (0, 0)
    found = places(model, 'tensorrt')
    assert [place.shifts for place in found if place.layers] == [is_shifted]


def test_queries_and_keys_have_the_grids_of_their_kernel() -> None:
    """OpenVINO has one of int8 with zero-point 0, and none of fewer bits."""
    torch.manual_seed(0)
    model = net(lambda self, x: self.attention(self.stem(x)), stem=conv(stride=4), attention=Attention(True))
    graph = (
        BRECQQuantizer({'bits': 4}, {'bits': 4}, 'openvino', first_last_8bit=False)
        .prepare(model, images(2))
        .image_graph
    )
    scores = next(n for n in graph.traced.graph.nodes if n.target is torch.matmul)
    read = [graph.quantizers[str(n.target)].qtype for n in scores.all_input_nodes]
    assert read == [QType(8), QType(8)]
    assert sum(q.qtype.bits == 8 for q in graph.quantizers.values()) == 2


def test_an_attention_of_many_scores_stays_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mmbrecq.quantizers.brecq.LARGEST_SCORES', 2 * 64 * 64 - 1)
    for preset, is_fused in (('openvino', True), ('academic', False)):
        model = net(lambda self, x: self.attention(self.stem(x)), stem=conv(stride=4), attention=Attention(True))
        graph = BRECQQuantizer({'bits': 8}, {'bits': 8}, preset).prepare(model, images(2)).image_graph
        nodes = [n.target for n in graph.traced.graph.nodes]
        assert (F.scaled_dot_product_attention in nodes) is is_fused


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize(
    ('function', 'by_channel'),
    [
        (lambda self, x: self.depthwise(x), BY_CHANNEL),
        (
            lambda self, x: self.depthwise(F.max_pool2d(x, 2)) + self.wide(F.interpolate(x, scale_factor=0.5))[:, :4],
            BY_CHANNEL,
        ),
        # where scales are folded, the sum would have to be computed in float
        (lambda self, x: self.depthwise(x) + x, {'openvino'}),
        (lambda self, x: self.depthwise(x) + self.dense(x), set()),
        (lambda self, x: self.grouped(x), set()),
        (lambda self, x: self.depthwise(x.flip(1)[:, :4].reshape(2, 4, -1, 4)), set()),
        (lambda self, x: self.depthwise(torch.cat([x[:, 2:], x[:, :2]], 1)), set()),
    ],
)
def test_depthwise_convolutions_read_a_scale_per_channel(function: Any, by_channel: set[str], preset: str) -> None:
    model = net(
        lambda self, x: self.last(function(self, F.silu(self.stem(x)))), stem=conv(3, 4, stride=2),
        depthwise=conv(4, 4, groups=4), wide=conv(4, 8, groups=4),
        grouped=conv(4, 4, groups=2), dense=conv(4, 4), last=conv(4, 2),
    )  # fmt: skip
    found = dict(zip(targets(places(model, preset)), places(model, preset), strict=True))
    assert found['silu'].per_channel == (preset in by_channel)
    assert not found['inputs'].per_channel
    # ONNX Runtime has the convolution before it on a grid too, which a function in float alone reads
    assert preset != 'onnxruntime' or found['stem'].per_channel


@pytest.mark.parametrize('preset', ['onnxruntime', 'tensorrt'])
@pytest.mark.parametrize(
    ('function', 'expected'),
    [
        (lambda self, x: self.stem(x), {'stem'}),
        (lambda self, x: F.relu6(self.stem(x)), set()),
        (lambda self, x: F.relu(F.silu(self.stem(x))), {'stem'}),
        (lambda self, x: torch.tanh(F.gelu(self.stem(x)) * 2.0), {'stem', 'tanh'}),
        (lambda self, x: self.stem(x) * torch.sigmoid(self.stem(x)), {'stem', 'mul'}),
        # a sum is computed on grids
        (lambda self, x: F.silu(self.stem(x) + self.side(x)), {'silu'}),
    ],
)
def test_scales_are_folded_into_convolutions_that_functions_in_float_read(
    function: Any, expected: set[str], preset: str
) -> None:
    model = net(
        lambda self, x: self.last(self.depthwise(function(self, x))), stem=conv(), side=conv(),
        depthwise=conv(4, 4, groups=4), last=conv(4, 2),
    )  # fmt: skip
    found = places(model, preset)
    by_channel = targets([place for place in found if place.per_channel])
    assert set(by_channel) == expected & set(targets(found))


@pytest.mark.parametrize(
    ('function', 'bounds'),
    [
        (nn.SiLU(), (-8.0, math.inf)), (nn.Hardswish(), (-3.0, math.inf)), (nn.GELU(), (-3.2, math.inf)),
        (nn.Sigmoid(), (-5.9, 5.9)), (nn.LeakyReLU(), UNBOUNDED), (nn.PReLU(4), UNBOUNDED),
    ],
)  # fmt: skip
def test_the_grid_of_a_convolution_ends_where_the_function_behind_it_is_constant(
    function: nn.Module, bounds: tuple[float, float]
) -> None:
    model = net(lambda self, x: self.last(self.act(self.conv(x))), conv=conv(), act=function, last=conv(4, 2))
    found = {place.name: place.bounds for place in places(model, 'onnxruntime')}
    assert found['backbone_conv'] == pytest.approx(bounds, abs=0.15)
    # what is cut off is next to nothing
    x = torch.linspace(-50, 50, 1001)
    if not isinstance(function, nn.PReLU):
        assert float((function(x.clamp(*found['backbone_conv'])) - function(x)).abs().max()) < 0.004


@pytest.mark.parametrize(
    ('function', 'is_shifted'),
    [
        (lambda self, x: self.point(F.silu(self.stem(x))), True),
        (lambda self, x: self.point(F.max_pool2d(F.silu(self.stem(x)), 3, 1, 1)), True),
        (lambda self, x: self.point(F.silu(self.stem(x))) + F.silu(self.stem(x)), True),
        # computed within the layer
        (lambda self, x: self.point(F.relu(self.stem(x))), False),
        (lambda self, x: self.point(self.stem(x) + x), False),
        (lambda self, x: self.point(F.avg_pool2d(x, 2)), False),
        (lambda self, x: self.point(F.silu(x).mean(1, keepdim=True).expand_as(x)), False),
        # zeros are zeros
        (lambda self, x: self.stem(F.silu(x)), False),
        (lambda self, x: self.point(F.pad(F.silu(x), (1, 1, 1, 1))), False),
        (lambda self, x: self.up(F.silu(x)), False),
        (lambda self, x: self.point(torch.cat([F.silu(x)[:, :2], x[:, 2:]], 1)), False),
        # the addition is computed within the layer and has a shortcut on a grid
        (lambda self, x: (lambda y: y + self.point(y))(F.silu(x)), False),
        # others read what is moved
        (lambda self, x: (lambda y: self.point(y) * y.softmax(2))(F.silu(x).flatten(2).view_as(x)), False),
    ],
)
def test_values_from_which_a_zero_point_may_be_taken(function: Any, is_shifted: bool) -> None:
    model = net(function, stem=conv(3, 3), point=conv(3, 3, 1), up=nn.ConvTranspose2d(3, 3, 2, 2))
    assert [p.shifts for p in places(model, 'tensorrt') if p.layers][-1] is is_shifted
    assert not any(p.shifts for preset in ('academic', 'onnxruntime', 'openvino') for p in places(model, preset))
