"""Blocks are told by structure: the same as the lists of class names gave, whatever the classes are called."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_models import CLASSIFIERS, classifier, conv, images, net
from torch import Tensor, nn

from mmbrecq.errors import PatternError
from mmbrecq.graph.blocks import MAX_LAYERS, find_blocks
from mmbrecq.graph.traced_graph import trace_image_graph

STAGES = {f'backbone.layer{i}': 2 for i in range(1, 5)}

BACKBONES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    'bottleneck': (
        {'type': 'SEResNet', 'depth': 50},
        {'backbone.layer1': 3, 'backbone.layer2': 4, 'backbone.layer3': 6, 'backbone.layer4': 3},
    ),
    'densenet': (
        {'type': 'DenseNet', 'arch': {'growth_rate': 4, 'depths': [6, 6], 'init_channels': 8}},
        {f'backbone.stages.{i}.block': 6 for i in range(2)},
    ),
    'repvgg': (
        {
            'type': 'RepVGG',
            'arch': {'num_blocks': [2, 1, 1, 1], 'width_factor': [0.125] * 4, 'group_layer_map': None, 'se_cfg': None,
                     'stem_channels': 8},
        },
        {'backbone.stem': 0, **{f'backbone.stage_{i}': n for i, n in enumerate([2, 1, 1, 1], 1)}},
    ),
    'vit': (
        {'type': 'VisionTransformer', 'img_size': 32, 'patch_size': 8,
         'arch': {'embed_dims': 8, 'num_layers': 3, 'num_heads': 2, 'feedforward_channels': 16}},
        {'backbone.layers': 3},
    ),
    'swin': (
        {'type': 'SwinTransformer', 'img_size': 64, 'window_size': 4, 'out_indices': (1,),
         'arch': {'embed_dims': 8, 'depths': [2, 2], 'num_heads': [1, 2]}},
        {f'backbone.stages.{i}.blocks': 2 for i in range(2)},
    ),
    'convnext': (
        {'type': 'ConvNeXt', 'arch': {'depths': [2, 1], 'channels': [8, 16]}, 'out_indices': (1,)},
        {'backbone.stages.0': 2, 'backbone.stages.1': 1},
    ),
    'shufflenet': (
        {'type': 'ShuffleNetV2', 'widen_factor': 0.5},
        {'backbone.layers.0': 4, 'backbone.layers.1': 8, 'backbone.layers.2': 4},
    ),
}  # fmt: skip
"""Of mmpretrain, with the number of blocks in each of its containers: what the class names gave; 0 for no container."""


def build(name: str) -> nn.Module:
    classifier('resnet')  # registers the types
    from mmpretrain.registry import MODELS

    torch.manual_seed(0)
    backbone = MODELS.build(BACKBONES[name][0])
    return net(lambda self, x: self.body(x)[-1], body=backbone)


def blocks_of(model: nn.Module, blocks: Sequence[str] | None = None, size: int = 32) -> list[str]:
    return find_blocks(model, trace_image_graph(model, images(2, size=size)).graph, blocks)


def paths(counts: dict[str, int]) -> list[str]:
    return [path for name, count in counts.items() for path in ([f'{name}.{i}' for i in range(count)] or [name])]


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('resnet', paths(STAGES)),
        ('mobilenetv2', paths({f'backbone.layer{i + 1}': n for i, n in enumerate([1, 2, 3, 4, 3, 3, 1])})),
        ('regnet', paths({'backbone.layer1': 1, 'backbone.layer2': 1, 'backbone.layer3': 2, 'backbone.layer4': 1})),
        ('vgg', []),
    ],
)
def test_classifiers_with_recipes(name: str, expected: list[str]) -> None:
    assert CLASSIFIERS.keys() == {'resnet', 'mobilenetv2', 'regnet', 'vgg'}
    assert blocks_of(classifier(name)) == expected


@pytest.mark.parametrize('name', BACKBONES)
def test_backbones_of_mmpretrain(name: str) -> None:
    expected = [path.replace('backbone.', 'backbone.body.') for path in paths(BACKBONES[name][1])]
    assert blocks_of(build(name), size=64 if name != 'vit' else 32) == expected


class Layers(nn.Sequential):
    """Two layers in a row."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__(conv(channels, 8, 1), nn.ReLU(), conv(8, channels))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class MyBlock(nn.Module):
    """An inverted residual: with a shortcut where nothing changes, without one else."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.body, self.gate, self.stride = Layers(), Gate(), stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(self.body(x))
        return x + y if self.stride == 1 else y[..., ::2, ::2]


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class WithAddModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.add = Layers(), Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.body(x))


class Pyramid(nn.Module):
    """Pools of one layer's output side by side: no layer is bypassed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(4, 2, 1), conv(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.cat([x, nn.functional.max_pool2d(x, 3, 1, 1)], 1))


class Concatenated(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.modules_ = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self.modules_], 1)


class Skip(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(4, 4), conv(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.left(x)
        return x, x + self.right(x)


class Largest(nn.Module):
    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return torch.maximum(*x)


SHARED = nn.ReLU()


@pytest.mark.parametrize(
    ('modules', 'expected'),
    [
        # the last one is of a type with shortcuts elsewhere
        ([MyBlock(), MyBlock(stride=2)], ['0', '1']),
        # a type without shortcuts anywhere is no block; what lies in it may be
        ([MyBlock(stride=2)], ['0.gate']),
        ([Layers(), Layers(), Pyramid()], []),
        ([WithAddModule(), Layers()], ['0']),
        ([nn.Sequential(MyBlock(), MyBlock()), MyBlock()], ['0.0', '0.1', '1']),
        ([Skip(*[Skip(Layers()) for _ in range(3)])], ['0']),
        ([Skip(*[Skip(Layers()) for _ in range(MAX_LAYERS)])], [f'0.body.{i}' for i in range(MAX_LAYERS)]),
        ([nn.Sequential(Skip(conv(4, 4)), conv(4, 4, 1)) for _ in range(2)], ['0', '1']),
        ([Concatenated(conv(4, 2, 1), nn.Sequential(conv(4, 2, 1), conv(2, 2)))], ['0']),
        ([TwoOutputs(), Largest()], []),
        ([nn.Sequential(Skip(conv(4, 4), SHARED), conv(4, 4, 1), SHARED) for _ in range(2)], ['0', '1']),
    ],
)  # fmt: skip
def test_blocks_of_ones_own(modules: list[nn.Module], expected: list[str]) -> None:
    model = net(
        lambda self, x: self.last(self.body(torch.relu(self.stem(x)))),
        stem=conv(), body=nn.Sequential(*modules), last=conv(4, 2),
    )  # fmt: skip
    assert blocks_of(model) == [f'backbone.body.{path}' for path in expected]


class Chain(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        for number, part in enumerate(parts):
            setattr(self, f'part{number}', part)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = part(x)
        return x


class OtherSkip(Skip): ...


@pytest.mark.parametrize(
    ('parts', 'expected'),
    [
        ([Skip(Layers()), OtherSkip(Layers())], ['0', '1']),
        ([Skip(Layers()), Skip(Layers())], ['0.part0', '0.part1', '1.part0', '1.part1']),
        ([Skip(Layers()), OtherSkip(Layers()), conv(4, 4)], ['0.part0', '0.part1', '1.part0', '1.part1']),
    ],
)
def test_a_chain_of_blocks_of_different_types_is_a_block(parts: list[nn.Module], expected: list[str]) -> None:
    """The attention and the two layers of a transformer, for one, of which each adds its own input."""
    test_blocks_of_ones_own([Chain(*copy.deepcopy(parts)), Chain(*copy.deepcopy(parts))], expected)


def test_a_network_in_one_module_is_no_block() -> None:
    model = net(
        lambda self, x: self.last(torch.relu(x + self.second(torch.relu(self.first(x))))),
        first=conv(3, 4), second=conv(4, 3), last=conv(3, 2),
    )  # fmt: skip
    assert blocks_of(model) == []


def test_blocks_by_type_and_by_pattern() -> None:
    model, expected = classifier('resnet'), paths(STAGES)
    assert blocks_of(model, ['BasicBlock']) == expected
    assert blocks_of(model, ['backbone.layer4.*']) == expected[-2:]
    assert blocks_of(model, ['backbone.layer2', 'BasicBlock']) == [*expected[:2], 'backbone.layer2', *expected[4:]]


@pytest.mark.parametrize('entry', ['Bottleneck', 'backbone.layer5.*', 'layer1'])
def test_block_that_matches_nothing(entry: str) -> None:
    message = f"expected quantizer.blocks to name a module type or a path, but '{entry}' matches none"
    with pytest.raises(PatternError, match=message.replace('*', r'\*')):
        blocks_of(classifier('resnet'), ['BasicBlock', entry])
