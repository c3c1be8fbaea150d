"""Acceptance: forms in which strangers write models, each right from the float model to runtime and checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import drop_block2d

import mmbrecq
from mmbrecq.errors import ExportError, GraphError

Middle = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """A stem, a middle, and a classifier; ``spare`` is never called."""

    def __init__(self, middle: Middle, **modules: nn.Module) -> None:
        super().__init__()
        self.middle = middle
        self.stem, self.last, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3), nn.Linear(16, 10)
        self.spare = nn.Linear(2, 2)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.last(self.middle(self, self.stem(x)))).mean((2, 3)))


def conv() -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, padding=1)


def tokens(attend: Callable[[Any, Tensor], Tensor]) -> Middle:
    """The rows and columns of 8 x 8 pixels as tokens, ``(N, 64, 8)``, and back."""

    def middle(self: Any, x: Tensor) -> Tensor:
        return attend(self, x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape_as(x)

    return middle


def written_one_by_one(self: Any, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:, :4], y[:, 4:] = F.relu(x[:, :4]), x[:, 4:]
    return y


def partly_rectified(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.norm(torch.cat([x[:, :4], self.c(x)[:, 4:]], 1))) + x


def view_of_a_split(self: Any, x: Tensor) -> Tensor:
    y = F.relu(x)
    rows = y.unbind(1)
    rows[2].mul_(2.0)
    y.unflatten(1, (2, 4))[:, 1].add_(1.0)
    return y


def product_from_the_left(self: Any, x: Tensor) -> Tensor:
    return (self.fc.weight[:8, :8] @ F.relu(x).flatten(2)).reshape(x.shape)


def affine_product(self: Any, x: Tensor) -> Tensor:
    pixels = F.relu(x).permute(0, 2, 3, 1)
    y = torch.addmm(self.stem.bias, pixels.reshape(-1, 8), self.c.weight[..., 0, 0])
    return y.reshape(pixels.shape).permute(0, 3, 1, 2)


def largest_mask(self: Any, t: Tensor) -> Tensor:
    mask = torch.ones(t.shape[1], t.shape[1]).triu(1).bool()
    return (t @ t.mT).masked_fill(mask, torch.finfo(t.dtype).min).softmax(-1) @ t


def padded_attention(self: Any, t: Tensor) -> Tensor:
    padding = torch.arange(t.shape[1])[None].expand(t.shape[0], -1) > 40
    return t + self.attention(t, t, t, key_padding_mask=padding)[0]


def learned_queries(self: Any, t: Tensor) -> Tensor:
    return t + self.attention(self.fc.bias[None, None, :8].expand(t.shape[0], -1, -1), t, t)[0]


def mean_of_tokens(self: Any, t: Tensor) -> Tensor:
    return t + self.l2(F.linear(t, self.l.weight).mean(1))[:, None]


def sums_of_a_pyramid(self: Any, x: Tensor) -> Tensor:
    """A convolution that a layer reads, beside another behind a pooling and an empty sequence."""
    fine, coarse = self.c(F.relu(x)), self.c2(F.relu(x))
    return F.relu(self.empty(fine) + F.max_pool2d(coarse, 3, 1, 1)) + self.c3(fine) + self.c3(coarse)


def concatenations_one_by_one(self: Any, x: Tensor) -> Tensor:
    """Parts of channels, each read by the next convolution and by a chain of concatenations, as in Res2Net."""
    first, second, third = F.relu(x).split((2, 4, 2), 1)
    y = self.pair(first)
    z = self.pair(y + third)
    return self.norm(torch.cat([torch.cat([y, z], 1), second], 1)) + x


def scaled_branch(self: Any, x: Tensor) -> Tensor:
    """BatchNorm that cannot be folded, since the sum before it is read twice; the branch has a scale of its own."""
    x = x + 0.5 * self.c(F.relu(x))
    return x + self.c2(self.norm(x))


def class_token_of_its_own(self: Any, t: Tensor) -> Tensor:
    """The first token is large, and normalised before a layer reads it alone, as in XCiT."""
    t = torch.cat([300 + t[:, :1], t[:, 1:]], 1)
    t = torch.cat([self.norm(t[:, :1]), t[:, 1:]], 1)
    return torch.cat([self.l(t[:, :1]), t[:, 1:]], 1)


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


swish = Swish.apply


def functions_of_autograd(self: Any, x: Tensor) -> Tensor:
    x = checkpoint(lambda y: F.relu(self.c(y)), swish(x), use_reentrant=True)
    return checkpoint(self.c2, Scaled.apply(x), use_reentrant=False)


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('calls', torch.zeros((), dtype=torch.int64))

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(x)


class WithCoordinates(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        columns = torch.linspace(-1, 1, x.shape[-1]).expand(x.shape[0], 1, x.shape[2], -1)
        return super().forward(torch.cat([x, columns], 1)) + 0.5


def doubling() -> nn.Module:
    """Computes something else than its class does: its values are negative, too."""
    module = nn.ReLU()
    module.forward = lambda x: 2 * x  # type: ignore[method-assign]
    return module


def windows(self: Any, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.relu(x) + self.c(x).unfold(2, 3, 1).mean(-1).repeat_interleave(4, -2)[:, :, : x.shape[2]]


KINDS: dict[str, tuple[Middle, dict[str, Callable[[], nn.Module]]]] = {
    'a tensor that is made empty and written': (written_one_by_one, {}),
    'a concatenation of which a layer and a norm read parts': (
        partly_rectified,
        {'c': conv, 'norm': lambda: nn.BatchNorm2d(8)},
    ),
    'a convolution before a pre-activation block': (
        lambda self, x: x + self.c(F.relu(self.norm(x))),
        {'c': conv, 'norm': lambda: nn.BatchNorm2d(8)},
    ),
    'writes through unbind and unflatten': (view_of_a_split, {}),
    'a constant matrix on the left': (product_from_the_left, {}),
    'addmm': (affine_product, {'c': conv}),
    'mT and finfo': (tokens(largest_mask), {}),
    'a padding mask': (tokens(padded_attention), {'attention': lambda: nn.MultiheadAttention(8, 2, batch_first=True)}),
    'learned queries': (tokens(learned_queries), {'attention': lambda: nn.MultiheadAttention(8, 2, batch_first=True)}),
    'the mean of tokens behind a layer without bias': (
        tokens(mean_of_tokens),
        {'l': lambda: nn.Linear(8, 8), 'l2': lambda: nn.Linear(8, 8)},
    ),
    'a class token of its own': (
        tokens(class_token_of_its_own),
        {'norm': lambda: nn.LayerNorm(8), 'l': lambda: nn.Linear(8, 8)},
    ),
    'a value converted before a layer': (lambda self, x: F.relu(x).to(torch.float64).to(torch.float32), {}),
    'a function of torch.fx.wrap': (lambda self, x: drop_block2d(F.relu(x), 0.1, 3, training=self.training) * 2, {}),
    'modules made within a forward pass': (lambda self, x: nn.Sequential(self.c, nn.ReLU())[:2](x), {'c': conv}),
    'functions of autograd, checkpoints among them': (functions_of_autograd, {'c': conv, 'c2': conv}),
    'a counter, in inference mode': (lambda self, x: self.c(self.counting(x)), {'c': conv, 'counting': Counting}),
    'a layer that writes coordinates beside its input': (
        lambda self, x: F.relu(self.c(x)),
        {'c': lambda: WithCoordinates(9, 8, 3, padding=1)},
    ),
    'a module with a forward pass of its own': (lambda self, x: self.c(self.d(x)), {'c': conv, 'd': doubling}),
    'a compiled module, and a norm across channels': (
        lambda self, x: self.n(self.c(x)),
        {'c': lambda: torch.compile(conv(), backend='eager'), 'n': lambda: nn.LocalResponseNorm(3)},  # type: ignore[dict-item]
    ),
    'windows, and the type of a device': (windows, {'c': conv}),
    'weight_norm': (lambda self, x: F.relu(self.c(x)), {'c': lambda: nn.utils.weight_norm(conv())}),
}

SUMS_AND_CONCATENATIONS: dict[str, tuple[Middle, dict[str, Callable[[], nn.Module]]]] = {
    'sums of a pyramid': (
        sums_of_a_pyramid,
        {'c': conv, 'c2': conv, 'c3': conv, 'empty': nn.Sequential},
    ),
    'concatenations one by one': (
        concatenations_one_by_one,
        {'pair': lambda: nn.Conv2d(2, 2, 3, padding=1), 'norm': lambda: nn.BatchNorm2d(8)},
    ),
    'a branch with a scale before BatchNorm': (
        scaled_branch,
        {'c': conv, 'c2': conv, 'norm': lambda: nn.BatchNorm2d(8)},
    ),
}
"""These are what TensorRT's rules T5 and T6 are about."""


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    middle, modules = (KINDS | SUMS_AND_CONCATENATIONS)[name]
    return Net(middle, **{key: make() for key, make in modules.items()}).eval()


@pytest.mark.parametrize(
    ('name', 'preset'),
    [*product(KINDS, ('openvino', 'tensorrt')), *product(SUMS_AND_CONCATENATIONS, ('tensorrt',))],
)
def test_a_model_is_right_from_float_to_the_runtime(name: str, preset: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16, 3, 16, 16, generator=generator) + torch.randn(16, 3, 1, 1, generator=generator)
    quantized = mmbrecq.quantize(build(name), images, preset=preset, method='nearest')
    with torch.no_grad():
        wanted = build(name)(images)
    found = quantized(images)
    assert float((found - wanted).square().mean() / wanted.var(0).mean()) < 0.02
    quantized.export(tmp_path / ('model.xml' if preset == 'openvino' else 'model.onnx'), images)
    assert max(deviation.error for deviation in quantized.deviations) < 1e-6
    quantized.save(tmp_path / 'model.pth')
    torch.testing.assert_close(mmbrecq.load(tmp_path / 'model.pth', build(name))(images), found, rtol=0, atol=0)


def hooked() -> nn.Module:
    model = Net(lambda self, x: self.act(x), act=nn.ReLU())
    model.act.register_forward_hook(lambda module, args, result: result - 1.0)
    return model


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Growing(nn.Module):
    """Computes with a number of calls."""

    def __init__(self, bound: int) -> None:
        super().__init__()
        self.bound = bound
        self.register_buffer('calls', torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (2.0 if self.calls > self.bound else 1.0)


class Centred(nn.Module):
    """Takes its mean from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.mean == 0:
            self.mean.data.copy_(x.mean())
        return x - self.mean


class WithNumPy(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.from_numpy(x.detach().numpy()))


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x)


def with_a_list() -> nn.Module:
    model = Net(lambda self, x: self.layers[0](x))
    model.layers = [conv()]
    return model


def fails(self: Any, x: Tensor) -> Tensor:
    raise ValueError('expected 4 channels')


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (hooked, 'expected hooks that only observe, but one of act changes what it computes'),
        (
            lambda: Net(lambda self, x: scripted(x)),
            'Net cannot be traced: compiled code computes outside of what can be traced',
        ),
        (
            lambda: Net(lambda self, x: self.act(x), act=torch.jit.script(nn.ReLU())),
            'expected modules of Python, but got act compiled by TorchScript',
        ),
        (
            lambda: Net(lambda self, x: F.avg_pool2d(F.relu(x), 3, 2, 1, True)),
            'expected average pooling with padding without ceil_mode or count_include_pad',
        ),
        (lambda: Net(fails), 'Net does not run on images of 1 x 3 x 16 x 16: expected 4 channels'),
        (
            lambda: Net(lambda self, x: self.c(x.bfloat16()).float(), c=conv().bfloat16()),
            'expected layers in torch.float32, but got c in torch.bfloat16',
        ),
        (
            lambda: Net(lambda self, x: F.dropout(x, 0.5, training=True)),
            'expected Net to compute the same whenever it is given the same images, but in another pass it is off by',
        ),
        (lambda: Net(lambda self, x: self.g(x), g=Growing(4)), 'in what last reads: it computes with g.calls'),
        (lambda: Net(lambda self, x: self.g(x), g=Growing(10**5)), 'in what last reads: it computes with g.calls'),
        (lambda: Net(lambda self, x: self.m(x), m=Centred()), 'that keeps all weights, but it changes m.mean'),
        (
            lambda: Net(lambda self, x: self.c(x), c=nn.LazyConv2d(8, 3, padding=1)),
            'expected initialised weights, but c gets its own in the first pass of the model',
        ),
        (with_a_list, 'expected parameters of the model, but one is of a module in a list, which nn.ModuleList would'),
        (
            lambda: Net(lambda self, x: self.c(x), c=WithNumPy(8, 8, 3, padding=1)),
            'expected Python to read no values of tensors, but a result of numpy follows from the input',
        ),
        (
            lambda: Net(lambda self, x: torch.compile(F.relu, backend='eager')(x)),
            'Net cannot be traced: a function of it is compiled by torch.compile',
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), Spectrum()),
            'expected the outputs of the network to be real tensors, but output is a complex tensor',
        ),
    ],
)
def test_a_model_is_refused_at_once(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises((GraphError, ExportError), match=re.escape(message)):
        mmbrecq.quantize(make(), torch.randn(4, 3, 16, 16), method='nearest')
