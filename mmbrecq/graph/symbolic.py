"""What stands for the values of a graph while it is traced.

Tensors are proxies. Sizes and the numbers computed from them are numbers that remember their node: Python and torch
take them for what they are, so whatever a model does with a size runs, and arithmetic with them is recorded.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from mmbrecq.errors import GraphError

IN_PLACE_OPERATORS = {
    getattr(operator, f'i{name.strip("_")}'): getattr(operator, name)
    for name in ('add', 'sub', 'mul', 'truediv', 'floordiv', 'mod', 'pow', 'and_', 'or_', 'xor', 'lshift', 'rshift')
}
"""Augmented assignments, each with the operator that writes to nothing."""

_INNER = (str(Path(torch.__file__).parent) + '/', str(Path(__file__).parent) + '/')


class ValueDependentError(GraphError):
    """Raised when Python reads the values of a tensor that follows from the input."""


def stand_in(node: fx.Node, tracer: Any) -> Any:
    """What the model's code gets for the result of ``node``."""
    example = node.meta['example']
    if isinstance(example, torch.Size):
        return SymbolicSize(node, tracer)
    if type(example) not in (int, float):
        return ConcreteProxy(node, tracer)
    if 'size' not in node.meta['depends']:
        return example
    number = (SymbolicInt if type(example) is int else SymbolicFloat)(example)
    number.node, number.tracer = node, tracer
    return number


def is_symbolic(value: Any) -> bool:
    """Whether a value has a node."""
    return issubclass(type(value), (fx.Proxy, _Symbolic))


class ConcreteProxy(fx.Proxy):
    """A proxy that knows the value it had for the example input, and is of its type for ``isinstance``."""

    @property
    def example(self) -> Any:
        """Value of this node for the example input."""
        return self.node.meta['example']

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.example) if isinstance(self.example, Tensor) else type(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_') or not hasattr(self.example, name):
            raise AttributeError(f'a {type(self.example).__name__} has no attribute {name}')
        if callable(getattr(self.example, name)):
            return ConcreteAttribute(self, name)
        return self.tracer.create_proxy('call_function', getattr, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ('tracer', 'node', 'root', 'attr', '_node'):
            raise GraphError(f'{caller()}: expected tensors to be left as they are, but .{name} is set')
        object.__setattr__(self, name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy('call_function', operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        return len(self.example)

    def __int__(self) -> int:
        return self.read('a number', int)

    def __float__(self) -> float:
        return self.read('a number', float)

    def __index__(self) -> int:
        return self.read('an index', operator.index)

    def __contains__(self, item: object) -> bool:
        return self.read('a membership test', lambda example: item in example)

    def read(self, what: str, convert: Callable[[Any], Any]) -> Any:
        """Converts the value of the example to a number.

        Raises:
            ValueDependentError: It follows from values of the input.
        """
        if 'values' in self.node.meta['depends'] and not isinstance(self.example, (tuple, list)):
            raise ValueDependentError(value_dependent(what))
        return convert(self.example)


def _augmented(function: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def assign(self: ConcreteProxy, other: Any) -> Any:
        target = function if isinstance(self.example, Tensor) else plain
        return self.tracer.create_proxy('call_function', target, (self, other), {})

    return assign


for _in_place, _plain in IN_PLACE_OPERATORS.items():
    setattr(ConcreteProxy, f'__{_in_place.__name__}__', _augmented(_in_place, _plain))


class ConcreteAttribute(ConcreteProxy):
    """A method of a proxy; a method call when called, else a node of its own."""

    def __init__(self, root: ConcreteProxy, attr: str) -> None:
        # the node is made on first use, so that x.view(...) records one call and no getattr
        self.root, self.attr = root, attr
        self.tracer = root.tracer
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        if self._node is None:
            self._node = self.tracer.create_proxy('call_function', getattr, (self.root, self.attr), {}).node
        return self._node

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy('call_method', self.attr, (self.root, *args), kwargs)


class _Symbolic:
    """Remembers the node of a value."""

    node: fx.Node
    tracer: Any


class SymbolicInt(_Symbolic, int):
    """A size of the input, or an integer computed from sizes."""


class SymbolicFloat(_Symbolic, float):
    """A number computed from sizes of the input."""


class SymbolicSize(_Symbolic, tuple[Any, ...]):
    """The shape of a tensor."""

    def __new__(cls, node: fx.Node, tracer: Any) -> SymbolicSize:
        count = len(node.meta['example'])
        items = [tracer.create_proxy('call_function', operator.getitem, (node, i), {}) for i in range(count)]
        made = super().__new__(cls, items)
        made.node, made.tracer = node, tracer
        return made

    def numel(self) -> Any:
        """Number of elements."""
        return math.prod(self)


def _recorded(plain: Callable[..., Any], function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    def compute(self: Any, *others: Any) -> Any:
        if any(not isinstance(other, (int, float, fx.Proxy, Tensor)) for other in others):
            return plain(self, *others)
        args = (*others, self) if reflected else (self, *others)
        return self.tracer.create_proxy('call_function', function, args, {})

    return compute


for _kind in (SymbolicInt, SymbolicFloat):
    for _name in ('add', 'sub', 'mul', 'truediv', 'floordiv', 'mod', 'pow'):
        for _prefix in ('', 'r'):
            _method = f'__{_prefix}{_name}__'
            setattr(_kind, _method, _recorded(getattr(_kind, _method), getattr(operator, _name), bool(_prefix)))
    for _function in (operator.neg, math.floor, math.ceil, round):
        _method = f'__{_function.__name__}__'
        setattr(_kind, _method, _recorded(getattr(_kind, _method), _function, False))


def value_dependent(what: str) -> str:
    """The sentence that refuses to read values."""
    return f'{caller()}: expected Python to read no values of tensors, but {what} follows from the input'


def caller() -> str:
    """File and line of the model's code that is being traced."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER):
        frame = frame.f_back
    return f'{Path(frame.f_code.co_filename).name}:{frame.f_lineno}'
