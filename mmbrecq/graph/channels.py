"""Finds the values of a graph that share their channels, and the layers that write and read them.

Where every operation between layers is positively homogeneous in each channel (ReLU, pooling, adding), channel ``c`` of
a value may be divided by any ``r_c > 0`` if the layers that write it divide their output channel by ``r_c`` and the
layers that read it multiply their input channel by it: the network computes what it did before (Nagel et al., Data-Free
Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.graph.roles import Roles
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

    quantizers: list[str] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)


def find_channel_groups(roles: Roles) -> list[ChannelGroup]:
    """Returns the groups of a graph whose channels can be scaled without changing what it computes."""
    return _Finder(roles).groups()


class _Finder:
    """Joins values, and inputs and outputs of layers, that share their channels (disjoint sets)."""

    def __init__(self, roles: Roles) -> None:
        self.roles = roles
        self.leader: dict[Any, Any] = {}
        self.fixed: set[Any] = set()

    def groups(self) -> list[ChannelGroup]:
        for node in self.roles.graph.nodes:
            self._connect(node)
        fixed = {self._find(key) for key in self.fixed}
        groups: dict[Any, ChannelGroup] = {}
        for key in list(self.leader):
            leader = self._find(key)
            if leader not in fixed:
                group = groups.setdefault(leader, ChannelGroup())
                if isinstance(key, tuple):
                    (group.writers if key[1] == 'output' else group.readers).append(key[0])
                elif isinstance(self.roles.module(key), FakeQuantize):
                    group.quantizers.append(str(key.target))
        return [group for group in groups.values() if group.writers and group.readers]

    def _connect(self, node: fx.Node) -> None:
        sources = [n for n in node.all_input_nodes if self.roles.is_tensor(n)]
        if self.roles.is_weighted(node) and self._scales_by_channel(node):
            # a layer may be called several times: all its inputs share their channels, and all its outputs
            layer = str(node.target)
            self._join(node, (layer, 'output'))
            for source in sources:
                self._join(source, (layer, 'input'))
        elif sources and self._keeps_channels(node, sources):
            for source in sources:
                self._join(node, source)
        elif not isinstance(node.meta.get('example'), (int, torch.Size)):
            # a size tells nothing of what is in its source
            self.fixed.update([node, *sources])

    def _scales_by_channel(self, node: fx.Node) -> bool:
        """Returns whether axis 1 of the values is axis 1, or 0, of the weight."""
        module = self.roles.module(node)
        is_plain = not isinstance(module, TRANSPOSED)
        return is_plain and (not isinstance(module, nn.Linear) or bool(node.meta['example'].dim() == 2))

    def _keeps_channels(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        if not self.roles.is_tensor(node):
            return False
        is_homogeneous = self.roles.operation(node) in _HOMOGENEOUS or isinstance(self.roles.module(node), FakeQuantize)
        same = len({n.meta['example'].shape[:2] for n in (node, *sources)}) == 1
        return same and (self.roles.is_add(node) or (is_homogeneous and len(sources) == 1))

    def _find(self, key: Any) -> Any:
        self.leader.setdefault(key, key)
        while self.leader[key] != key:
            key = self.leader[key]
        return key

    def _join(self, a: Any, b: Any) -> None:
        self.leader[self._find(a)] = self._find(b)
