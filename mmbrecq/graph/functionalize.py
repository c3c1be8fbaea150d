"""Gives in-place operations a form that overwrites nothing, with the effect that they had.

An operation that writes into a tensor changes every other view of the same memory. Here it becomes one that computes
the new value; the tensors that it was a view of are assembled anew, and the other views are recomputed where they are
read. The graph then has a value for each node, so it can be cut anywhere and values can be cached.
"""

import operator
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mmbrecq.graph.symbolic import IN_PLACE_OPERATORS, bind, called_module, dependence, evaluate, example_of
from mmbrecq.graph.tracer import UntraceableError

_PERMUTES = ('permute', 'transpose', 't', 'T', 'mT', 'swapaxes', 'swapdims', 'movedim', 'moveaxis')
_SPLITS = ('chunk', 'split', 'tensor_split', 'split_with_sizes', 'unbind')


def functionalize(model: nn.Module, graph: fx.Graph, constants: dict[str, Tensor]) -> None:
    """Replaces the in-place operations of a traced graph; ``constants`` receives the tensors that the new nodes read.

    UntraceableError is raised for an operation without a form that overwrites nothing.
    """
    _Functionalizer(model, graph, constants).run()


def switch_off_in_place(model: nn.Module, graph: fx.Graph, opaque: Container[str]) -> None:
    """Makes modules that are one operation of a functionalized graph overwrite nothing."""
    for node in graph.nodes:
        module = called_module(model, node)
        if hasattr(module, 'inplace') and str(node.target) not in opaque:
            module.inplace = False


class _Functionalizer:
    """Rewrites a graph; a node that is being replaced is the ``anchor``, and new ones come ``before`` another."""

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
        """Returns the node that holds what ``node`` holds at this point of the graph."""
        if node not in self.stale:
            return self.values.get(node, node)
        self.stale.discard(node)
        base = node.meta['view']
        present = self.value(base)
        if _is_same(node):
            self.values[node] = present
            return present
        module = called_module(self.model, node)
        if module is not None and not type(module).__module__.startswith('torch.'):
            raise self._refusal('a module returns a view of what is written')
        args, kwargs = fx.node.map_arg(self.calls[node], self.value)
        with self.graph.inserting_before(self.before):
            copy = self.graph.create_node(node.op, node.target, args, kwargs)
        copy.meta.update(node.meta)
        self.values[node] = copy
        return copy

    def _replace(self, node: fx.Node) -> None:
        """Gives a node that writes a form that does not, and makes later readers see its effect."""
        written = self._written(node)
        if node.op == 'call_module' and not hasattr(called_module(self.model, node), 'inplace'):
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
            new = self._emit('to', new, target.meta['example'].dtype)
        elif new is not node:
            self.dead.append(node)
        self._write(target, new)
        self.values[node] = new
        self.stale.discard(node)

    def _written(self, node: fx.Node) -> list[fx.Node]:
        """Returns the arguments that an operation writes into, as the nodes were before any was replaced."""
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
            copy = self._emit('clone', present)
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
        """Returns the node of ``base`` with the elements that ``view`` shows replaced by ``new``."""
        shape, name = view.meta['example'].shape, _name(view)
        index = self._slices(view, name)
        if index is not None:
            return self._assigned(base, index, new)
        probe = _probe(base.meta['example'])
        shown = self._run(view, probe)
        if isinstance(shown, Tensor) and shown.numel() == probe.numel():
            if torch.equal(shown.reshape(-1), probe.reshape(-1)):
                return self._emit('reshape_as', new, base)
            if name in _PERMUTES and shown.dim() == probe.dim():
                sizes = torch.zeros([2 + axis for axis in range(probe.dim())])
                order = [size - 2 for size in self._run(view, sizes).shape]
                return self._emit('permute', new, *[order.index(axis) for axis in range(probe.dim())])
        raise self._refusal(f'the effect of a write into a view by {name} of shape {tuple(shape)} cannot be followed')

    def _run(self, view: fx.Node, probe: Tensor) -> Any:
        base = view.meta['view']
        return evaluate(view, lambda n: probe if n is base else example_of(n), self.model, self.calls[view])

    def _slices(self, view: fx.Node, name: str) -> Any:
        """Returns the index by which a view selects, None where it does not."""
        args, kwargs = fx.node.map_arg(self.calls[view], self.value)
        if view.target is operator.getitem:
            return args[1]
        if name not in ('select', 'narrow'):
            return None
        given = dict(zip(('dim', 'index' if name == 'select' else 'start', 'length'), args[1:], strict=False))
        given.update(kwargs)
        around = (slice(None),) * (given['dim'] % view.meta['view'].meta['example'].dim())
        if name == 'select':
            return (*around, given['index'])
        return (*around, slice(given['start'], self._end(given['start'], given['length'])))

    def _joined(self, part: fx.Node, parts: fx.Node, new: fx.Node) -> fx.Node:
        """Returns the node of the tensor that was split into ``parts``, of which ``part`` is replaced by ``new``."""
        base, name = parts.meta['view'], _name(parts)
        if name not in _SPLITS or base is None or not isinstance(base.meta['example'], Tensor):
            raise self._refusal(f'the effect of a write into a result of {name} cannot be followed')
        args, kwargs = fx.node.map_arg(self.calls[parts], self.value)
        dim = kwargs.get('dim', args[-1] if len(args) > (1 if name == 'unbind' else 2) else 0)
        split = self._emit(parts.target, *args, **kwargs)
        count = len(parts.meta['example'])
        index = int(part.args[1]) % count  # type: ignore[arg-type]
        items = [new if i == index else self._emit(operator.getitem, split, i) for i in range(count)]
        return self._emit(torch.stack if name == 'unbind' else torch.cat, items, dim)

    def _out_of_place(self, node: fx.Node, target: fx.Node) -> fx.Node:
        """Returns the node of the same result that overwrites nothing."""
        name = _name(node)
        plain = name.removesuffix('_')
        function = getattr(torch, plain, getattr(F, plain, None))
        if node.op == 'call_module':
            pass  # `switch_off_in_place` does it when nothing is traced any more
        elif name in ('copy_', 'fill_', 'zero_'):
            return self._like(0 if name == 'zero_' else node.args[1], self.value(target))
        elif name == 'bernoulli_':
            raise self._refusal(f'{name} draws random numbers')
        elif 'out' in node.kwargs:
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != 'out'}
        elif node.target in IN_PLACE_OPERATORS:
            node.target = IN_PLACE_OPERATORS[node.target]
        elif node.op == 'call_method' and hasattr(Tensor, plain):
            node.target = plain
        elif node.op == 'call_function' and name != plain and function is not None:
            node.target = function
        elif (bound := bind(node)) is not None and bound.arguments.get('inplace', False):
            bound.arguments['inplace'] = False
            node.args, node.kwargs = bound.args, bound.kwargs
        else:
            raise self._refusal(f'{name} writes into a tensor')
        node.meta['example'] = evaluate(node, model=self.model)
        self.before = node.next
        return node

    def _assigned(self, base: fx.Node, index: Any, new: Any) -> fx.Node:
        """Returns the node of what ``base`` holds after ``base[index] = new``."""
        entries = [_listed(e) for e in (index if isinstance(index, tuple) else [index])]
        lists = [e for e in entries if isinstance(e, list)]
        if len(lists) > 1 or any(isinstance(example_of(e), Tensor) for e in entries):
            return self._scattered(base, entries, new)
        used = sum(e is not None and e is not Ellipsis for e in entries)
        for at in [i for i, e in enumerate(entries) if e is Ellipsis]:
            entries[at : at + 1] = [slice(None)] * (base.meta['example'].dim() - used)
        kept = [e if isinstance(e, (slice, list)) else slice(e, self._end(e, 1)) for e in entries if e is not None]
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

    def _below(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yields the node and all views of it."""
        yield node
        for view in self.views.get(node, ()):
            yield from self._below(view)


def _root(node: fx.Node) -> fx.Node:
    while node.meta['view'] is not None:
        node = node.meta['view']
    return node


def _is_same(view: fx.Node) -> bool:
    """Returns whether a view shows all of its base in the same layout."""
    both = [view.meta['example'], view.meta['view'].meta['example']]
    if not all(isinstance(t, Tensor) for t in both):
        return False
    return len({(t.shape, t.stride(), t.storage_offset(), t.dtype) for t in both}) == 1


def _probe(like: Tensor) -> Tensor:
    """Returns a number for each element, in the memory layout of ``like``."""
    numbers = torch.arange(like.numel(), dtype=torch.int64).reshape(like.shape)
    if 0 in like.stride():
        return numbers
    return torch.empty_strided(like.shape, like.stride(), dtype=torch.int64).copy_(numbers)


def _listed(entry: Any) -> Any:
    """Returns an index that is a constant tensor as a list; others as they are."""
    example = example_of(entry)
    if not isinstance(example, Tensor) or 'values' in entry.meta['depends'] or example.dim() != 1:
        return entry
    return (example.nonzero().flatten() if example.dtype == torch.bool else example).tolist()


def _name(node: fx.Node) -> str:
    if node.target is getattr:
        return str(node.args[1])
    return str(getattr(node.target, '__name__', node.target))
