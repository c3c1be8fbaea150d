"""Computes bounds of values that hold for any input, by interval arithmetic over a graph.

Operations that are not listed here have no bounds. Constants have those of their values.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mmbrecq.graph.symbolic import bind, operation

Range = tuple[float, float]

ANY: Range = (-math.inf, math.inf)
_POSITIVE: Range = (0.0, math.inf)
_ZERO: Range = (0.0, 0.0)
_UNIT: Range = (0.0, 1.0)

# the smallest values of SiLU, GELU, Mish and Hardswish are rounded down
_FIXED: Mapping[str, Range] = {
    **dict.fromkeys(('relu', 'softplus', 'exp', 'abs', 'square', 'sqrt', 'rsqrt', 'norm', 'var', 'std'), _POSITIVE),
    **dict.fromkeys(('sigmoid', 'hardsigmoid', 'softmax', 'softmax2d'), _UNIT),
    'tanh': (-1.0, 1.0), 'relu6': (0.0, 6.0), 'silu': (-0.279, math.inf), 'gelu': (-0.171, math.inf),
    'mish': (-0.309, math.inf), 'hardswish': (-0.376, math.inf),
}  # fmt: skip
# means of values, and of the zeros with which they pad
_MEANS = ('mean', *(f'{kind}avgpool{axes}d' for kind in ('', 'adaptive') for axes in (1, 2, 3)))
_SELECTIONS = ('amax', 'amin', 'float', 'detach', 'typeas')
_CONVEX_MODES = ('nearest', 'nearest-exact', 'linear', 'bilinear', 'trilinear', 'area')


def value_range(node: fx.Node, known: Mapping[fx.Node, Range], module: nn.Module | None, moves: bool) -> Range:
    """Returns the bounds of the value of a node; of a tuple, those of all its tensors.

    Those of the nodes before it are ``known``; ``module`` is what it calls, None for a function, and ``moves`` tells
    whether it only moves values, and zeros among them.
    """
    if node.op == 'get_attr':
        return _operand(node.meta.get('example'), known)
    name = operation(node, module)
    values = [_operand(value, known) for value in node.args]
    found = ANY
    if node.op in ('placeholder', 'output'):
        pass
    elif name in _FIXED:
        found = _FIXED[name]
    elif moves or name in _MEANS:
        found = _hull(_ZERO, *_leaves(node.args, known))
    elif name in _SELECTIONS or resize_mode(node, module) in _CONVEX_MODES:
        found = _hull(*_leaves(node.args, known))
    elif isinstance(module, nn.Hardtanh):
        found = float(module.min_val), float(module.max_val)
    elif name in _BINARY and len(values) == 2 and not node.kwargs:
        same = name == 'mul' and node.args[0] is node.args[1]
        found = _POSITIVE if same else _BINARY[name](*values)
    elif name == 'neg':
        found = -values[0][1], -values[0][0]
    elif name == 'pow' and len(values) == 2:
        even = isinstance(node.args[1], (int, float)) and node.args[1] % 2 == 0
        found = _POSITIVE if even or values[0][0] >= 0 else ANY
    elif name == 'clamp':
        found = _clamped(node, known)
    elif name == 'sum' and values[0][0] >= 0:
        found = _POSITIVE
    elif node.target is torch.where and len(values) == 3:
        found = _hull(*values[1:])
    return ANY if any(map(math.isnan, found)) else found


def _operand(value: Any, known: Mapping[fx.Node, Range]) -> Range:
    if isinstance(value, fx.Node):
        return known[value]
    if isinstance(value, (int, float)):
        return float(value), float(value)
    if isinstance(value, Tensor) and value.numel() and not value.is_complex():
        low, high = value.detach().min(), value.detach().max()
        return float(low), float(high)
    return ANY


def _leaves(tree: Any, known: Mapping[fx.Node, Range]) -> Iterator[Range]:
    """Yields the bounds of the tensors among nested arguments."""
    if isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _leaves(item, known)
    elif isinstance(tree, Tensor) or (isinstance(tree, fx.Node) and not isinstance(tree.meta.get('example'), int)):
        yield _operand(tree, known)


def _hull(*parts: Range) -> Range:
    return min(low for low, _ in parts), max(high for _, high in parts)


def resize_mode(node: fx.Node, module: nn.Module | None) -> str | None:
    """Returns the mode by which a node resizes its input, None where it does not."""
    if isinstance(module, nn.Upsample):
        return str(module.mode)
    bound = bind(node) if node.target is F.interpolate else None
    return None if bound is None else str(bound.arguments.get('mode', 'nearest'))


def _multiplied(a: Range, b: Range) -> Range:
    # 0 times infinity is 0, since values are finite
    ends = [0.0 if x == 0 or y == 0 else x * y for x in a for y in b]
    return min(ends), max(ends)


def _divided(a: Range, b: Range) -> Range:
    if b[0] > 0 or b[1] < 0:
        return _multiplied(a, (1 / b[1], 1 / b[0]))
    return _POSITIVE if b[0] == 0 and a[0] >= 0 else ANY


def _clamped(node: fx.Node, known: Mapping[fx.Node, Range]) -> Range:
    given = {**dict(zip(('input', 'min', 'max'), node.args, strict=False)), **node.kwargs}
    bounds = {name: _operand(value, known) for name, value in given.items() if value is not None}
    found = _larger(bounds['input'], bounds.get('min', (-math.inf, -math.inf)))
    return _smaller(found, bounds.get('max', (math.inf, math.inf)))


def _larger(a: Range, b: Range) -> Range:
    return max(a[0], b[0]), max(a[1], b[1])


def _smaller(a: Range, b: Range) -> Range:
    return min(a[0], b[0]), min(a[1], b[1])


_BINARY: Mapping[str, Callable[[Range, Range], Range]] = {
    'add': lambda a, b: (a[0] + b[0], a[1] + b[1]), 'sub': lambda a, b: (a[0] - b[1], a[1] - b[0]),
    'mul': _multiplied, 'div': _divided,
    'clampmin': _larger, 'maximum': _larger, 'clampmax': _smaller, 'minimum': _smaller,
}  # fmt: skip
