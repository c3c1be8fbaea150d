"""Gives in-place operations a form that overwrites nothing, with the effect that they had.

An operation that writes into a tensor changes every other view of the same memory. Here it becomes one that computes
the new value; the tensors that it was a view of are put together anew, and the other views are taken again where they
are read. The graph then has a value for each node, so it can be cut anywhere and values can be cached.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mmbrecq.graph.symbolic import IN_PLACE_OPERATORS
from mmbrecq.graph.tracer import UntraceableError, dependence, evaluate

_PERMUTES = ('permute', 'transpose', 't', 'T', 'mT', 'swapaxes', 'swapdims', 'movedim', 'moveaxis')
_SPLITS = ('chunk', 'split', 'tensor_split', 'split_with_sizes', 'unbind')
_RANDOM = ('bernoulli_',)


def functionalize(model: nn.Module, graph: fx.Graph, constants: dict[str, Tensor]) -> None:
    """Replaces the in-place operations of a traced graph.

    Args:
        model: Owner of the modules that the graph calls.
        graph: Changed in place; its nodes carry what :class:`ConcreteTracer` notes.
        constants: Gets the tensors that the new nodes read.

    Raises:
        UntraceableError: An operation has no such form.
    """
    _Functionalizer(model, graph, constants).run()


def switch_off_in_place(model: nn.Module, graph: fx.Graph, opaque: Container[str]) -> None:
    """Makes modules that are one operation of a functionalized graph write to nothing."""
    for node in graph.nodes:
        if node.op == 'call_module' and str(node.target) not in opaque:
            module = model.get_submodule(str(node.target))
            if hasattr(module, 'inplace'):
                setattr(module, 'inplace', False)  # noqa: B010 - no common base has it


@contextmanager
def _in_place(module: Any, state: bool) -> Iterator[None]:
    before = getattr(module, 'inplace', state)
    module.inplace = state
    try:
        yield
    finally:
        module.inplace = before


class _Functionalizer:
    def __init__(self, model: nn.Module, graph: fx.Graph, constants: dict[str, Tensor]) -> None:
        self.model, self.graph, self.constants = model, graph, constants
        self.nodes = list(graph.nodes)
        order = {node: index for index, node in enumerate(self.nodes)}
        self.last_use = {node: max((order[user] for user in node.users), default=-1) for node in self.nodes}
        self.views: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            if node.meta['view'] is not None:
                self.views.setdefault(node.meta['view'], []).append(node)
        self.calls = {node: (node.args, node.kwargs) for node in self.nodes}
        self.values: dict[fx.Node, fx.Node] = {}
        self.stale: set[fx.Node] = set()
        self.dead: list[fx.Node] = []

    def run(self) -> None:
        for index, node in enumerate(self.nodes):
            self.index, self.anchor, self.before = index, node, node
            node.args = fx.node.map_arg(node.args, self.value)
            node.kwargs = fx.node.map_arg(node.kwargs, self.value)
            if node.meta['writes']:
                self._replace(node)
            elif node.target in IN_PLACE_OPERATORS:
                node.target = IN_PLACE_OPERATORS[node.target]
            if node.op not in ('placeholder', 'get_attr') and node not in self.dead:
                node.meta['depends'] = dependence(node)
        for node in reversed(self.dead):
            self.graph.erase_node(node)

    def value(self, node: fx.Node) -> fx.Node:
        """The node that holds what ``node`` holds at this point of the graph."""
        if node not in self.stale:
            return self.values.get(node, node)
        self.stale.discard(node)
        base = node.meta['view']
        present = self.value(base)
        if _is_same(node):
            self.values[node] = present
            return present
        module = self.model.get_submodule(str(node.target)) if node.op == 'call_module' else None
        if module is not None and not type(module).__module__.startswith('torch.'):
            raise self._refusal('a module returns a view of what is written')
        args, kwargs = fx.node.map_arg(self.calls[node], self.value)
        with self.graph.inserting_before(self.before):
            copy = self.graph.create_node(node.op, node.target, args, kwargs)
        copy.meta.update(node.meta)
        self.values[node] = copy
        return copy

    def _replace(self, node: fx.Node) -> None:
        """Gives a node that writes a form that does not, and makes its effect seen."""
        written = self._written(node)
        if node.op == 'call_module' and not hasattr(self.model.get_submodule(str(node.target)), 'inplace'):
            self._shield(node, written)
            return
        if len(written) != 1 or not isinstance(written[0].meta['example'], Tensor):
            raise self._refusal(f'{_name(node)} writes into several tensors')
        target = written[0]
        if target.op == 'get_attr' and str(target.target) not in self.constants:
            raise self._refusal(f'{_name(node)} writes into {target.target}')
        if node.target is operator.setitem:
            new = self._assigned(self.value(target), node.args[1], node.args[2])
        else:
            new = self._out_of_place(node, target)
        if new.meta['example'].shape != target.meta['example'].shape:
            raise self._refusal(f'{_name(node)} changes the shape of a tensor in place')
        if new.meta['example'].dtype != target.meta['example'].dtype:
            new = self._emit_method('to', new, target.meta['example'].dtype)
        elif new is not node:
            self.dead.append(node)
        self._write(target, new)
        self.values[node] = new
        self.stale.discard(node)

    def _written(self, node: fx.Node) -> list[fx.Node]:
        """The arguments that an operation writes into, as the nodes were before any was replaced."""
        args, kwargs = self.calls[node]
        if node.op == 'call_module' or 'out' in kwargs:
            return [kwargs['out']] if isinstance(kwargs.get('out'), fx.Node) else node.meta['writes']
        first = args[0] if args else None
        return [first] if isinstance(first, fx.Node) and first in node.meta['writes'] else []

    def _shield(self, node: fx.Node, written: list[fx.Node]) -> None:
        """Lets a module that cannot be traced write into copies, where nobody reads what it wrote."""
        for tensor in written:
            root = _root(tensor)
            # what the module returns is a value of its own from here on
            own = set(self._below(node))
            if any(self.last_use[n] > self.index for n in self._below(root) if n not in own):
                raise self._refusal(f'{node.target} writes into its input, which is read afterwards')
        if node.meta['view'] is not None:
            self.views[node.meta['view']].remove(node)
            node.meta['view'] = None
        for tensor in written:
            present = self.value(tensor)
            copy = self._emit_method('clone', present)
            node.replace_input_with(present, copy)

    def _write(self, target: fx.Node, new: fx.Node) -> None:
        below = set(self._below(target))
        others = [n for n in self._below(_root(target)) if n not in below]
        is_seen = any(self.last_use[n] > self.index for n in others)
        child, value = target, new
        found = {}
        while is_seen and child.meta['view'] is not None:
            base = child.meta['view']
            if isinstance(base.meta['example'], Tensor):
                value = value if _is_same(child) else self._put_back(child, self.value(base), value)
            else:
                value = self._joined(child, base, value)
                base = base.meta['view']
            child = base
            found[base] = value
        self.stale |= (below | set(others)) - {target, child} if is_seen else below - {target}
        for node, present in {**found, target: new}.items():
            self.values[node] = present
            self.stale.discard(node)

    def _put_back(self, view: fx.Node, base: fx.Node, new: fx.Node) -> fx.Node:
        """The tensor ``base`` with the elements that ``view`` shows replaced by ``new``."""
        shape, name = view.meta['example'].shape, _name(view)
        index = self._slices(view, name)
        if index is not None:
            return self._assigned(base, index, new)
        probe = _probe(base.meta['example'])
        shown = self._run(view, probe)
        if isinstance(shown, Tensor) and shown.numel() == probe.numel():
            if torch.equal(shown.reshape(-1), probe.reshape(-1)):
                return self._emit_method('reshape_as', new, base)
            if name in _PERMUTES and shown.dim() == probe.dim():
                sizes = torch.zeros([2 + axis for axis in range(probe.dim())])
                order = [size - 2 for size in self._run(view, sizes).shape]
                return self._emit_method('permute', new, *[order.index(axis) for axis in range(probe.dim())])
        raise self._refusal(f'the effect of a write into a view by {name} of shape {tuple(shape)} cannot be followed')

    def _run(self, view: fx.Node, probe: Tensor) -> Any:
        base = view.meta['view']
        args, kwargs = fx.node.map_arg(self.calls[view], lambda n: probe if n is base else n.meta['example'])
        if view.op == 'call_module':
            return self.model.get_submodule(str(view.target))(*args, **kwargs)
        return evaluate(view, args, kwargs)

    def _slices(self, view: fx.Node, name: str) -> Any:
        """The index by which a view selects, None where it does not."""
        args, kwargs = fx.node.map_arg(self.calls[view], self.value)
        if view.target is operator.getitem:
            return args[1]
        if name not in ('select', 'narrow'):
            return None
        given = dict(zip(('dim', 'index' if name == 'select' else 'start', 'length'), args[1:], strict=False))
        given.update(kwargs)
        axis = given['dim'] % view.meta['view'].meta['example'].dim()
        if name == 'select':
            return (slice(None),) * axis + (given['index'],)
        start = given['start']
        return (slice(None),) * axis + (slice(start, self._end(start, given['length'])),)

    def _joined(self, part: fx.Node, parts: fx.Node, new: fx.Node) -> fx.Node:
        """The tensor that was split into ``parts``, of which ``part`` is replaced by ``new``."""
        base, name = parts.meta['view'], _name(parts)
        if name not in _SPLITS or base is None or not isinstance(base.meta['example'], Tensor):
            raise self._refusal(f'the effect of a write into a result of {name} cannot be followed')
        args, kwargs = self.calls[parts]
        dim = kwargs.get('dim', args[-1] if len(args) > (1 if name == 'unbind' else 2) else 0)
        split = self._emit(parts.op, parts.target, *fx.node.map_arg((args, kwargs), self.value))
        count = len(parts.meta['example'])
        index = int(part.args[1]) % count  # type: ignore[arg-type]
        items = [new if i == index else self._emit_function(operator.getitem, split, i) for i in range(count)]
        return self._emit_function(torch.stack if name == 'unbind' else torch.cat, items, dim)

    def _assigned(self, base: fx.Node, index: Any, new: Any) -> fx.Node:
        """What ``base`` holds after ``base[index] = new``."""
        entries = [_listed(e) for e in (index if isinstance(index, tuple) else [index])]
        lists = [e for e in entries if isinstance(e, list)]
        if len(lists) > 1 or any(isinstance(_example(e), Tensor) for e in entries):
            return self._scattered(base, entries, new)
        shape = base.meta['example'].shape
        used = [e for e in entries if e is not None and e is not Ellipsis]
        if Ellipsis in [e for e in entries if not isinstance(e, fx.Node)]:
            at = next(i for i, e in enumerate(entries) if e is Ellipsis)
            entries[at : at + 1] = [slice(None)] * (len(shape) - len(used))
        kept = [self._as_slice(e) for e in entries if e is not None]
        selects = self._emit_function(operator.getitem, base, tuple(kept)) if kept else base
        shown = self._emit_function(operator.getitem, base, index)
        new = self._like(new, shown)
        if shown.meta['example'].shape != selects.meta['example'].shape:
            new = self._emit_method('reshape_as', new, selects)
        return self._nested(base, 0, kept, new)

    def _nested(self, base: fx.Node, axis: int, slices: list[Any], new: fx.Node) -> fx.Node:
        """Replaces a block of ``base``, axis by axis."""
        while axis < len(slices) and slices[axis] == slice(None):
            axis += 1
        if axis == len(slices):
            return new
        taken, size = slices[axis], base.meta['example'].shape[axis]
        around = (slice(None),) * axis
        inner = self._emit_function(operator.getitem, base, (*around, taken))
        inner = self._nested(inner, axis + 1, slices, new)
        if isinstance(taken, list) or taken.step not in (None, 1):
            order = list(range(size))
            places = taken if isinstance(taken, list) else order[taken]
            for rank, place in enumerate(places):
                order[place] = size + rank
            both = self._emit_function(torch.cat, [base, inner], axis)
            ranks = torch.tensor(order, device=base.meta['example'].device)
            return self._emit_method('index_select', both, axis, self._constant(ranks))
        start, stop, _ = slice(_example(taken.start), _example(taken.stop)).indices(size)
        pieces = [inner]
        if start > 0:
            pieces.insert(0, self._emit_function(operator.getitem, base, (*around, slice(None, taken.start))))
        if max(start, stop) < size:
            end = taken.stop if stop >= start else taken.start
            pieces.append(self._emit_function(operator.getitem, base, (*around, slice(end, None))))
        return inner if len(pieces) == 1 else self._emit_function(torch.cat, pieces, axis)

    def _scattered(self, base: fx.Node, entries: list[Any], new: Any) -> fx.Node:
        """``base[entries] = new`` where indices are tensors."""
        examples = [_example(e) for e in entries]
        if len(entries) == 1 and isinstance(examples[0], Tensor) and examples[0].dtype == torch.bool:
            mask, value = entries[0], new
            if not isinstance(_example(value), Tensor) or _example(value).dim() == 0:
                for _ in range(base.meta['example'].dim() - examples[0].dim()):
                    mask = self._emit_method('unsqueeze', mask, -1)
                value = self._like(value, base)
                return self._emit_function(torch.where, mask, value, base)
        if not all(isinstance(e, Tensor) for e in examples):
            raise self._refusal('an assignment to a list of indices beside slices cannot be followed')
        shown = self._emit_function(operator.getitem, base, tuple(entries))
        return self._emit_function(torch.index_put, base, tuple(entries), self._like(new, shown))

    def _like(self, value: Any, shown: fx.Node) -> fx.Node:
        """``value`` with the shape and the type of ``shown``."""
        example = _example(value)
        if not isinstance(example, Tensor):
            return self._emit_function(torch.full_like, shown, value)
        wanted = shown.meta['example']
        if example.dtype != wanted.dtype:
            value = self._emit_method('to', value, wanted.dtype)
        if example.shape == wanted.shape:
            return value
        for _ in range(example.dim() - wanted.dim()):
            value = self._emit_method('squeeze', value, 0)
        return self._emit_method('expand_as', value, shown)

    def _as_slice(self, entry: Any) -> Any:
        return entry if isinstance(entry, (slice, list)) else slice(entry, self._end(entry, 1))

    def _end(self, start: Any, count: Any) -> Any:
        if _example(start) < 0 and _example(start) + _example(count) == 0:
            return None
        is_symbolic = isinstance(start, fx.Node) or isinstance(count, fx.Node)
        return self._emit_function(operator.add, start, count) if is_symbolic else start + count

    def _out_of_place(self, node: fx.Node, target: fx.Node) -> fx.Node:
        """The node of the same result that writes nothing."""
        name = _name(node)
        if node.op == 'call_module':
            pass  # `switch_off_in_place` does it when nothing is traced any more
        elif name in ('copy_', 'fill_', 'zero_'):
            value = 0 if name == 'zero_' else node.args[1]
            return self._like(value, self.value(target))
        elif name in _RANDOM:
            raise self._refusal(f'{name} draws random numbers')
        elif 'out' in node.kwargs:
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != 'out'}
        elif node.target in IN_PLACE_OPERATORS:
            node.target = IN_PLACE_OPERATORS[node.target]
        elif node.op == 'call_method' and hasattr(Tensor, name.removesuffix('_')):
            node.target = name.removesuffix('_')
        elif node.op == 'call_function' and name.endswith('_') and hasattr(_home(name), name.removesuffix('_')):
            node.target = getattr(_home(name), name.removesuffix('_'))
        elif not self._switch_off(node):
            raise self._refusal(f'{name} writes into a tensor')
        node.meta['example'] = self._example_of(node)
        self.before = node.next
        return node

    def _switch_off(self, node: fx.Node) -> bool:
        """Sets the argument ``inplace`` of a function to False."""
        try:
            bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return False
        if not bound.arguments.get('inplace', False):
            return False
        bound.arguments['inplace'] = False
        node.args, node.kwargs = bound.args, bound.kwargs
        return True

    def _example_of(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta['example'])
        if node.op == 'call_module':
            with _in_place(self.model.get_submodule(str(node.target)), False):
                return self.model.get_submodule(str(node.target))(*args, **kwargs)
        return evaluate(node, args, kwargs)

    def _emit_function(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self._emit('call_function', function, args, {})

    def _emit_method(self, name: str, *args: Any) -> fx.Node:
        return self._emit('call_method', name, args, {})

    def _emit(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.create_node(op, target, args, kwargs)
        node.meta.update(self.anchor.meta, writes=[], view=None)
        node.meta['example'] = self._example_of(node)
        node.meta['depends'] = dependence(node)
        return node

    def _constant(self, value: Tensor) -> fx.Node:
        name = f'_order_constant{len(self.constants)}'
        self.constants[name] = value
        with self.graph.inserting_before(self.before):
            node = self.graph.create_node('get_attr', name)
        node.meta.update(self.anchor.meta, writes=[], view=None, example=value, depends=set())
        return node

    def _below(self, node: fx.Node) -> Iterator[fx.Node]:
        """The node and the views of it."""
        yield node
        for view in self.views.get(node, ()):
            yield from self._below(view)

    def _refusal(self, reason: str) -> UntraceableError:
        is_opaque = self.anchor.op == 'call_module'
        owner = self.anchor.meta['caller' if is_opaque else 'owner']
        return UntraceableError(owner, f'{self.anchor.meta.get("line", self.anchor.name)}: {reason}')


def _root(node: fx.Node) -> fx.Node:
    while node.meta['view'] is not None:
        node = node.meta['view']
    return node


def _is_same(view: fx.Node) -> bool:
    """Whether a view shows all of its base as it lies."""
    shown, base = view.meta['example'], view.meta['view'].meta['example']
    if not isinstance(shown, Tensor) or not isinstance(base, Tensor):
        return False
    layouts = [(t.shape, t.stride(), t.storage_offset(), t.dtype) for t in (shown, base)]
    return layouts[0] == layouts[1]


def _probe(like: Tensor) -> Tensor:
    """A number for each element, in memory that is laid out as that of ``like``."""
    numbers = torch.arange(like.numel(), dtype=torch.int64).reshape(like.shape)
    if 0 in like.stride():
        return numbers
    return torch.empty_strided(like.shape, like.stride(), dtype=torch.int64).copy_(numbers)


def _example(value: Any) -> Any:
    return value.meta['example'] if isinstance(value, fx.Node) else value


def _listed(entry: Any) -> Any:
    """An index that is a constant tensor as a list."""
    example = _example(entry)
    if not isinstance(example, Tensor) or 'values' in entry.meta['depends'] or example.dim() != 1:
        return entry
    return (example.nonzero().flatten() if example.dtype == torch.bool else example).tolist()


def _name(node: fx.Node) -> str:
    if node.target is getattr:
        return str(node.args[1])
    return str(getattr(node.target, '__name__', node.target))


def _home(name: str) -> Any:
    """The module of torch that has the function that writes nothing."""
    return torch if hasattr(torch, name.removesuffix('_')) else F
