"""Layers of a unit that compute in bfloat16 while something about them is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

DTYPES = {'bfloat16': torch.bfloat16}
"""What a config calls them."""
FEWEST_ROWS = 256
"""On a CPU, positions of all images that a layer reads below which the conversion of its weight costs more than it
gains."""


@contextmanager
def autocast(layers: Iterable[nn.Module], dtype: torch.dtype | None) -> Iterator[None]:
    """The layers multiply in ``dtype`` and return what they got, within the block.

    Only the products are cast: fake quantization, sums of branches, losses and everything that is learned stay in
    float32. Depthwise convolutions stay as they are, for they have no fast kernels in ``dtype`` on a CPU.

    Args:
        layers: Convolutions and linear layers of the unit; none of them is changed for good.
        dtype: None changes nothing.
    """
    with ExitStack() as stack:
        for layer in layers:
            if dtype is not None and not _is_grouped(layer):
                # found by the call of the module in the place of its class's
                layer.forward = _casting(layer.forward, dtype, -1 if isinstance(layer, nn.Linear) else 1)
                stack.callback(delattr, layer, 'forward')
        yield


def _is_grouped(layer: nn.Module) -> bool:
    return getattr(layer, 'groups', 1) > 1


def _casting(forward: Callable[[Tensor], Tensor], dtype: torch.dtype, channels: int) -> Callable[[Tensor], Tensor]:
    """``forward`` in ``dtype`` where that pays; ``channels`` is the axis that it sums over."""

    def cast(x: Tensor) -> Tensor:
        if x.device.type == 'cpu' and x.numel() // x.shape[channels] < FEWEST_ROWS:
            return forward(x)
        with torch.autocast(x.device.type, dtype):
            return forward(x).to(x.dtype)

    return cast
