"""What a node of the graph does, as far as quantization cares. Told by type and operator, never by name."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mmbrecq.graph.tracer import WEIGHTED

_ADD = (operator.add, torch.add, 'add')
_CONCAT = (torch.cat, torch.concat, torch.concatenate)
_NON_NEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax)
_NON_NEGATIVE_CALLS = (F.relu, F.relu6, torch.relu, torch.sigmoid, F.hardsigmoid, 'relu', 'sigmoid')
_KEEPS_SIGN = (nn.AdaptiveAvgPool2d, nn.AvgPool2d)
_KEEPS_SIGN_CALLS = (F.adaptive_avg_pool2d, F.avg_pool2d, 'mean', torch.mean)
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

_NEAREST = ('nearest', 'nearest-exact')


class Roles:
    """Answers questions about the nodes of one graph.

    Args:
        model: Owner of the modules that the graph calls.
        graph: A graph whose nodes carry ``meta['example']``.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model, self.graph = model, graph

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
        """Moves or selects values: pooling by maximum, reshaping, concatenation, resizing to nearest."""
        moves = isinstance(self.module(node), _MOVES) or self._calls(node, _MOVES_CALLS)
        return moves or self._resizes_to_nearest(node)

    def kind(self, node: fx.Node) -> str:
        """Class name of the module, or name of the function."""
        module = self.module(node)
        if module is not None:
            return type(module).__name__
        return str(getattr(node.target, '__name__', node.target))

    def non_negative(self, node: fx.Node) -> bool:
        """Whether the operators show that no value can be negative, whatever the input."""
        if isinstance(self.module(node), _NON_NEGATIVE) or self._calls(node, _NON_NEGATIVE_CALLS):
            return True
        keeps = isinstance(self.module(node), _KEEPS_SIGN) or self._calls(node, _KEEPS_SIGN_CALLS)
        if keeps or self.moves_only(node) or self.is_add(node) or self._calls(node, (operator.mul, torch.mul)):
            tensors = [n for n in node.all_input_nodes if self.is_tensor(n)]
            return bool(tensors) and all(self.non_negative(n) for n in tensors)
        return False

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

    def _calls(self, node: fx.Node, targets: tuple[Any, ...]) -> bool:
        return node.op in ('call_function', 'call_method') and node.target in targets
