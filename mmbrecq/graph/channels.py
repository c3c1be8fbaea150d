"""Finds the values of a graph that share their channels, and the layers that write and read them.

Where every operation between layers is positively homogeneous in each channel (ReLU, pooling, adding), channel ``c`` of
a value may be divided by any ``r_c > 0`` if the layers that write it divide their output channel by ``r_c`` and the
layers that read it multiply their input channel by it: the network computes what it did before (Nagel et al., Data-Free
Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.1). A normalisation with a gain of
its own for each channel writes, too (Xiao et al., SmoothQuant, ICML 2023). Where it has an offset and the layers behind
have biases, a constant may be taken from each channel as well (Li et al., RepQ-ViT, ICCV 2023).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.graph.roles import Roles, joined
from mmbrecq.graph.symbolic import evaluate
from mmbrecq.graph.tracer import TRANSPOSED, WEIGHTED

_BY_ELEMENT = ('relu', 'leakyrelu')
_COPYING = ('contiguous', 'clone')
_ROTATING = ('roll', 'flip')
_POOLING = ('maxpool2d', 'avgpool2d', 'adaptiveavgpool2d', 'adaptivemaxpool2d')

_ENDS = ('input', 'output')


@dataclass
class ChannelGroup:
    """Values whose channels can only be scaled together.

    Args:
        quantizers: Paths of the activation quantizers that they pass, each with the axis of their channels.
        writers: Paths of the layers and normalisations whose output channels they are.
        readers: Paths of the layers whose input channels they are.
        is_normalised: Whether normalisations alone write them.
        can_shift: Whether a constant may be taken from each channel, too: biases of writers and readers make up for it.
    """

    quantizers: dict[str, int]
    writers: list[str]
    readers: list[str]
    is_normalised: bool
    can_shift: bool


def find_channel_groups(roles: Roles) -> list[ChannelGroup]:
    """Returns the groups of a graph whose channels can be scaled without changing what it computes."""
    # values, and inputs and outputs of layers, that share their channels
    pairs: list[tuple[Any, Any]] = []
    fixed: set[Any] = set()
    unshifted: set[Any] = set()
    for node in roles.graph.nodes:
        sources = [n for n in node.all_input_nodes if roles.is_tensor(n)]
        axis, layer = _channel_axis(node, roles.module(node)), str(node.target)
        fixed.update((inner, end) for inner in node.meta.get('layers', ()) for end in _ENDS if inner != layer)
        if axis is not None:
            # a layer may be called several times: all its inputs share their channels, and all its outputs
            ends = {node: 'output', **dict.fromkeys(sources if roles.is_weighted(node) else (), 'input')}
            pairs += [((layer, end), (value, axis)) for value, end in ends.items()]
            if getattr(roles.module(node), 'bias', None) is None or roles.pads(node):
                unshifted.update((layer, end) for end in _ENDS)
            along = [(value, a) for value in (node, *sources) for a in _axes(value)]
            fixed.update((value, a) for value, a in along if value not in ends or a != axis)
        elif not isinstance(node.meta.get('example'), (int, torch.Size)):
            # a size tells nothing of what is in its source
            carried = [((source, a), _carried(node, source, a, roles)) for source in sources for a in _axes(source)]
            pairs += [(value, (node, to)) for value, (to, _) in carried if to is not None]
            fixed.update(value for value, (to, _) in carried if to is None)
            fixed.update((node, a) for a in _axes(node) if all(a != to for _, (to, _) in carried))
            unshifted.update(value for value, (_, as_is) in carried if not as_is)
    groups = (_group(members, roles, unshifted) for members in joined(pairs) if fixed.isdisjoint(members))
    return [group for group in groups if group is not None]


def _axes(node: fx.Node) -> range:
    example = node.meta.get('example')
    return range(example.dim() if isinstance(example, Tensor) else 0)


def _group(members: list[Any], roles: Roles, unshifted: set[Any]) -> ChannelGroup | None:
    values = [member for member in members if isinstance(member[0], fx.Node)]
    ends = [member for member in members if not isinstance(member[0], fx.Node)]
    writers, readers = ([path for path, end in ends if end == kind] for kind in ('output', 'input'))
    if not writers or not readers:
        return None
    quantizers = {str(n.target): axis for n, axis in values if isinstance(roles.module(n), FakeQuantize)}
    is_normalised = not any(isinstance(roles.model.get_submodule(path), WEIGHTED) for path in writers)
    return ChannelGroup(quantizers, writers, readers, is_normalised, is_normalised and unshifted.isdisjoint(members))


def _channel_axis(node: fx.Node, module: Any) -> int | None:
    """Returns the axis of the channels that a module has a factor each for, None where it has none."""
    if isinstance(module, nn.Linear):
        return int(node.meta['example'].dim()) - 1
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None if isinstance(module, TRANSPOSED) else 1
    if not type(module).__module__.startswith('torch.nn.'):
        # a class derived from one of torch's may normalise along another axis
        return None
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        has_one = module.weight is not None and module.weight.dim() == 1
        return int(node.meta['example'].dim()) - 1 if has_one else None
    is_norm = isinstance(module, (nn.GroupNorm, _NormBase)) and module.weight is not None
    return 1 if is_norm else None


def _carried(node: fx.Node, source: fx.Node, axis: int, roles: Roles) -> tuple[int | None, bool]:
    """Returns the axis of the result along which the channels of an input lie, None where on none.

    Each may have a factor of its own; the second result tells whether they are the very values of the input.
    """
    wanted, name = source.meta['example'].shape, roles.operation(node)
    if not roles.is_tensor(node) or not wanted:
        return None, False
    example: Tensor = node.meta['example']
    is_same = isinstance(roles.module(node), FakeQuantize) or name in _COPYING
    if is_same or name in _BY_ELEMENT or roles.is_add(node):
        return (axis if example.shape == wanted else None), is_same
    if name in _POOLING:
        return (axis if axis <= 1 and example.shape[:2] == wanted[:2] else None), False
    moves = roles.moves_only(node) or name in _ROTATING
    if not moves or sum(map(roles.is_tensor, node.all_input_nodes)) != 1:
        return None, False
    shape = [-1 if a == axis else 1 for a in range(len(wanted))]
    # in the order in memory of the value, which decides whether it has a view
    channels = torch.empty_like(source.meta['example'], dtype=torch.float32, device='cpu')
    channels.copy_(torch.arange(1.0, wanted[axis] + 1).view(shape).expand(wanted))
    try:
        moved = evaluate(node, lambda n: channels if n is source else n.meta['example'], roles.model)
    except RuntimeError:
        # a slice of a value has another order
        return None, False
    for to, size in enumerate(moved.shape):
        order = torch.arange(1.0, size + 1, device=moved.device)
        order = order.view([-1 if a == to else 1 for a in range(moved.dim())])
        # padding stays 0 whatever the factor
        if size == wanted[axis] and size > 1 and bool(((moved == order) | (moved == 0)).all()):
            # and images of another size may be padded where the example is not
            return to, 'pad' not in name and bool((moved == order).all())
    return None, False
