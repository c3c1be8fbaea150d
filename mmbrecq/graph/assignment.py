"""Writes assignments to elements of a tensor as operations that overwrite nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from mmbrecq.graph.symbolic import dependence, evaluate, example_of
from mmbrecq.graph.tracer import UntraceableError


class Assignments:
    """Adds nodes to a traced graph; ``constants`` receives the tensors that they read.

    Attributes:
        anchor: The node that is being replaced.
        before: The node before which new ones are inserted.
    """

    anchor: fx.Node
    before: fx.Node

    def __init__(self, model: nn.Module, graph: fx.Graph, constants: dict[str, Tensor]) -> None:
        self.model, self.graph, self.constants = model, graph, constants

    def _assigned(self, base: fx.Node, index: Any, new: Any) -> fx.Node:
        """Returns the node of what ``base`` holds after ``base[index] = new``."""
        entries = [_listed(e) for e in (index if isinstance(index, tuple) else [index])]
        lists = [e for e in entries if isinstance(e, list)]
        if len(lists) > 1 or any(isinstance(example_of(e), Tensor) for e in entries):
            return self._scattered(base, entries, new)
        used = sum(e is not None and e is not Ellipsis for e in entries)
        for at in [i for i, e in enumerate(entries) if e is Ellipsis]:
            entries[at : at + 1] = [slice(None)] * (base.meta['example'].dim() - used)
        kept = [self._as_slice(e) for e in entries if e is not None]
        selects = self._emit(operator.getitem, base, tuple(kept)) if kept else base
        shown = self._emit(operator.getitem, base, index)
        new = self._like(new, shown)
        if shown.meta['example'].shape != selects.meta['example'].shape:
            new = self._emit('reshape_as', new, selects)
        return self._nested(base, 0, kept, new)

    def _nested(self, base: fx.Node, axis: int, slices: list[Any], new: fx.Node) -> fx.Node:
        """Replaces a block of ``base``, axis by axis."""
        while axis < len(slices) and slices[axis] == slice(None):
            axis += 1
        if axis == len(slices):
            return new
        taken, size = slices[axis], base.meta['example'].shape[axis]
        around = (slice(None),) * axis
        inner = self._emit(operator.getitem, base, (*around, taken))
        inner = self._nested(inner, axis + 1, slices, new)
        if isinstance(taken, list) or taken.step not in (None, 1):
            order = list(range(size))
            for rank, index in enumerate(taken if isinstance(taken, list) else order[taken]):
                order[index] = size + rank
            both = self._emit(torch.cat, [base, inner], axis)
            ranks = torch.tensor(order, device=base.meta['example'].device)
            return self._emit('index_select', both, axis, self._constant(ranks))
        start, stop, _ = slice(example_of(taken.start), example_of(taken.stop)).indices(size)
        pieces = [inner]
        if start > 0:
            pieces.insert(0, self._emit(operator.getitem, base, (*around, slice(None, taken.start))))
        if max(start, stop) < size:
            end = taken.stop if stop >= start else taken.start
            pieces.append(self._emit(operator.getitem, base, (*around, slice(end, None))))
        return inner if len(pieces) == 1 else self._emit(torch.cat, pieces, axis)

    def _scattered(self, base: fx.Node, entries: list[Any], new: Any) -> fx.Node:
        """Returns the node of what ``base`` holds after ``base[entries] = new`` where indices are tensors."""
        examples = [example_of(e) for e in entries]
        is_mask = len(entries) == 1 and isinstance(examples[0], Tensor) and examples[0].dtype == torch.bool
        if is_mask and (not isinstance(example_of(new), Tensor) or example_of(new).dim() == 0):
            mask = entries[0]
            for _ in range(base.meta['example'].dim() - examples[0].dim()):
                mask = self._emit('unsqueeze', mask, -1)
            return self._emit(torch.where, mask, self._like(new, base), base)
        if not all(isinstance(e, Tensor) for e in examples):
            raise self._refusal('an assignment to a list of indices beside slices cannot be followed')
        shown = self._emit(operator.getitem, base, tuple(entries))
        return self._emit(torch.index_put, base, tuple(entries), self._like(new, shown))

    def _like(self, value: Any, shown: fx.Node) -> fx.Node:
        """Returns the node of ``value`` with the shape and the type of ``shown``."""
        example = example_of(value)
        if not isinstance(example, Tensor):
            return self._emit(torch.full_like, shown, value)
        wanted = shown.meta['example']
        if example.dtype != wanted.dtype:
            value = self._emit('to', value, wanted.dtype)
        if example.shape == wanted.shape:
            return value
        for _ in range(example.dim() - wanted.dim()):
            value = self._emit('squeeze', value, 0)
        return self._emit('expand_as', value, shown)

    def _as_slice(self, entry: Any) -> Any:
        return entry if isinstance(entry, (slice, list)) else slice(entry, self._end(entry, 1))

    def _end(self, start: Any, count: Any) -> Any:
        if example_of(start) < 0 and example_of(start) + example_of(count) == 0:
            return None
        is_symbolic = isinstance(start, fx.Node) or isinstance(count, fx.Node)
        return self._emit(operator.add, start, count) if is_symbolic else start + count

    def _emit(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Returns the node of a call of a function, or of a method."""
        op = 'call_method' if isinstance(target, str) else 'call_function'
        with self.graph.inserting_before(self.before):
            node = self.graph.create_node(op, target, args, kwargs)
        node.meta.update(self.anchor.meta, writes=[], view=None)
        node.meta['example'] = evaluate(node, model=self.model)
        node.meta['depends'] = dependence(node)
        return node

    def _constant(self, value: Tensor) -> fx.Node:
        name = f'_order_constant{len(self.constants)}'
        self.constants[name] = value
        with self.graph.inserting_before(self.before):
            node = self.graph.create_node('get_attr', name)
        node.meta.update(self.anchor.meta, writes=[], view=None, example=value, depends=set())
        return node

    def _refusal(self, reason: str) -> UntraceableError:
        is_opaque = self.anchor.op == 'call_module'
        owner = self.anchor.meta['caller' if is_opaque else 'owner']
        return UntraceableError(owner, f'{self.anchor.meta.get("line", self.anchor.name)}: {reason}')


def _listed(entry: Any) -> Any:
    """Returns an index that is a constant tensor as a list; others as they are."""
    example = example_of(entry)
    if not isinstance(example, Tensor) or 'values' in entry.meta['depends'] or example.dim() != 1:
        return entry
    return (example.nonzero().flatten() if example.dtype == torch.bool else example).tolist()
