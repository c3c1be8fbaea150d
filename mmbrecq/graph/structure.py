"""Flattens nested outputs to a list of named tensors, and back.

A detector's head returns tuples of lists, one tensor per pyramid level. A file has a flat list of outputs, so each is
named by its indices: ``output_0_2`` is ``outputs[0][2]``; a single tensor is ``output``.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from mmbrecq.errors import GraphError


def flatten_outputs(value: Any, name: str = 'output') -> dict[str, Tensor]:
    """Returns the tensors of nested sequences, dicts and dataclasses by name, in their order; None is left out.

    GraphError is raised for any other value.
    """
    if isinstance(value, Tensor) and not value.is_complex():
        return {name: value}
    items = _items(value)
    if items is None:
        kind = 'complex tensor' if isinstance(value, Tensor) else type(value).__name__
        raise GraphError(f'expected the outputs of the network to be real tensors, but {name} is a {kind}')
    flat: dict[str, Tensor] = {}
    for key, item in items.items():
        if item is None:
            continue
        named = flatten_outputs(item, f'{name}_{key}')
        if flat.keys() & named:
            raise GraphError(f'expected outputs with names of their own, but got several {min(flat.keys() & named)}')
        flat.update(named)
    return flat


def split_outputs(value: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Returns outputs as nested tuples, lists and dicts, and a function that makes of such what ``value`` is.

    It makes named tuples, dataclasses, and dicts of other classes, such as those of Hugging Face.
    """
    items = _items(value)
    if items is None:
        return value, lambda plain: plain
    parts = {key: split_outputs(item) for key, item in items.items()}
    plain, restores = ({key: part[i] for key, part in parts.items()} for i in range(2))
    kind, is_sequence = type(value), isinstance(value, (tuple, list))

    def restore(given: Any) -> Any:
        found = {key: restores[key](item) for key, item in _items(given).items()}  # type: ignore[union-attr]
        if is_sequence:
            return kind(*found.values()) if hasattr(kind, '_fields') else kind(found.values())
        return kind(**found) if all(isinstance(key, str) for key in found) else kind(found)  # type: ignore[call-arg]

    if is_sequence:
        return (list if isinstance(value, list) else tuple)(plain.values()), restore
    return plain, restore


def _items(value: Any) -> dict[Any, Any] | None:
    """Returns the values within a container by key; None for another value."""
    if isinstance(value, Mapping):
        return dict(value.items())
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return dict(enumerate(value)) if isinstance(value, (tuple, list)) else None


def nest_outputs(named: Mapping[str, Tensor]) -> Any:
    """Returns the nested tuple of lists whose :func:`flatten_outputs` is ``named``, in any order; None fills gaps."""
    tensors = {tuple(map(int, name.split('_')[1:])): tensor for name, tensor in named.items()}
    nested = _nest(tensors, ())
    return tuple(nested) if isinstance(nested, list) else nested


def _nest(tensors: Mapping[tuple[int, ...], Tensor], prefix: tuple[int, ...]) -> Any:
    if prefix in tensors:
        return tensors[prefix]
    depth = len(prefix)
    places = [indices[depth] for indices in tensors if indices[:depth] == prefix]
    return [_nest(tensors, (*prefix, index)) for index in range(max(places) + 1)] if places else None
