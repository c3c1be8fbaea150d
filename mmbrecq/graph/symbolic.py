"""Represents the values of a graph while it is traced, and tells what they follow from.

Tensors are proxies. Sizes and the numbers computed from them are numbers that remember their node: Python and torch
compute with them as with any number, so whatever a model does with a size runs, and the arithmetic is recorded.
"""

from __future__ import annotations

import builtins
import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from copy import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute
from torch.overrides import TorchFunctionMode

from mmbrecq.errors import GraphError, first_line

IN_PLACE_OPERATORS = {
    getattr(operator, f'i{name.strip("_")}'): getattr(operator, name)
    for name in ('add', 'sub', 'mul', 'truediv', 'floordiv', 'mod', 'pow', 'and_', 'or_', 'xor', 'lshift', 'rshift')
}
"""Augmented assignments, each with the operator that overwrites nothing."""

_READS_SIZES = (
    'size', 'dim', 'numel', 'nelement', 'ndimension', 'stride', 'storage_offset', 'element_size', 'is_floating_point',
    'is_complex', 'is_contiguous', 'get_device', 'is_tensor', 'result_type', 'is_same_size', 'zeros_like', 'ones_like',
    'full_like', 'empty_like', 'new_zeros', 'new_ones', 'new_full', 'new_empty', 'new_tensor', '_shape_as_tensor',
)  # fmt: skip
"""Functions and methods that read nothing of their first argument but its shape and its type."""

_READS_VALUES = ('__bool__', '__int__', '__float__', '__index__', '__contains__', 'item', 'tolist', 'numpy', 'equal')

_INNER = (str(Path(torch.__file__).parent) + '/', str(Path(__file__).parent) + '/')


class ValueDependentError(GraphError):
    """Raised when Python reads the values of a tensor that follows from the input; ``what`` is read."""

    def __init__(self, what: str) -> None:
        super().__init__(f'{caller()}: expected Python to read no values of tensors, but {what} follows from the input')


def stand_in(node: fx.Node, tracer: Any) -> Any:
    """Returns the value that the model's code gets for the result of ``node``."""
    example = node.meta['example']
    if isinstance(example, torch.Size):
        return SymbolicSize(node, tracer)
    if isinstance(example, (torch.dtype, torch.layout, str)):
        return example
    if type(example) not in (int, float):
        return ConcreteProxy(node, tracer)
    if 'size' not in node.meta['depends']:
        return example
    number = (SymbolicInt if type(example) is int else SymbolicFloat)(example)
    number.node, number.tracer = node, tracer
    return number


def is_symbolic(value: Any) -> bool:
    """Returns whether a value has a node."""
    return issubclass(type(value), (fx.Proxy, _Symbolic))


class ConcreteProxy(fx.Proxy):
    """A proxy that knows the value it had for the example input."""

    @property
    def example(self) -> Any:
        """Value of this node for the example input."""
        return self.node.meta['example']

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_') or not hasattr(self.example, name):
            raise AttributeError(f'a {type(self.example).__name__} has no attribute {name}')
        if callable(getattr(self.example, name)):
            return ConcreteAttribute(self, name)
        if name == 'data':
            return self.detach()
        if name in ('mT', 'mH') and not self.example.is_complex():
            # ONNX has no form of these
            return self.transpose(-2, -1)
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
        """Converts the value of the example to a number; ValueDependentError if it follows from the input's values."""
        if 'values' in self.node.meta['depends'] and not isinstance(self.example, (tuple, list)):
            raise ValueDependentError(what)
        return convert(self.example)


def seen_as_tensors() -> AbstractContextManager[object]:
    """Makes proxies of tensors tensors for ``isinstance`` within the block.

    A ``__class__`` of their own would do the same, but compiled code believes it, and reads the memory of a tensor.
    """
    check = builtins.isinstance

    def is_of(value: Any, kinds: Any) -> bool:
        if check(value, kinds):
            return True
        if sys._getframe(1).f_globals.get('__name__') == 'torch._functorch.utils':
            # hands tensors to compiled code before a function of autograd is applied
            return False
        return issubclass(type(value), ConcreteProxy) and check(value.example, Tensor) and issubclass(Tensor, kinds)

    return patch.object(builtins, 'isinstance', is_of)


def _augmented(function: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def assign(self: ConcreteProxy, other: Any) -> Any:
        target = function if isinstance(self.example, Tensor) else plain
        return self.tracer.create_proxy('call_function', target, (self, other), {})

    return assign


for _in_place, _plain in IN_PLACE_OPERATORS.items():
    setattr(ConcreteProxy, f'__{_in_place.__name__}__', _augmented(_in_place, _plain))


class ConcreteAttribute(Attribute, ConcreteProxy):
    """A method of a proxy; a method call when called, else a node of its own, which is made on first use."""


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
        """Returns the number of elements."""
        return math.prod(self)


def _recorded(plain: Callable[..., Any], function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    def compute(self: Any, *others: Any) -> Any:
        if any(not isinstance(other, (int, float, fx.Proxy, Tensor)) for other in others):
            return plain(self, *others)
        args = (*others, self) if reflected else (self, *others)
        return self.tracer.create_proxy('call_function', function, args, {})

    return compute


_METHODS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ('add', 'sub', 'mul', 'truediv', 'floordiv', 'mod', 'pow', 'neg')},
    'floor': math.floor, 'ceil': math.ceil, 'round': round,
}  # fmt: skip
for _kind in (SymbolicInt, SymbolicFloat):
    for _name, _function in _METHODS.items():
        for _method, _reflected in ((f'__{_name}__', False), (f'__r{_name}__', True)):
            if hasattr(int, _method):
                setattr(_kind, _method, _recorded(getattr(_kind, _method), _function, _reflected))


def obstacle(error: Exception) -> str:
    """Returns the reason why something cannot be traced."""
    if 'dynamo-optimized' in str(error):
        return 'a function of it is compiled by torch.compile'
    if any(text in str(error) for text in ('ConcreteProxy', 'incompatible function arguments')):
        return 'compiled code computes outside of what can be traced'
    return first_line(error)


def caller() -> str:
    """Returns file and line of the model's code that is being traced."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER):
        frame = frame.f_back
    return f'{Path(frame.f_code.co_filename).name}:{frame.f_lineno}'


class WatchedValues(TorchFunctionMode):
    """Notes whether Python reads values of tensors that follow from ``tensors``."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.are_read = False
        self._following = {id(t): t for t in tensors}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(getattr(func, '__name__', ''))
        read = args[1:] if name in _READS_SIZES else args
        if any(id(t) in self._following for t in tensors_in((read, kwargs))):
            self._following.update({id(t): t for t in tensors_in(result)})
            self.are_read |= name in _READS_VALUES
        return result


def example_of(value: Any) -> Any:
    """Returns the value of an argument for the example input."""
    return value.meta['example'] if isinstance(value, fx.Node) else value


def evaluate(
    node: fx.Node, value: Callable[[fx.Node], Any] = example_of, model: nn.Module | None = None, call: Any = None
) -> Any:
    """Returns the result of a method or function, or that of a module of ``model``, which overwrites nothing.

    Its arguments, those of the node or those of ``call``, are the ``value`` of each node among them.
    """
    args, kwargs = fx.node.map_arg(call or (node.args, node.kwargs), value)
    if node.op == 'call_method':
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    function: Any = node.target
    if model is not None and node.op == 'call_module':
        function = copy(model.get_submodule(function))
        function.inplace = False
    return function(*args, **kwargs)


def called_module(model: nn.Module, node: fx.Node) -> Any:
    """Returns the module that a node calls, None for another operation."""
    return model.get_submodule(str(node.target)) if node.op == 'call_module' else None


_SYNONYMS = {'truediv': 'div', 'multiply': 'mul', 'concat': 'cat', 'concatenate': 'cat', 'clip': 'clamp'}


def operation(node: fx.Node, module: nn.Module | None = None) -> str:
    """Returns one name for the module of torch, the functions and the method of an operation, such as ``maxpool2d``.

    It is empty for a ``module`` that is not of torch, whatever the name of its class.
    """
    if node.op == 'call_module':
        is_torchs = type(module).__module__.startswith('torch.nn.') and 'forward' not in vars(module)
        name = type(module).__name__ if is_torchs else ''
    elif node.op in ('call_function', 'call_method'):
        name = str(getattr(node.target, '__name__', node.target))
    else:
        name = ''
    name = name.lower().replace('_', '')
    return _SYNONYMS.get(name, name)


def bind(node: fx.Node) -> inspect.BoundArguments | None:
    """Returns the arguments of a call of a function by name; None where its signature is unknown."""
    try:
        function: Any = node.target
        return inspect.signature(function).bind(*node.args, **node.kwargs) if node.op == 'call_function' else None
    except (TypeError, ValueError):
        return None


def sources_of(node: fx.Node) -> set[fx.Node]:
    """Returns the node and all nodes that its value is computed from."""
    found, stack = {node}, [node]
    while stack:
        new = [n for n in stack.pop().all_input_nodes if n not in found]
        found.update(new)
        stack += new
    return found


def dependence(node: fx.Node) -> set[str]:
    """Returns what the result follows from: ``values`` of the input, its ``size``, the ``state`` of the model.

    ValueDependentError is raised for a number that follows from values.
    """
    if node.op == 'placeholder':
        return {'values'}
    if node.op == 'get_attr':
        return {'state'}
    depends = {kind for n in node.all_input_nodes for kind in n.meta['depends']}
    if node.op in ('output', 'call_module') or 'values' not in depends:
        return depends
    name = str(node.target if node.op == 'call_method' else getattr(node.target, '__name__', ''))
    is_tensor = isinstance(node.meta['example'], Tensor)
    # what a new tensor is filled with, and what `type` converts, may follow from values
    filling = [n for n in node.all_input_nodes if n not in node.args[:1] and 'values' in n.meta['depends']]
    reads_size = name in _READS_SIZES and not (is_tensor and filling)
    if reads_size or (not is_tensor and (node.target is getattr or name == 'type')):
        return (depends - {'values'}) | {'size'}
    if any(not isinstance(v, Tensor) for v in flat(node.meta['example'])):
        raise ValueDependentError(f'a result of {name}')
    return depends


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors of nested sequences and dicts."""
    return (leaf for leaf in flat(tree) if isinstance(leaf, Tensor))


def flat(tree: Any) -> Iterator[Any]:
    """Yields the values of nested sequences, dicts and slices, except for None."""
    if isinstance(tree, slice):
        tree = (tree.start, tree.stop, tree.step)
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from flat(item)
    elif tree is not None:
        yield tree


def equal(a: Any, b: Any) -> bool:
    """Returns whether two nested values are equal, tensors bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def shares_memory(tensor: Tensor, result: Any) -> bool:
    """Returns whether a tensor of ``result`` lies in the memory of ``tensor``."""
    memory = tensor.untyped_storage().data_ptr()
    return memory != 0 and any(t.untyped_storage().data_ptr() == memory for t in tensors_in(result))
