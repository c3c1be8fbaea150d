"""Finds the values of a graph that share their channels, and the layers that write and read them.

Where every operation between layers is positively homogeneous in each channel (ReLU, pooling, adding), channel ``c`` of
a value may be divided by any ``r_c > 0`` if the layers that write it divide their output channel by ``r_c`` and the
layers that read it multiply their input channel by it: the network computes what it did before (Nagel et al., Data-Free
Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.graph.roles import Roles, joined
from mmbrecq.graph.tracer import TRANSPOSED

_HOMOGENEOUS = (
    'relu', 'leakyrelu', 'maxpool2d', 'avgpool2d', 'adaptiveavgpool2d', 'adaptivemaxpool2d', 'flatten', 'getitem',
    'view', 'reshape', 'contiguous',
)  # fmt: skip


@dataclass
class ChannelGroup:
    """Values whose channels can only be scaled together.

    Args:
        quantizers: Paths of the activation quantizers that they pass.
        writers: Paths of the layers whose output channels they are.
        readers: Paths of the layers whose input channels they are.
    """

    quantizers: list[str]
    writers: list[str]
    readers: list[str]


def find_channel_groups(roles: Roles) -> list[ChannelGroup]:
    """Returns the groups of a graph whose channels can be scaled without changing what it computes."""
    # values, and inputs and outputs of layers, that share their channels
    pairs: list[tuple[Any, Any]] = []
    fixed: set[Any] = set()
    for node in roles.graph.nodes:
        sources = [n for n in node.all_input_nodes if roles.is_tensor(n)]
        if roles.is_weighted(node) and _scales_by_channel(node, roles.module(node)):
            # a layer may be called several times: all its inputs share their channels, and all its outputs
            layer = str(node.target)
            pairs += [((layer, 'output'), node), *(((layer, 'input'), source) for source in sources)]
        elif sources and _keeps_channels(node, sources, roles):
            pairs += [(source, node) for source in sources]
        elif not isinstance(node.meta.get('example'), (int, torch.Size)):
            # a size tells nothing of what is in its source
            fixed.update([node, *sources])
    groups = []
    for members in joined(pairs):
        nodes = [n for n in members if isinstance(n, fx.Node)]
        quantizers = [str(n.target) for n in nodes if isinstance(roles.module(n), FakeQuantize)]
        ends = [member for member in members if isinstance(member, tuple)]
        writers, readers = ([path for path, end in ends if end == kind] for kind in ('output', 'input'))
        if writers and readers and fixed.isdisjoint(members):
            groups.append(ChannelGroup(quantizers, writers, readers))
    return groups


def _scales_by_channel(node: fx.Node, module: nn.Module | None) -> bool:
    """Returns whether axis 1 of the values is axis 1, or 0, of the weight."""
    is_plain = not isinstance(module, TRANSPOSED)
    return is_plain and (not isinstance(module, nn.Linear) or bool(node.meta['example'].dim() == 2))


def _keeps_channels(node: fx.Node, sources: list[fx.Node], roles: Roles) -> bool:
    is_homogeneous = roles.operation(node) in _HOMOGENEOUS or isinstance(roles.module(node), FakeQuantize)
    same = roles.is_tensor(node) and len({n.meta['example'].shape[:2] for n in (node, *sources)}) == 1
    return same and (roles.is_add(node) or (is_homogeneous and len(sources) == 1))
