"""The order in memory of the activations of a unit while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

RESHAPES = ('view', 'flatten', 'unflatten', 'reshape')
"""Methods that may refuse channels that lie innermost, or copy."""


def memory_format(module: nn.Module) -> torch.memory_format:
    """Channels innermost for a unit with depthwise convolutions, which gain by it on a CPU; else as torch has them.

    Args:
        module: The unit. One that is no graph, or has a module that is not torch's own, may depend on the order.
    """
    graph = getattr(module, 'graph', None)
    if not isinstance(graph, fx.Graph):
        return torch.contiguous_format
    called = [module.get_submodule(str(node.target)) for node in graph.nodes if node.op == 'call_module']
    depthwise = any(isinstance(m, nn.Conv2d) and m.groups > 1 and m.groups == m.in_channels for m in called)
    reshaped = any(node.op == 'call_method' and node.target in RESHAPES for node in graph.nodes)
    return torch.channels_last if depthwise and not reshaped else torch.contiguous_format


def laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    """``x`` without gaps, of four axes in the given order: a copy or itself."""
    return x.contiguous(memory_format=layout) if x.dim() == 4 else x.contiguous()


def empty(shape: Sequence[int], layout: torch.memory_format, **options: Any) -> Tensor:
    """An uninitialised tensor that lies as :func:`laid_out` would have it; ``options`` are those of ``torch.empty``."""
    return torch.empty(tuple(shape), memory_format=layout if len(shape) == 4 else torch.contiguous_format, **options)
