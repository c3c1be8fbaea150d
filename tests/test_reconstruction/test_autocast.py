"""Which layers multiply in bfloat16, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction import BRECQReconstructor, QDropReconstructor, Task
from mmbrecq.reconstruction.optimize import FEWEST_ROWS, autocast

Prepare = Callable[..., QuantizedModel]
MakeTask = Callable[..., Task]
PRODUCTS = ('convolution', 'addmm', 'mm')


class Products(TorchDispatchMode):
    """Notes the types in which products are computed, forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in PRODUCTS):
            self.dtypes.update(x.dtype for x in args if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def forward(layer: nn.Module, x: Tensor) -> tuple[Tensor, set[torch.dtype]]:
    with autocast([layer], torch.bfloat16), Products() as products:
        return layer(x), products.dtypes


@pytest.mark.parametrize(
    ('layer', 'shape'),
    [
        (nn.Conv2d(4, 6, 3), (2, 4, 20, 20)),
        (nn.Conv2d(4, 6, 1), (FEWEST_ROWS, 4, 1, 1)),
        (nn.ConvTranspose2d(4, 6, 3), (2, 4, 20, 20)),
        (nn.Linear(4, 6), (FEWEST_ROWS, 4)),
        (nn.Linear(4, 6), (4, FEWEST_ROWS // 4, 4)),
    ],
)
def test_products_of_eight_bits(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = layer(x).detach()
    found, dtypes = forward(layer, x)
    assert dtypes == {torch.bfloat16}
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    # each factor and the result lose at most half of the last of eight bits
    reach = 4 * 2.0**-8 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=reach)
    # as it was, in every bit
    assert torch.equal(layer(x), expected)
    assert 'forward' not in vars(layer)


@pytest.mark.parametrize(
    ('layer', 'shape'),
    [
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 20, 20)),
        (nn.Conv2d(4, 6, 1), (FEWEST_ROWS - 1, 4, 1, 1)),
        (nn.Linear(4, 6), (FEWEST_ROWS - 1, 4)),
    ],
    ids=['depthwise', 'few pixels', 'few rows'],
)
def test_what_gains_nothing_stays(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found, dtypes = forward(layer, x)
    assert dtypes == {torch.float32}
    assert torch.equal(found, layer(x))


def test_a_layer_survives_an_error() -> None:
    layer = nn.Conv2d(4, 6, 3)
    with pytest.raises(RuntimeError), autocast([layer], torch.bfloat16):
        layer(torch.randn(2, 5, 20, 20))
    assert 'forward' not in vars(layer)
    with autocast([layer], None):
        assert 'forward' not in vars(layer)


class _Silent:
    """Wants to know nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


@pytest.mark.parametrize('reconstructor', [BRECQReconstructor, QDropReconstructor])
def test_a_model_learned_with_it(
    prepared: Prepare, task: MakeTask, reconstructor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps multiply in bfloat16, losses before and after do not; both runs end alike."""
    passes = ('weights', 'activations') if reconstructor is BRECQReconstructor else ('joint',)
    results, dtypes = {}, {}
    for name in (None, 'bfloat16'):
        work = task(prepared())
        made = reconstructor(**{key: {'iterations': 40, 'batch_size': 8, 'autocast': name} for key in passes})
        with Products() as products:
            results[name] = made.run(work, made.plan(work), _Silent())
        dtypes[name] = products.dtypes
        assert all(parameter.dtype == torch.float32 for parameter in work.model.model.parameters())
    assert dtypes[None] == {torch.float32}
    assert dtypes['bfloat16'] == {torch.float32, torch.bfloat16}
    pairs = list(zip(results[None], results['bfloat16'], strict=True))
    # the same float32 passes before anything is learned
    assert pairs[0][0].loss_before == pairs[0][1].loss_before
    for plain, cast in pairs:
        assert cast.loss_after == pytest.approx(plain.loss_after, rel=0.3, abs=1e-4)
    assert any(plain.loss_after != cast.loss_after for plain, cast in pairs)
