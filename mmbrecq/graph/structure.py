"""Flattens nested outputs to a list of named tensors, and back.

A detector's head returns tuples of lists, one tensor per pyramid level. A file has a flat list of outputs, so each is
named by its indices: ``output_0_2`` is ``outputs[0][2]``; a single tensor is ``output``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmbrecq.errors import GraphError


def flatten_outputs(value: Any, name: str = 'output') -> dict[str, Tensor]:
    """Returns the tensors of nested sequences and dicts by name, in their order; GraphError for any other value."""
    if isinstance(value, Tensor):
        return {name: value}
    if not isinstance(value, (tuple, list, dict)):
        kind = type(value).__name__
        raise GraphError(f'expected the outputs of the network to be tensors, but {name} is a {kind}')
    flat: dict[str, Tensor] = {}
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        named = flatten_outputs(item, f'{name}_{key}')
        if flat.keys() & named:
            raise GraphError(f'expected outputs with names of their own, but got several {min(flat.keys() & named)}')
        flat.update(named)
    return flat


def nest_outputs(named: Mapping[str, Tensor]) -> Any:
    """Returns the nested tuple of lists whose :func:`flatten_outputs` is ``named``, in any order of names."""
    tensors = {tuple(map(int, name.split('_')[1:])): tensor for name, tensor in named.items()}
    nested = _nest(tensors, ())
    return tuple(nested) if isinstance(nested, list) else nested


def _nest(tensors: Mapping[tuple[int, ...], Tensor], prefix: tuple[int, ...]) -> Any:
    if prefix in tensors:
        return tensors[prefix]
    depth = len(prefix)
    count = 1 + max(indices[depth] for indices in tensors if indices[:depth] == prefix)
    return [_nest(tensors, (*prefix, index)) for index in range(count)]
