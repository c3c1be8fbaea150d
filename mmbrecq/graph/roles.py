"""Classifies the nodes of a graph for quantization, by type and operator and never by name."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from mmbrecq.graph.ranges import Range, resize_mode, value_range
from mmbrecq.graph.symbolic import bind, called_module, operation
from mmbrecq.graph.tracer import ACTIVATION_NAMES, WEIGHTED

_CONCAT = ('cat', 'stack')
_ACTIVATIONS = (
    'relu', 'relu6', 'silu', 'gelu', 'hardswish', 'hardsigmoid', 'leakyrelu', 'elu', 'mish', 'sigmoid', 'tanh',
)  # fmt: skip
# these move values without computing new ones, so values on a grid stay on it
_MOVING = (
    'flatten', 'reshape', 'reshapeas', 'view', 'viewas', 'unflatten', 'permute', 'transpose', 'swapaxes', 'movedim',
    'squeeze', 'unsqueeze', 'chunk', 'split', 'splitwithsizes', 'tensorsplit', 'unbind', 'select', 'narrow', 'getitem',
    'indexselect', 'contiguous', 'expand', 'expandas', 'clone', 'maxpool2d', 'pixelshuffle', 'pixelunshuffle',
    'zeropad2d', 'channelshuffle', *_CONCAT,
)  # fmt: skip
# of what moves values, this has the channels of its input, in the same order
_WITHIN_CHANNELS = ('maxpool2d', 'upsample', 'interpolate', 'zeropad2d', 'contiguous', 'clone')

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, _NormBase)
_NORM_CALLS = (
    'layernorm', 'groupnorm', 'rmsnorm', 'batchnorm', 'instancenorm', 'localresponsenorm', 'normalize',
    # what a normalisation that is written out computes of its input first
    'var', 'std', 'varmean', 'stdmean', 'square', 'pow', 'norm', 'linalgvectornorm',
)  # fmt: skip
_UNPADDED = (0, (0,), (0, 0), (0, 0, 0), 'valid')
_AFFINE = ('add', 'sub', 'mul', 'div', 'neg')


class Roles:
    """Classifies the nodes of a graph that carry ``meta['example']``, and call modules of ``model``."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model, self.graph = model, graph
        self._ranges: dict[fx.Node, Range] | None = None

    def module(self, node: fx.Node) -> nn.Module | None:
        """Returns the module that ``node`` calls, None for a function."""
        return called_module(self.model, node)

    def operation(self, node: fx.Node) -> str:
        """Returns the name of what ``node`` computes, see :func:`mmbrecq.graph.symbolic.operation`."""
        return operation(node, self.module(node))

    def is_tensor(self, node: fx.Node) -> bool:
        """Returns whether the value is a floating-point tensor."""
        example = node.meta.get('example')
        return isinstance(example, Tensor) and example.is_floating_point() and node.op not in ('get_attr', 'output')

    def is_weighted(self, node: fx.Node) -> bool:
        """Returns whether ``node`` is a convolution or linear layer."""
        return isinstance(self.module(node), WEIGHTED)

    def is_add(self, node: fx.Node) -> bool:
        """Returns whether ``node`` adds two feature maps."""
        maps = [n for n in node.all_input_nodes if self.is_tensor(n) and 'values' in n.meta.get('depends', ('values',))]
        return self.operation(node) == 'add' and len(maps) == 2

    def is_affine(self, node: fx.Node) -> bool:
        """Returns whether ``node`` adds a constant to a feature map, or multiplies it by one."""
        return self.operation(node) in _AFFINE and sum(self.is_tensor(n) for n in node.all_input_nodes) == 1

    def is_norm(self, node: fx.Node) -> bool:
        """Returns whether ``node`` is a normalisation, or the first operation of one that is written out."""
        if isinstance(self.module(node), _NORMS) or self.operation(node) in _NORM_CALLS:
            return True
        subtracted = node.all_input_nodes[1:] if self.operation(node) == 'sub' else ()
        return any(self.operation(n) == 'mean' and node.all_input_nodes[0] in n.all_input_nodes for n in subtracted)

    def is_convolution(self, node: fx.Node) -> bool:
        """Returns whether ``node`` is a convolution that is not transposed."""
        return isinstance(self.module(node), (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def is_depthwise(self, node: fx.Node) -> bool:
        """Returns whether ``node`` is a convolution of which every output channel reads one input channel."""
        module: Any = self.module(node)
        return self.is_convolution(node) and bool(module.groups == module.in_channels > 1)

    def pads(self, node: fx.Node) -> bool:
        """Returns whether ``node`` computes with zeros around its input, or moves the values between zeros."""
        module = self.module(node)
        if isinstance(module, WEIGHTED):
            return getattr(module, 'padding', 0) not in _UNPADDED or not _computes_as_torchs(module)
        return 'pad' in self.operation(node)

    def moves_pixels(self, node: fx.Node) -> bool:
        """Returns whether ``node`` moves values within their channels alone."""
        return self.operation(node) in _WITHIN_CHANNELS and self.moves_only(node)

    def is_concat(self, node: fx.Node) -> bool:
        """Returns whether ``node`` is a concatenation."""
        return self.operation(node) in _CONCAT

    def is_activation(self, node: fx.Node) -> bool:
        """Returns whether ``node`` is an element-wise activation function."""
        module = self.module(node)
        if module is None:
            return self.operation(node) in _ACTIVATIONS
        name = type(module).__name__
        is_torchs = type(module).__module__ == 'torch.nn.modules.activation' and name != 'MultiheadAttention'
        return is_torchs or name in ACTIVATION_NAMES

    def moves_only(self, node: fx.Node) -> bool:
        """Returns whether ``node`` only moves or selects values, such as max-pooling, reshaping or padding by zeros."""
        name = self.operation(node)
        moves = name in _MOVING
        if name == 'getitem' and not self.is_tensor(source := node.all_input_nodes[0]):
            # one of several values that are computed at once is a new one
            moves = self.moves_only(source)
        is_nearest = resize_mode(node, self.module(node)) in ('nearest', 'nearest-exact')
        return moves or is_nearest or self._pads_with_zeros(node)

    def non_negative(self, node: fx.Node) -> bool:
        """Returns whether the operators show that no value can be negative, whatever the input."""
        if self._ranges is None:
            self._ranges = {}
            for each in self.graph.nodes:
                self._ranges[each] = value_range(each, self._ranges, self.module(each), self.moves_only(each))
        return self._ranges[node][0] >= 0

    def consumers(self, node: fx.Node, through: Callable[[fx.Node], bool] | None = None) -> Iterator[fx.Node]:
        """Yields the nodes that compute with the value, found ``through`` those that, by default, only move it."""
        return _across(node, 'users', through or self.moves_only)

    def sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yields the nodes that compute what ``node`` reads, found through those that only move it."""
        return _across(node, 'all_input_nodes', self.moves_only)

    def _pads_with_zeros(self, node: fx.Node) -> bool:
        bound = bind(node) if node.target is F.pad else None
        if bound is None:
            return False
        return bound.arguments.get('mode', 'constant') != 'constant' or bound.arguments.get('value') in (None, 0)


def _computes_as_torchs(module: Any) -> bool:
    """Returns whether a layer computes what torch's class does; another may pad its input by its size."""
    kind: Any = next(kind for kind in WEIGHTED if isinstance(module, kind))
    if type(module).forward is kind.forward:
        return True
    kernel = getattr(module, 'kernel_size', ())
    reach = max((k * d for k, d in zip(kernel, getattr(module, 'dilation', ()), strict=True)), default=0)
    for size in (reach + 4, reach + 5):
        shape = (1, module.in_channels, *[size for _ in kernel]) if kernel else (1, module.in_features)
        x = torch.linspace(-1, 1, math.prod(shape)).reshape(shape).to(module.weight)
        try:
            with torch.no_grad():
                own, plain = type(module).forward(module, x), kind.forward(module, x)
        except (RuntimeError, TypeError, ValueError):
            return False
        if own.shape != plain.shape or not torch.allclose(own, plain):
            return False
    return True


def _across(node: fx.Node, direction: str, through: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    for other in getattr(node, direction):
        if through(other):
            yield from _across(other, direction, through)
        else:
            yield other


def joined(pairs: Sequence[tuple[Any, Any]], items: Iterable[Any] = ()) -> list[list[Any]]:
    """Returns the groups of items that are joined in ``pairs``, directly or by others, in the order of the items."""
    groups = {item: [item] for item in chain(items, *pairs)}
    for a, b in pairs:
        first, second = groups[a], groups[b]
        if first is not second:
            first += second
            groups.update(dict.fromkeys(second, first))
    order = {item: index for index, item in enumerate(groups)}
    return [sorted(group, key=order.__getitem__) for group in {id(g): g for g in groups.values()}.values()]
