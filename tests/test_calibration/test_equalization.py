from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmbrecq.calibration.equalization import SMALLEST, equalize
from mmbrecq.errors import ConfigError, GraphError
from mmbrecq.graph.channels import find_channel_groups
from mmbrecq.graph.roles import Roles
from mmbrecq.quantizers.brecq import BRECQQuantizer
from mmbrecq.quantizers.quantized_model import QuantizedModel

WIDTH = 6


class Backbone(nn.Module):
    """A residual block whose shortcut joins the stem, a depthwise layer, a ReLU6, and a pooled linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.conv1 = nn.Conv2d(WIDTH, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.conv2 = nn.Conv2d(8, WIDTH, 1, bias=False)
        self.bounded = nn.Conv2d(WIDTH, 4, 1)
        self.last = nn.Conv2d(4, 5, 1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.stem(x)), 2)
        x = torch.relu(x + self.conv2(torch.relu(self.depthwise(torch.relu(self.conv1(x))))))
        x = torch.relu(self.last(F.relu6(self.bounded(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


class Model(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
        return self.backbone(inputs)


GROUPS = {
    (('stem', 'conv2'), ('conv1', 'bounded')),
    (('conv1',), ('depthwise',)),
    (('depthwise',), ('conv2',)),
    (('last',), ('fc',)),
}


def images() -> Tensor:
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def prepared(equalization: float, **options: Any) -> tuple[QuantizedModel, Callable[[], None]]:
    torch.manual_seed(0)
    model = Model().eval()
    with torch.no_grad():
        # channels of very different ranges
        model.backbone.stem.weight.mul_(torch.logspace(-2, 1, WIDTH).view(-1, 1, 1, 1))
    quantizer = BRECQQuantizer(
        **{'weight': {'bits': 4}, 'activation': {'bits': 4}, 'equalization': equalization, **options}
    )
    result = quantizer.prepare(model, images()[:2])

    def run() -> None:
        for batch in images().split(8):
            result(batch)

    return result, run


def stem_ranges(model: QuantizedModel) -> Tensor:
    """The mean over batches of 8 of the largest value of every channel behind the stem, with the layer itself."""
    stem = model.model.backbone.stem
    with torch.no_grad():
        maps = F.max_pool2d(torch.relu(F.conv2d(images(), stem.weight, stem.bias, padding=1)), 2)
    return torch.stack([part.amax((0, 2, 3)) for part in maps.split(8)]).mean(0)


def test_groups_of_values_that_share_their_channels() -> None:
    model, _ = prepared(0.5)
    groups = find_channel_groups(Roles(model.model, model.image_graph.traced.graph))
    named = {
        tuple(tuple(path.removeprefix('backbone.') for path in paths) for paths in (group.writers, group.readers))
        for group in groups
    }
    assert named == GROUPS
    assert all(group.quantizers for group in groups)


@pytest.mark.parametrize('strength', [0.5, 1.0])
@pytest.mark.parametrize('options', [{}, {'overrides': [{'pattern': '*conv1', 'weight_bits': 'float'}]}])
def test_the_network_computes_what_it_did(strength: float, options: dict[str, Any]) -> None:
    model, run = prepared(strength, **options)
    with torch.no_grad():
        before = model(images())
        assert equalize(model, model.image_graph, run) == len(GROUPS)
        after = model(images())
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5


def test_ranges_shrink_to_the_power_that_is_left() -> None:
    """The values behind the stem and those behind the shortcut share their factors, which neither decides alone."""
    model, run = prepared(0.75)
    with torch.no_grad():
        seen: dict[str, list[Tensor]] = {}
        for name, quantizer in model.image_graph.quantizers.items():
            quantizer.register_forward_pre_hook(
                lambda module, args, name=name: seen.setdefault(name, []).append(args[0].amax((0, 2, 3)))
                if args[0].dim() == 4 else None
            )  # fmt: skip
        run()
        group = next(
            g
            for g in find_channel_groups(Roles(model.model, model.image_graph.traced.graph))
            if 'backbone.stem' in g.writers
        )
        mean = torch.stack([torch.stack(seen[name]).mean(0) for name in group.quantizers]).mean(0)
        before = stem_ranges(model)
        equalize(model, model.image_graph, run)
    factors = mean.clamp_min(float(mean.max()) * SMALLEST) ** 0.75
    factors = factors / factors.prod() ** (1 / WIDTH)
    torch.testing.assert_close(stem_ranges(model), before / factors, rtol=1e-4, atol=1e-6)


def test_without_the_option_nothing_is_touched() -> None:
    model, run = prepared(0.0)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    assert equalize(model, model.image_graph, run) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())


def test_a_network_that_would_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = prepared(0.5)
    groups = find_channel_groups(Roles(model.model, model.image_graph.traced.graph))
    groups[0].readers.pop()
    monkeypatch.setattr('mmbrecq.calibration.equalization.find_channel_groups', lambda roles: groups)
    with pytest.raises(GraphError, match=r'^expected equalised channels to change no output, but they do by'):
        equalize(model, model.image_graph, run)


@pytest.mark.parametrize('value', [-0.1, 1.5, True, 'yes', float('nan')])
@pytest.mark.parametrize('name', ['equalization', 'smoothing'])
def test_strength_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf'^expected quantizer\.{name} to be a number in \[0, 1\], but got'):
        BRECQQuantizer({'bits': 4}, **{name: value})
