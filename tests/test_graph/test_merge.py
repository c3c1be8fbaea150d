"""Branches merge into one layer, the outputs stay, and what would change them is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import images, net, randomize, run
from torch import Tensor, nn

from mmbrecq.errors import ConfigError, GraphError
from mmbrecq.graph.merge import merge_branches
from mmbrecq.quantizers import BRECQQuantizer


class TwoBranches(nn.Module):
    """A 3x3 and a 1x1 convolution whose sum can become one convolution."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.merged(x) if hasattr(self, 'merged') else self.wide(x) + self.narrow(x)

    def one_layer(self) -> nn.Conv2d:
        layer = nn.Conv2d(4, 4, 3, padding=1)
        layer.weight.copy_(self.wide.weight * self.factor)
        layer.weight[..., 1:2, 1:2] += self.narrow.weight
        layer.bias.copy_(self.wide.bias + self.narrow.bias)
        return layer


class InPlace(TwoBranches):
    def switch_to_deploy(self) -> None:
        if not hasattr(self, 'merged'):
            self.merged = self.one_layer()
            del self.wide, self.narrow

    def reparameterize(self) -> tuple[Tensor, Tensor]:
        """As in mmpretrain, which names so what only computes the weights."""
        raise AssertionError('not to be called')


class Replaced(TwoBranches):
    def fuse(self) -> nn.Module:
        with torch.no_grad():
            return self.one_layer()


class Failing(TwoBranches):
    def merge_kernel(self) -> None:
        raise AttributeError('no small kernel')


class Unrelated(TwoBranches):
    """Names of other libraries for other things."""

    def reparameterize(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        raise AssertionError('not to be called')

    def fuse(self) -> nn.Module:
        raise AttributeError('no BatchNorm to fuse')


def network(block: nn.Module) -> nn.Module:
    return net(
        lambda self, x: self.last(self.block(torch.relu(self.stem(x)))),
        stem=nn.Conv2d(3, 4, 3, padding=1), block=block, last=nn.Conv2d(4, 2, 1),
    )  # fmt: skip


@pytest.mark.parametrize('kind', [InPlace, Replaced])
def test_branches_become_one_layer(kind: type[TwoBranches]) -> None:
    model, x = network(kind()), images(3)
    before = run(model, x)
    assert merge_branches(model, images(2)) == ['backbone.block']
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 3
    torch.testing.assert_close(run(model, x), before, rtol=1e-5, atol=1e-5)
    kept = model.state_dict()
    assert merge_branches(model, images(2)) == []
    assert kept.keys() == model.state_dict().keys()


def test_methods_for_other_things_are_not_called() -> None:
    model = network(Unrelated())
    assert merge_branches(model, images(2)) == []
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 4


@pytest.mark.parametrize(
    ('block', 'reason'),
    [
        (InPlace(factor=1.5), r'they change by \S+ of their variance'),
        (Failing(), r'merge_kernel\(\) raised .*no'),
    ],
)
def test_what_cannot_merge_is_refused(block: nn.Module, reason: str) -> None:
    message = rf'expected the branches of backbone\.block to merge without a change of the outputs, but {reason}'
    with pytest.raises(GraphError, match=message + '.*; quantizer.merge_branches=False'):
        merge_branches(network(block), images(2))


REPVGG: dict[str, Any] = {
    'num_blocks': [1, 2, 1, 1], 'width_factor': [0.125] * 4, 'group_layer_map': None, 'se_cfg': None,
    'stem_channels': 8,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    'repvgg': {'type': 'RepVGG', 'arch': REPVGG},
    'mobileone': {
        'type': 'MobileOne',
        'arch': {
            'num_blocks': [1, 1, 1, 1], 'width_factor': [0.125] * 4, 'num_conv_branches': [2] * 4,
            'num_se_blocks': [0, 0, 0, 1],
        },
    },
    'replknet': {
        'type': 'RepLKNet',
        'arch': {'large_kernel_sizes': [7, 5], 'layers': [1, 1], 'channels': [8, 16], 'small_kernel': 3, 'dw_ratio': 1},
        'strides': (2, 2), 'dilations': (1, 1), 'out_indices': (1,),
    },
}  # fmt: skip


def family(name: str) -> nn.Module:
    import mmpretrain.models  # noqa: F401 - registers the types
    from mmengine.registry import init_default_scope
    from mmpretrain.registry import MODELS

    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = net(lambda self, x: self.body(x)[-1], body=MODELS.build(FAMILIES[name]))
    randomize(model)
    return model


@pytest.mark.parametrize('name', FAMILIES)
def test_families_are_quantized_in_their_merged_form(name: str) -> None:
    x = images(3, seed=1, size=64)
    with_branches = BRECQQuantizer({'bits': 8}, merge_branches=False).prepare(family(name), images(2, size=64))
    model = family(name)
    wanted = run(model, x)
    prepared = BRECQQuantizer({'bits': 8}).prepare(model, images(2, size=64))
    assert len(prepared.layers) < len(with_branches.layers)
    with prepared.quantization(False, False):
        found = run(prepared, x)
    assert float((found - wanted).square().sum() / wanted.square().sum()) < 1e-9
    again = BRECQQuantizer({'bits': 8}).prepare(family(name), images(2, size=64))
    again.model.load_state_dict(prepared.model.state_dict())


def test_option_is_checked() -> None:
    with pytest.raises(ConfigError, match="expected quantizer.merge_branches to be a boolean, but got 'no'"):
        BRECQQuantizer({'bits': 8}, merge_branches='no')  # type: ignore[arg-type]
