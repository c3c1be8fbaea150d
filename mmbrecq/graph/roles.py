"""What a node of the graph does, as far as quantization cares. Told by type and operator, never by name."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mmbrecq.graph.ranges import Range, value_range
from mmbrecq.graph.tracer import WEIGHTED

_ADD = (operator.add, torch.add, 'add')
_CONCAT = (torch.cat, torch.concat, torch.concatenate)
_ACTIVATION_CALLS = (
    F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.leaky_relu, F.elu, F.mish,
    torch.relu, torch.sigmoid, torch.tanh, F.sigmoid, 'relu', 'sigmoid', 'tanh',
)  # fmt: skip
_ACTIVATION_NAMES = ('Swish', 'HSwish', 'HSigmoid', 'Clamp')
# these move values about without computing new ones, so what lies on a grid stays on it
_MOVES = (nn.MaxPool2d, nn.Flatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ZeroPad2d, nn.ChannelShuffle)
_MOVES_CALLS = (
    torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze, torch.chunk,
    torch.split, F.max_pool2d, F.pixel_shuffle, operator.getitem,
    'flatten', 'reshape', 'view', 'permute', 'transpose', 'squeeze', 'unsqueeze', 'contiguous', 'chunk', 'split',
    'expand', 'clone', *_CONCAT,
)  # fmt: skip

# of these, the ones whose output has the channels of their input, in the same order
_MOVES_PIXELS = (nn.MaxPool2d, nn.Upsample, nn.ZeroPad2d)
_MOVES_PIXELS_CALLS = (F.max_pool2d, F.interpolate, 'contiguous', 'clone')

_NORMS = (
    nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.modules.batchnorm._NormBase,
)  # fmt: skip
_NORM_CALLS = (
    F.layer_norm, F.group_norm, F.rms_norm, F.batch_norm, F.instance_norm, F.local_response_norm, F.normalize,
    torch.layer_norm, torch.group_norm, torch.rms_norm, torch.batch_norm, torch.instance_norm,
)  # fmt: skip
# what a normalisation that is written out computes of its input first
_SPREAD_CALLS = (
    torch.var, torch.std, torch.var_mean, torch.std_mean, torch.square, torch.pow, torch.norm,
    torch.linalg.vector_norm, operator.pow, 'var', 'std', 'square', 'pow', 'norm',
)  # fmt: skip
_MEAN_CALLS = (torch.mean, 'mean')
_AFFINE_CALLS = (
    *_ADD, operator.sub, torch.sub, 'sub', operator.mul, torch.mul, 'mul', operator.truediv, torch.div, 'div',
    operator.neg, torch.neg, 'neg',
)  # fmt: skip

_NEAREST = ('nearest', 'nearest-exact')


class Roles:
    """Answers questions about the nodes of one graph.

    Args:
        model: Owner of the modules that the graph calls.
        graph: A graph whose nodes carry ``meta['example']``.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model, self.graph = model, graph
        self._ranges: dict[fx.Node, Range] | None = None

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that ``node`` calls, None for a function."""
        return self.model.get_submodule(str(node.target)) if node.op == 'call_module' else None

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether the value is a floating-point tensor."""
        example = node.meta.get('example')
        return isinstance(example, Tensor) and example.is_floating_point() and node.op not in ('get_attr', 'output')

    def is_weighted(self, node: fx.Node) -> bool:
        """A convolution or linear layer."""
        return isinstance(self.module(node), WEIGHTED)

    def is_add(self, node: fx.Node) -> bool:
        """An addition of two feature maps."""
        return self._calls(node, _ADD) and sum(self.is_tensor(n) for n in node.all_input_nodes) == 2

    def is_affine(self, node: fx.Node) -> bool:
        """Adds a constant to a feature map, or multiplies it by one."""
        return self._calls(node, _AFFINE_CALLS) and sum(self.is_tensor(n) for n in node.all_input_nodes) == 1

    def is_norm(self, node: fx.Node) -> bool:
        """A normalisation, or the operation that one which is written out starts with."""
        if isinstance(self.module(node), _NORMS) or self._calls(node, (*_NORM_CALLS, *_SPREAD_CALLS)):
            return True
        subtracted = node.all_input_nodes[1:] if self._calls(node, (operator.sub, torch.sub, 'sub')) else ()
        return any(self._calls(n, _MEAN_CALLS) and node.all_input_nodes[0] in n.all_input_nodes for n in subtracted)

    def is_convolution(self, node: fx.Node) -> bool:
        """A convolution that is not transposed."""
        return isinstance(self.module(node), (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def is_depthwise(self, node: fx.Node) -> bool:
        """A convolution of which every output channel reads one input channel."""
        module: Any = self.module(node)
        return self.is_convolution(node) and bool(module.groups == module.in_channels > 1)

    def moves_pixels(self, node: fx.Node) -> bool:
        """Moves values within their channels."""
        within = isinstance(self.module(node), _MOVES_PIXELS) or self._calls(node, _MOVES_PIXELS_CALLS)
        return within and self.moves_only(node)

    def is_concat(self, node: fx.Node) -> bool:
        """A concatenation."""
        return self._calls(node, _CONCAT)

    def is_activation(self, node: fx.Node) -> bool:
        """An element-wise activation function."""
        module = self.module(node)
        if module is not None:
            known = type(module).__module__ == 'torch.nn.modules.activation'
            return (known and not isinstance(module, nn.MultiheadAttention)) or self.kind(node) in _ACTIVATION_NAMES
        return self._calls(node, _ACTIVATION_CALLS)

    def moves_only(self, node: fx.Node) -> bool:
        """Moves or selects values: max-pooling, reshaping, concatenation, resizing to nearest, padding by zeros."""
        moves = isinstance(self.module(node), _MOVES) or self._calls(node, _MOVES_CALLS)
        return moves or self._resizes_to_nearest(node) or self._pads_with_zeros(node)

    def kind(self, node: fx.Node) -> str:
        """Class name of the module, or name of the function."""
        module = self.module(node)
        if module is not None:
            return type(module).__name__
        return str(getattr(node.target, '__name__', node.target))

    def non_negative(self, node: fx.Node) -> bool:
        """Whether the operators show that no value can be negative, whatever the input."""
        if self._ranges is None:
            self._ranges = {}
            for each in self.graph.nodes:
                self._ranges[each] = value_range(each, self._ranges, self.module(each), self.moves_only(each))
        return self._ranges[node][0] >= 0

    def consumers(self, node: fx.Node) -> Iterator[fx.Node]:
        """Nodes that compute with the value, found through those that only move it."""
        for user in node.users:
            if self.moves_only(user):
                yield from self.consumers(user)
            else:
                yield user

    def sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """Nodes that compute what ``node`` reads, found through those that only move it."""
        for source in node.all_input_nodes:
            if self.moves_only(source):
                yield from self.sources(source)
            else:
                yield source

    def _resizes_to_nearest(self, node: fx.Node) -> bool:
        module = self.module(node)
        if isinstance(module, nn.Upsample):
            return str(module.mode) in _NEAREST
        if not self._calls(node, (F.interpolate,)):
            return False
        mode = node.args[3] if len(node.args) > 3 else node.kwargs.get('mode', 'nearest')
        return mode in _NEAREST

    def _pads_with_zeros(self, node: fx.Node) -> bool:
        if not self._calls(node, (F.pad,)):
            return False
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get('mode', 'constant')
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get('value')
        return mode != 'constant' or value in (None, 0)

    def _calls(self, node: fx.Node, targets: tuple[Any, ...]) -> bool:
        return node.op in ('call_function', 'call_method') and node.target in targets
