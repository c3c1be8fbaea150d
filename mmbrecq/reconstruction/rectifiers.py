"""Activation functions computed by the quantizers behind them, while a unit is trained.

Memory, not arithmetic, limits both: together they take one pass over a feature map where they took two, forward and
backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.graph.modules import graph_module

_CALLS: dict[Any, tuple[float, float]] = {
    F.relu: (0.0, math.inf), torch.relu: (0.0, math.inf), 'relu': (0.0, math.inf), F.relu6: (0.0, 6.0),
}  # fmt: skip


@contextmanager
def rectified(module: nn.Module) -> Iterator[nn.Module]:
    """The unit without those of its rectifiers that quantizers compute within the block; itself where there are none.

    Args:
        module: The unit; all quantizers that it calls and that are enabled are asked.
    """
    found = _find(module) if isinstance(module, fx.GraphModule) else []
    if not isinstance(module, fx.GraphModule) or not found:
        yield module
        return
    try:
        for pair in found:
            pair.quantizer.rectifier = pair.bounds
        yield _without_rectifiers(module, found)
    finally:
        for pair in found:
            pair.quantizer.rectifier = None


@dataclass(frozen=True)
class _Pair:
    """A rectifier, and the quantizer that alone reads it.

    Args:
        node: The rectifier.
        source: What it reads.
        bounds: Of its values.
        quantizer: The quantizer.
    """

    node: fx.Node
    source: fx.Node
    bounds: tuple[float, float]
    quantizer: FakeQuantize


def _find(module: fx.GraphModule) -> list[_Pair]:
    """All pairs whose quantizer is enabled and called nowhere else."""
    calls: dict[FakeQuantize, list[fx.Node]] = {}
    for node in module.graph.nodes:
        called = module.get_submodule(str(node.target)) if node.op == 'call_module' else None
        if isinstance(called, FakeQuantize) and called.enabled:
            calls.setdefault(called, []).append(node)
    pairs = []
    for quantizer, nodes in calls.items():
        rectifier: Any = nodes[0].args[0]
        bounds = _bounds(rectifier, module)
        if len(nodes) == 1 and bounds is not None and len(rectifier.users) == 1:
            pairs.append(_Pair(rectifier, rectifier.args[0], bounds, quantizer))
    return pairs


def _bounds(node: fx.Node, module: nn.Module) -> tuple[float, float] | None:
    """The bounds of the values of a rectifier; None for any other node."""
    if node.op in ('call_function', 'call_method'):
        return _CALLS.get(node.target)
    called: Any = module.get_submodule(str(node.target)) if node.op == 'call_module' else None
    if called is None or called._forward_hooks or called._forward_pre_hooks:
        return None
    if type(called) is nn.ReLU:
        return _CALLS[F.relu]
    return (called.min_val, called.max_val) if type(called) in (nn.ReLU6, nn.Hardtanh) else None


def _without_rectifiers(module: fx.GraphModule, pairs: Sequence[_Pair]) -> fx.GraphModule:
    """A module like the given one in which the quantizers read what their rectifiers read."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    sources = {pair.node: pair.source for pair in pairs}
    for node in module.graph.nodes:
        if node in sources:
            copies[node] = copies[sources[node]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return graph_module(module, graph, type(module).__name__)
