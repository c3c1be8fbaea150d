from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import conv, images, net, relative_error, run
from torch import Tensor, nn

from mmbrecq.calibration.equalization import equalize
from mmbrecq.graph.channels import find_channel_groups
from mmbrecq.graph.roles import Roles
from mmbrecq.quantizers import BRECQQuantizer

WIDTH = 6


def tokens(self: Any, x: Tensor) -> Tensor:
    return self.stem(x).flatten(2).transpose(1, 2)


def windows(self: Any, x: Tensor) -> Tensor:
    """Shifted windows of pixels as in Swin, padded, before one linear layer."""
    y = self.norm(self.stem(x).permute(0, 2, 3, 1))
    y = F.pad(torch.roll(y, (-1, -1), (1, 2)), (0, 0, 0, 2, 0, 2))
    n, h, w, c = y.shape
    y = y.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    return self.fc(y).mean(1)


def viewed(self: Any, x: Tensor) -> Tensor:
    y = self.norm(tokens(self, x).contiguous())
    return self.fc(y.view(-1, 2, y.shape[1] // 2, y.shape[2]).view(-1, y.shape[2]))


def two_readers(self: Any, x: Tensor) -> Tensor:
    y = self.norm(tokens(self, x))
    return self.fc(y) + self.fc2(y)


def shared_norm(self: Any, x: Tensor) -> Tensor:
    y = tokens(self, x)
    return self.fc(self.norm(y)) + self.fc2(self.norm(y * 2))


def shared_layer(self: Any, x: Tensor) -> Tensor:
    y = tokens(self, x)
    return self.fc(self.norm(y)) + self.fc(self.norm2(y))


def read_in_float(self: Any, x: Tensor) -> Tensor:
    y = self.norm(tokens(self, x))
    return self.fc(y) + y


def read_across_tokens(self: Any, x: Tensor) -> Tensor:
    """The mixer's layer over tokens: its channels are positions."""
    y = self.norm(tokens(self, x))
    return self.fc(y) + self.mix(y.transpose(1, 2)).transpose(1, 2)


def activated_between(self: Any, x: Tensor) -> Tensor:
    return self.fc(F.gelu(self.norm(tokens(self, x))))


def patches(self: Any, x: Tensor) -> Tensor:
    return self.conv(self.norm(tokens(self, x)).transpose(1, 2).unflatten(2, (8, 8)))


def normalised_pixels(self: Any, x: Tensor) -> Tensor:
    return self.conv(F.relu(self.bn(self.stem(x) * 2)))


class ChannelNorm(nn.LayerNorm):
    """A norm of torch's with another axis, as some libraries have it for maps."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


def own_norm(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.own(tokens(self, x).transpose(1, 2)).transpose(1, 2))


def layers(**more: nn.Module) -> dict[str, nn.Module]:
    return {'stem': conv(3, WIDTH, stride=4), 'norm': nn.LayerNorm(WIDTH), 'fc': nn.Linear(WIDTH, WIDTH), **more}


@pytest.mark.parametrize(
    ('forward', 'more', 'expected'),
    [
        (windows, {}, [({'norm'}, {'fc'}, False)]),
        (viewed, {}, [({'norm'}, {'fc'}, True)]),
        (two_readers, {'fc2': nn.Linear(WIDTH, WIDTH, bias=False)}, [({'norm'}, {'fc', 'fc2'}, False)]),
        (shared_norm, {'fc2': nn.Linear(WIDTH, WIDTH)}, [({'norm'}, {'fc', 'fc2'}, True)]),
        (shared_layer, {'norm2': nn.LayerNorm(WIDTH)}, [({'norm', 'norm2'}, {'fc'}, True)]),
        (patches, {'conv': nn.Conv2d(WIDTH, 4, 2, 2, groups=2)}, [({'norm'}, {'conv'}, True)]),
        (patches, {'conv': nn.Conv2d(WIDTH, 4, 2, 2, padding=1)}, [({'norm'}, {'conv'}, False)]),
        (read_in_float, {}, []),
        (read_across_tokens, {'mix': nn.Linear(64, 64)}, []),
        (activated_between, {}, []),
        (own_norm, {'own': ChannelNorm(WIDTH)}, None),
        (normalised_pixels, {'bn': nn.BatchNorm2d(WIDTH), 'conv': conv(WIDTH, 4)}, [({'bn'}, {'conv'}, False)]),
    ],
)  # fmt: skip
def test_channels_that_a_normalisation_writes(forward: Any, more: dict[str, nn.Module], expected: Any) -> None:
    torch.manual_seed(0)
    model = net(forward, **layers(**more))
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))):
            norm.weight.copy_(torch.logspace(-1, 1, WIDTH))
            norm.bias.copy_(torch.linspace(-1, 1, WIDTH))
    wanted = run(model, images())
    quantized = BRECQQuantizer({'bits': 8}, {'bits': 8}, smoothing=1.0).prepare(model, images(2))
    groups = find_channel_groups(Roles(model, quantized.image_graph.traced.graph))
    names = [[{path.split('.')[1] for path in paths} for paths in (g.writers, g.readers)] for g in groups]
    found = [(*pair, group.can_shift) for pair, group in zip(names, groups, strict=True)]
    assert expected is None or found == expected
    assert all(group.is_normalised and group.quantizers for group in groups)
    gains = {path: quantized.model.get_submodule(path).weight.clone() for group in groups for path in group.writers}
    assert equalize(quantized, quantized.image_graph, lambda: quantized(images())) == len(found)
    assert relative_error(run(quantized, images()), wanted) < 1e-6
    # the widest channel was 100 times as wide as the narrowest
    for path, before in gains.items():
        after = quantized.model.get_submodule(path).weight
        assert float(after.max() / after.min()) < 0.1 * float(before.max() / before.min())
    ends: dict[str, Tensor] = {}
    for path, axis in {
        path: axis for group in groups if group.can_shift for path, axis in group.quantizers.items()
    }.items():

        def note(_: Any, args: tuple[Tensor], path: str = path, axis: int = axis) -> None:
            values = args[0].transpose(0, axis).flatten(1)
            ends[path] = torch.stack([values.amax(1), values.amin(1)])

        quantized.image_graph.quantizers[path].register_forward_pre_hook(note)
    run(quantized, images())
    for above, below in ends.values():
        # the middle of every channel is 0
        torch.testing.assert_close(above, -below, rtol=1e-3, atol=1e-3)


def test_a_weight_that_another_layer_shares_is_scaled_for_its_own_reader_alone() -> None:
    torch.manual_seed(0)
    model = net(two_readers, **layers(fc2=nn.Linear(WIDTH, WIDTH)))
    model.backbone.fc2.weight = model.backbone.fc.weight
    wanted = run(model, images())
    quantized = BRECQQuantizer({'bits': 8}, {'bits': 8}, smoothing=1.0).prepare(model, images(2))
    assert equalize(quantized, quantized.image_graph, lambda: quantized(images())) == 1
    assert relative_error(run(quantized, images()), wanted) < 1e-6
