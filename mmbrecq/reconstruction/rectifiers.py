"""Activation functions computed by the quantizers behind them, while a unit is trained.

Memory, not arithmetic, limits both: together they take one pass over a feature map where they took two, forward and
backward.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.graph.components import graph_module

_CALLS: dict[Any, tuple[float, float]] = {
    F.relu: (0.0, math.inf), torch.relu: (0.0, math.inf), 'relu': (0.0, math.inf), F.relu6: (0.0, 6.0),
}  # fmt: skip


@contextmanager
def rectified(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the unit without those of its rectifiers that quantizers compute within the block; itself if it has none.

    Hooks of a rectifier are not called within the block.
    """
    found = _find(module) if isinstance(module, fx.GraphModule) else {}
    if not isinstance(module, fx.GraphModule) or not found:
        yield module
        return
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = copies[node.args[0]] if node in found else graph.node_copy(node, copies.__getitem__)
    try:
        for quantizer, bounds in found.values():
            quantizer.rectifier = bounds
        yield graph_module(module, graph, type(module).__name__)
    finally:
        for quantizer, _ in found.values():
            quantizer.rectifier = None


def _find(module: fx.GraphModule) -> dict[fx.Node, tuple[FakeQuantize, tuple[float, float]]]:
    """Returns rectifiers that one enabled quantizer alone reads, which is called nowhere else, with their bounds."""
    calls: dict[FakeQuantize, list[fx.Node]] = {}
    for node in module.graph.nodes:
        called = module.get_submodule(str(node.target)) if node.op == 'call_module' else None
        if isinstance(called, FakeQuantize) and called.enabled:
            calls.setdefault(called, []).append(node)
    found = {}
    for quantizer, nodes in calls.items():
        rectifier: Any = nodes[0].args[0]
        bounds = _bounds(rectifier, module)
        if len(nodes) == 1 and bounds is not None and len(rectifier.users) == 1:
            found[rectifier] = quantizer, bounds
    return found


def _bounds(node: fx.Node, module: nn.Module) -> tuple[float, float] | None:
    """Returns the bounds of the values of a rectifier; None for any other node."""
    if node.op in ('call_function', 'call_method'):
        return _CALLS.get(node.target)
    called: Any = module.get_submodule(str(node.target)) if node.op == 'call_module' else None
    if type(called) is nn.ReLU:
        return _CALLS[F.relu]
    return (called.min_val, called.max_val) if type(called) in (nn.ReLU6, nn.Hardtanh) else None
