"""What the result of an operation follows from: values of the input, its size, or the state of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from mmbrecq.graph.symbolic import ValueDependentError, value_dependent

_READS_SIZES = (
    'size', 'dim', 'numel', 'nelement', 'ndimension', 'stride', 'storage_offset', 'element_size', 'is_floating_point',
    'is_complex', 'is_contiguous', 'get_device', 'type', 'is_tensor', 'result_type', 'is_same_size', 'zeros_like',
    'ones_like', 'full_like', 'empty_like', 'new_zeros', 'new_ones', 'new_full', 'new_empty', 'new_tensor',
)  # fmt: skip
"""Functions and methods whose result follows from the shape and the type of a tensor alone."""

_READS_VALUES = ('__bool__', '__int__', '__float__', '__index__', '__contains__', 'item', 'tolist', 'numpy', 'equal')


class WatchedValues(TorchFunctionMode):
    """Tells whether Python reads values of tensors that follow from ``tensors``."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.are_read = False
        self._following = {id(t): t for t in tensors}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(getattr(func, '__name__', ''))
        if name not in _READS_SIZES and any(id(t) in self._following for t in tensors_in((args, kwargs))):
            self._following.update({id(t): t for t in tensors_in(result)})
            self.are_read |= name in _READS_VALUES
        return result


def evaluate(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a method or function."""
    if node.op == 'call_method':
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def dependence(node: fx.Node) -> set[str]:
    """What the result follows from: ``values`` of the input, its ``size``, the ``state`` of the model.

    Raises:
        ValueDependentError: It is a number that follows from values.
    """
    if node.op == 'placeholder':
        return {'values'}
    if node.op == 'get_attr':
        return {'state'}
    depends = {kind for n in node.all_input_nodes for kind in n.meta['depends']}
    if node.op in ('output', 'call_module') or 'values' not in depends:
        return depends
    name = str(node.target if node.op == 'call_method' else getattr(node.target, '__name__', ''))
    is_attribute = node.target is getattr and not isinstance(node.meta['example'], Tensor)
    if is_attribute or name in _READS_SIZES:
        return (depends - {'values'}) | {'size'}
    if any(not isinstance(v, Tensor) for v in flat(node.meta['example'])):
        raise ValueDependentError(value_dependent(f'a result of {name}'))
    return depends


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Tensors of nested sequences and dicts."""
    return (leaf for leaf in flat(tree) if isinstance(leaf, Tensor))


def flat(tree: Any) -> Iterator[Any]:
    """Values of nested sequences, dicts and slices, but for None."""
    if isinstance(tree, slice):
        tree = (tree.start, tree.stop, tree.step)
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from flat(item)
    elif tree is not None:
        yield tree


def shares_memory(tensor: Tensor, result: Any) -> bool:
    """Whether a tensor of ``result`` lies in the memory of ``tensor``."""
    memory = tensor.untyped_storage().data_ptr()
    return memory != 0 and any(t.untyped_storage().data_ptr() == memory for t in tensors_in(result))
