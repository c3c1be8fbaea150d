from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import conv, images, net, run
from torch import Tensor, nn

from mmbrecq.errors import GraphError
from mmbrecq.graph.traced_graph import other_size, trace_image_graph


def _windows(count: Callable[[Any], Any]) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        windows = self.conv(x).reshape(-1, 4, 4, 4)
        return torch.relu(windows).reshape(count(windows), 4, 8, 8)

    return forward


def _masks(self: Any, x: Tensor) -> Tensor:
    """As Swin numbers its windows."""
    mask = torch.zeros((1, 1, *x.shape[2:]))
    number = 0
    for rows in (slice(0, -3), slice(-3, None)):
        for columns in (slice(0, -2), slice(-2, None)):
            mask[:, :, rows, columns] = number
            number += 1
    return self.conv(x) + mask


BATCHES: dict[str, Callable[[Any, Tensor], Any]] = {
    'int': _windows(lambda windows: int(windows.shape[0] / 4)),
    'floor': _windows(lambda windows: math.floor(windows.size(0) / 4)),
    'len': _windows(lambda windows: len(windows) // 4),
    'numel': _windows(lambda windows: windows.numel() // 256),
    'float': lambda self, x: self.conv(x) / float(x.shape[0]),
    'zeros': lambda self, x: self.conv(x) + torch.zeros(x.shape[0], 1, x.shape[2], 1),
    'expand': lambda self, x: self.conv(x) + torch.ones(1, 4, 1, 1).expand(x.shape[0], -1, -1, -1),
    'interpolate': lambda self, x: self.conv(x) + F.interpolate(torch.ones(1, 1, 2, 2), size=tuple(x.shape[2:])),
    'masks': _masks,
    'linspace': lambda self, x: self.conv(x) + torch.linspace(0.5, x.shape[3] - 0.5, x.shape[3]),
}


@pytest.mark.parametrize('function', BATCHES.values(), ids=BATCHES)
def test_any_batch_size(function: Callable[[Any, Tensor], Any]) -> None:
    model = net(function, conv=conv())
    wanted = {count: run(model, images(count, seed=1, size=8)) for count in (1, 2, 3, 5)}
    traced = trace_image_graph(model, images(2, size=8))
    assert not traced.opaque
    for count, outputs in wanted.items():
        found = run(traced.compile(), images(count, seed=1, size=8))
        torch.testing.assert_close(found, outputs, rtol=0, atol=0)


def test_maps_keep_height_and_width_free() -> None:
    model = net(_masks, conv=conv())
    wanted = run(model, other_size(images(3, size=8)))
    traced = trace_image_graph(model, images(2, size=8))
    assert traced.free_size
    torch.testing.assert_close(run(traced.compile(), other_size(images(3, size=8))), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ('function', 'where'),
    [
        (
            lambda self, x: self.conv(x)[..., : int(x.shape[2]) // 2 * 2],
            r'backbone: test_sizes.py:\d+: expected the same',
        ),
        (lambda self, x: _masks(self, x).mean((2, 3)), r'backbone: test_sizes.py:\d+'),
        (
            lambda self, x: self.conv(x) * F.avg_pool2d(self.conv(x), x.shape[2:]),
            r'backbone: test_sizes.py:\d+',
        ),
        (lambda self, x: self.conv(x).flatten(1) @ torch.ones(256, 2), 'the model does not run at another height'),
    ],
    ids=['int', 'folded', 'window', 'fixed'],
)
def test_a_graph_that_computes_with_one_size_takes_no_other(function: Any, where: str) -> None:
    model = net(function, conv=conv())
    traced = trace_image_graph(model, images(2, size=8))
    assert traced.frozen and re.match(where, traced.frozen[0])
    traced.attach(traced.compile())
    assert run(model, images(3, size=8)).shape[0] == 3
    with pytest.raises(GraphError, match='expected images of 3 x 8 x 8, .* but got 3 x 32 x 24'):
        run(model, other_size(images(2, size=8)))


def test_sizes_become_constants() -> None:
    traced = trace_image_graph(net(lambda self, x: _masks(self, x).mean((2, 3)), conv=conv()), images(2, size=8))
    operations = sorted(n.op for n in traced.graph.nodes)
    assert operations == ['call_function', 'call_method', 'call_module', 'get_attr', 'output', 'placeholder']


def test_converted_values_without_images_are_no_constant() -> None:
    """They are alike for a pair of images and for the pair with the first once more, as two traces have them."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        return (y + y.amax(0).type(torch.float32)).mean((2, 3))

    model = net(forward, conv=conv())
    wanted = run(model, images(5, seed=1, size=8))
    traced = trace_image_graph(model, images(2, size=8))
    torch.testing.assert_close(run(traced.compile(), images(5, seed=1, size=8)), wanted, rtol=0, atol=0)


class _Loops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.inner(x[i]) for i in range(x.shape[0])])


def test_a_loop_over_images_is_an_opaque_call() -> None:
    model = net(lambda self, x: self.loops(self.conv(x)), conv=conv(), loops=_Loops())
    wanted = run(model, images(5, size=8))
    traced = trace_image_graph(model, images(2, size=8))
    assert re.search(r'test_sizes.py:\d+: expected the same operations', traced.opaque['backbone.loops'])
    assert traced.value_dependent == {'backbone.loops'}
    torch.testing.assert_close(run(traced.compile(), images(5, size=8)), wanted, rtol=0, atol=0)


def test_a_loop_over_images_of_the_model_itself_is_refused() -> None:
    with pytest.raises(GraphError, match=r'^_Loops cannot be traced: test_sizes.py:\d+: expected the same operations'):
        trace_image_graph(_Loops(), torch.randn(2, 4, 8, 8))
