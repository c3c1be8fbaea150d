"""Finds the numbers of a graph that follow from sizes of the input, by tracing at several sizes.

Python reads sizes as plain numbers, and a graph keeps those of the example. Two traces of different batch sizes differ
in just these numbers: each is replaced by an expression of the batch size, or refused.
"""

import operator
from typing import Any

from torch import Tensor, fx

from mmbrecq.graph.shapes import shapes_of
from mmbrecq.graph.symbolic import equal, evaluate, operation
from mmbrecq.graph.tracer import ConcreteTracer, UntraceableError
from mmbrecq.graph.units import is_below

_NUMBERS = (bool, int, float, str, type(None))
_WINDOWS = (
    'maxpool1d', 'maxpool2d', 'maxpool3d', 'avgpool1d', 'avgpool2d', 'avgpool3d', 'lppool1d', 'lppool2d',
    'adaptiveavgpool1d', 'adaptiveavgpool2d', 'adaptivemaxpool1d', 'adaptivemaxpool2d', 'unfold', 'fold',
)  # fmt: skip
"""Functions whose sizes are plain numbers in every file."""


class _DifferentError(Exception):
    """Raised when two arguments differ, and not by a number that follows from the batch size."""


def resolve_sizes(
    base: ConcreteTracer, more: ConcreteTracer, wider: ConcreteTracer | None, keep_free: bool
) -> list[str]:
    """Makes the graph of ``base`` right for any batch size, and for any height and width where that can be.

    Values that follow from sizes alone, and are the same for all sizes that the graph serves, become constants.

    Args:
        base: Tracer of the graph, which is changed in place.
        more: Tracer of the same model with another batch size.
        wider: Tracer of the same model with another height and width; None where the model has only one.
        keep_free: Whether height and width are to stay free even where the graph computes with them, but for windows.

    Returns:
        The lines that bind the graph to one height and width, as ``path: file:line``; empty where they are free.

    Raises:
        UntraceableError: The operations follow from the batch size.
    """
    values = _sizes(base)
    frozen, resized = [], values
    try:
        if wider is None:
            raise UntraceableError('', 'the model does not run at another height and width')
        resized = _values_in(wider, _matched(base.graph, wider.graph, None)[0])
    except UntraceableError as error:
        frozen = [f'{error.owner}: {error}']
    theirs, arguments = _matched(base.graph, more.graph, _BatchSize(base.graph, more.graph))
    counts = [len(tracer.example) for tracer in (base, more)]
    for ours, other in theirs.items():
        examples = [n.meta['example'] for n in (ours, other)]
        if isinstance(ours.meta['example'], Tensor):
            ours.meta['by_image'] = [e.shape[:1].numel() if e.dim() else 0 for e in examples] == counts
    others = _values_in(more, theirs)
    constant = {n for n in values if equal(values[n], others[n])}
    bound = [n for n in values if n in constant and not equal(values[n], resized[n])]
    if bound and not (keep_free and all(operation(user) not in _WINDOWS for n in bound for user in n.users)):
        frozen = [f'{n.meta["owner"]}: {n.meta["line"]}' for n in bound]
        bound = []
    for node, (args, kwargs) in arguments.items():
        node.args, node.kwargs = args, kwargs
    _fold(base, {n: values[n] for n in values if n in constant.difference(bound)})
    return list(dict.fromkeys(line.removeprefix(': ') for line in frozen))


def keep_sizes(traced: ConcreteTracer) -> ConcreteTracer:
    """Returns the tracer with what follows from sizes alone; of all other values it keeps the shapes."""
    traced.sizes = _sizes(traced)
    for node in traced.graph.nodes:
        if node.op.startswith('call') and node not in traced.sizes:
            node.meta['example'] = shapes_of(node.meta['example'])
    return traced


class _BatchSize:
    """Writes numbers as ``factor * batch_size + offset``, in nodes at the start of a graph."""

    def __init__(self, graph: fx.Graph, other: fx.Graph) -> None:
        self.input, theirs = (next(n for n in g.nodes if n.op == 'placeholder') for g in (graph, other))
        self.sizes = [int(n.meta['example'].shape[0]) for n in (self.input, theirs)]
        self.made: dict[Any, fx.Node] = {}
        self.last = self.input

    def expression(self, ours: Any, theirs: Any) -> Any:
        factor = (theirs - ours) / (self.sizes[1] - self.sizes[0])
        if isinstance(ours, int) and factor != int(factor):
            raise _DifferentError
        factor = type(ours)(factor)
        size = self._emit(operator.getitem, self._emit(getattr, self.input, 'shape'), 0)
        product = self._emit(operator.mul, size, factor) if factor != 1 else size
        offset = ours - factor * self.sizes[0]
        return self._emit(operator.add, product, offset) if offset else product

    def _emit(self, function: Any, *args: Any) -> fx.Node:
        if (function, *args) not in self.made:
            with self.input.graph.inserting_after(self.last):
                node = self.last = self.input.graph.call_function(function, args)
            node.meta.update(owner='', caller='', line='', depends={'size'})
            node.meta['example'] = evaluate(node)
            self.made[(function, *args)] = node
        return self.made[(function, *args)]


def _matched(
    graph: fx.Graph, other: fx.Graph, batch: _BatchSize | None
) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, Any]]:
    """Returns the node of ``other`` for each of ``graph``, and arguments that are right for both batch sizes."""
    ours, theirs = list(graph.nodes), list(other.nodes)
    same = dict(zip(theirs, ours, strict=False))
    arguments = {}
    for a, b in zip(ours, theirs, strict=False):
        is_same = (a.op, a.target, a.meta['owner']) == (b.op, b.target, b.meta['owner'])
        try:
            if not is_same or (a.op == 'get_attr' and not equal(a.meta['example'], b.meta['example'])):
                raise _DifferentError
            arguments[a] = _merged((a.args, a.kwargs), (b.args, b.kwargs), same, batch)
        except _DifferentError:
            owner = _first_different(ours, theirs)
            owner = _owner(a) if owner is None else owner
            line = next((n.meta['line'] for n in ours if _owner(n) == owner and n not in arguments), a.meta['line'])
            reason = f'{line}: expected the same operations for all sizes of the input'
            raise UntraceableError(owner, reason, by_size=True) from None
    return dict(zip(ours, theirs, strict=True)), arguments


def _merged(a: Any, b: Any, same: dict[fx.Node, fx.Node], batch: _BatchSize | None) -> Any:
    ours: list[Any] = []
    theirs: list[Any] = []
    # what is left are the sequences, with None for each value
    if str(fx.node.map_aggregate(a, ours.append)) != str(fx.node.map_aggregate(b, theirs.append)):
        raise _DifferentError
    merged = iter([_merged_value(x, y, same, batch) for x, y in zip(ours, theirs, strict=True)])
    return fx.node.map_aggregate(a, lambda _: next(merged))


def _merged_value(a: Any, b: Any, same: dict[fx.Node, fx.Node], batch: _BatchSize | None) -> Any:
    if isinstance(b, fx.Node) and same.get(b) is a:
        return a
    if type(a) is not type(b) or isinstance(a, fx.Node):
        raise _DifferentError
    if a == b or (a != a and b != b):
        return a
    if batch is None or type(a) not in (int, float):
        raise _DifferentError
    return batch.expression(a, b)


def _first_different(ours: list[fx.Node], theirs: list[fx.Node]) -> str | None:
    """Returns the path of the outermost module that calls other operations in the two graphs; the first of several."""
    calls: list[dict[str, list[Any]]] = [{}, {}]
    for found, nodes in zip(calls, (ours, theirs), strict=True):
        for node in nodes:
            found.setdefault(_owner(node), []).append((node.op, node.target))
    differing = [path for path in calls[0] if calls[0][path] != calls[1].get(path)]
    return next((p for p in differing if not any(is_below(p, q) for q in differing if q != p)), None)


def _owner(node: fx.Node) -> str:
    """Returns the path of the module whose ``forward`` makes the call."""
    return str(node.meta['caller' if node.op == 'call_module' else 'owner'])


def _sizes(traced: ConcreteTracer) -> dict[fx.Node, Any]:
    """Returns the value of each node that follows from sizes alone."""
    if traced.sizes is not None:
        return traced.sizes
    values: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        if node.op == 'get_attr' and str(node.target) in traced.constants:
            return traced.constants[str(node.target)]
        return values[node] if node in values else node.meta['example']

    for node in traced.graph.nodes:
        if node.op in ('call_function', 'call_method') and node.meta['depends'] <= {'size'}:
            values[node] = evaluate(node, value)
    return values


def _values_in(traced: ConcreteTracer, nodes: dict[fx.Node, fx.Node]) -> dict[fx.Node, Any]:
    """Returns the values of nodes in another graph, where their counterparts are given."""
    values = _sizes(traced)
    return {ours: values.get(theirs) for ours, theirs in nodes.items()}


def _fold(traced: ConcreteTracer, constant: dict[fx.Node, Any]) -> None:
    """Replaces nodes by their values wherever others read them."""
    present: dict[fx.Node, Any] = {}
    for node, value in constant.items():
        users = [user for user in node.users if user not in constant]
        if isinstance(value, Tensor) and users:
            name = f'_size_constant{len(traced.constants)}'
            traced.constants[name] = value
            with traced.graph.inserting_after(node):
                present[node] = traced.graph.get_attr(name)
            present[node].meta.update(node.meta, example=value, depends=set())
        elif _is_number(value):
            present[node] = tuple(value) if isinstance(value, tuple) else value
        for user in users if node in present else ():
            user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), lambda n: present.get(n, n))


def _is_number(value: Any) -> bool:
    return all(map(_is_number, value)) if isinstance(value, (tuple, list)) else isinstance(value, _NUMBERS)
