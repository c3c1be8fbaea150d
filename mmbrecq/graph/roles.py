"""Classifies the nodes of a graph for quantization, by type and operator and never by name."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mmbrecq.graph.ranges import Range, resize_mode, value_range
from mmbrecq.graph.symbolic import bind
from mmbrecq.graph.tracer import WEIGHTED

_ADD = (operator.add, torch.add, 'add')
_CONCAT = (torch.cat, torch.concat, torch.concatenate, torch.stack)
_ACTIVATION_CALLS = (
    F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.leaky_relu, F.elu, F.mish,
    torch.relu, torch.sigmoid, torch.tanh, F.sigmoid, 'relu', 'sigmoid', 'tanh',
)  # fmt: skip
_ACTIVATION_NAMES = ('Swish', 'HSwish', 'HSigmoid', 'Clamp')
# these move values without computing new ones, so values on a grid stay on it
_MOVES = (nn.MaxPool2d, nn.Flatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ZeroPad2d, nn.ChannelShuffle)
_MOVING = (
    'flatten', 'reshape', 'reshape_as', 'view', 'view_as', 'unflatten', 'permute', 'transpose', 'swapaxes', 'movedim',
    'squeeze', 'unsqueeze', 'chunk', 'split', 'split_with_sizes', 'tensor_split', 'unbind', 'select', 'narrow',
    'index_select', 'contiguous', 'expand', 'expand_as', 'clone',
)  # fmt: skip
_MOVES_CALLS = (
    *_MOVING, *(getattr(torch, name) for name in _MOVING if hasattr(torch, name)),
    *_CONCAT, F.max_pool2d, F.pixel_shuffle, F.pixel_unshuffle, operator.getitem,
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
    """Classifies the nodes of a graph that carry ``meta['example']``, and call modules of ``model``."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model, self.graph = model, graph
        self._ranges: dict[fx.Node, Range] | None = None

    def module(self, node: fx.Node) -> nn.Module | None:
        """Returns the module that ``node`` calls, None for a function."""
        return self.model.get_submodule(str(node.target)) if node.op == 'call_module' else None

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
        return self._calls(node, _ADD) and len(maps) == 2

    def is_affine(self, node: fx.Node) -> bool:
        """Returns whether ``node`` adds a constant to a feature map, or multiplies it by one."""
        return self._calls(node, _AFFINE_CALLS) and sum(self.is_tensor(n) for n in node.all_input_nodes) == 1

    def is_norm(self, node: fx.Node) -> bool:
        """Returns whether ``node`` is a normalisation, or the first operation of one that is written out."""
        if isinstance(self.module(node), _NORMS) or self._calls(node, (*_NORM_CALLS, *_SPREAD_CALLS)):
            return True
        subtracted = node.all_input_nodes[1:] if self._calls(node, (operator.sub, torch.sub, 'sub')) else ()
        return any(self._calls(n, _MEAN_CALLS) and node.all_input_nodes[0] in n.all_input_nodes for n in subtracted)

    def is_convolution(self, node: fx.Node) -> bool:
        """Returns whether ``node`` is a convolution that is not transposed."""
        return isinstance(self.module(node), (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def is_depthwise(self, node: fx.Node) -> bool:
        """Returns whether ``node`` is a convolution of which every output channel reads one input channel."""
        module: Any = self.module(node)
        return self.is_convolution(node) and bool(module.groups == module.in_channels > 1)

    def moves_pixels(self, node: fx.Node) -> bool:
        """Returns whether ``node`` moves values within their channels alone."""
        within = isinstance(self.module(node), _MOVES_PIXELS) or self._calls(node, _MOVES_PIXELS_CALLS)
        return within and self.moves_only(node)

    def is_concat(self, node: fx.Node) -> bool:
        """Returns whether ``node`` is a concatenation."""
        return self._calls(node, _CONCAT)

    def is_activation(self, node: fx.Node) -> bool:
        """Returns whether ``node`` is an element-wise activation function."""
        module = self.module(node)
        if module is not None:
            known = type(module).__module__ == 'torch.nn.modules.activation'
            return (known and not isinstance(module, nn.MultiheadAttention)) or self.kind(node) in _ACTIVATION_NAMES
        return self._calls(node, _ACTIVATION_CALLS)

    def moves_only(self, node: fx.Node) -> bool:
        """Returns whether ``node`` only moves or selects values, such as max-pooling, reshaping or padding by zeros."""
        module = self.module(node)
        moves = isinstance(module, _MOVES) or self._calls(node, _MOVES_CALLS)
        if node.target is operator.getitem and not self.is_tensor(source := node.all_input_nodes[0]):
            # one of several values that are computed at once is a new one
            moves = self.moves_only(source)
        return moves or resize_mode(node, module) in _NEAREST or self._pads_with_zeros(node)

    def kind(self, node: fx.Node) -> str:
        """Returns the class name of the module, or the name of the function."""
        module = self.module(node)
        if module is not None:
            return type(module).__name__
        return str(getattr(node.target, '__name__', node.target))

    def non_negative(self, node: fx.Node) -> bool:
        """Returns whether the operators show that no value can be negative, whatever the input."""
        if self._ranges is None:
            self._ranges = {}
            for each in self.graph.nodes:
                self._ranges[each] = value_range(each, self._ranges, self.module(each), self.moves_only(each))
        return self._ranges[node][0] >= 0

    def consumers(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yields the nodes that compute with the value, found through those that only move it."""
        for user in node.users:
            if self.moves_only(user):
                yield from self.consumers(user)
            else:
                yield user

    def sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yields the nodes that compute what ``node`` reads, found through those that only move it."""
        for source in node.all_input_nodes:
            if self.moves_only(source):
                yield from self.sources(source)
            else:
                yield source

    def _pads_with_zeros(self, node: fx.Node) -> bool:
        bound = bind(node) if node.target is F.pad else None
        if bound is None:
            return False
        return bound.arguments.get('mode', 'constant') != 'constant' or bound.arguments.get('value') in (None, 0)

    def _calls(self, node: fx.Node, targets: tuple[Any, ...]) -> bool:
        return node.op in ('call_function', 'call_method') and node.target in targets
