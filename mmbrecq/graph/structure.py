"""Nested outputs as a flat list of named tensors, and back.

A detector's head returns tuples of lists, one tensor per pyramid level. A file has a flat list of outputs, so each is
named by its place: ``output_0_2`` is ``outputs[0][2]``; a single tensor is ``output``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmbrecq.errors import GraphError

OUTPUT_NAME = 'output'


def flatten_outputs(value: Any, name: str = OUTPUT_NAME) -> dict[str, Tensor]:
    """Tensors of nested sequences by name, in their order.

    Raises:
        GraphError: Something in it is neither a sequence nor a tensor.
    """
    if isinstance(value, Tensor):
        return {name: value}
    if not isinstance(value, (tuple, list)):
        kind = 'dict' if isinstance(value, dict) else type(value).__name__
        raise GraphError(f'expected the outputs of the network to be tensors, but {name} is a {kind}')
    flat: dict[str, Tensor] = {}
    for index, item in enumerate(value):
        flat.update(flatten_outputs(item, f'{name}_{index}'))
    return flat


def nest_outputs(named: Mapping[str, Tensor]) -> Any:
    """The nested tuples of lists whose :func:`flatten_outputs` is ``named``, in any order of names.

    The outermost sequence is a tuple, as a head returns it; all in it are lists.
    """
    if list(named) == [OUTPUT_NAME]:
        return named[OUTPUT_NAME]
    places = {tuple(map(int, name.removeprefix(OUTPUT_NAME).strip('_').split('_'))): v for name, v in named.items()}
    return tuple(_nest(places, ()))


def _nest(places: Mapping[tuple[int, ...], Tensor], prefix: tuple[int, ...]) -> Any:
    if prefix in places:
        return places[prefix]
    depth = len(prefix)
    count = 1 + max(place[depth] for place in places if place[:depth] == prefix)
    items: Sequence[Any] = [_nest(places, (*prefix, index)) for index in range(count)]
    return items
