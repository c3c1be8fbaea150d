"""Finding the blocks of a network by the structure of its graph.

A block is a module with branches that meet again: a residual block, an inverted residual, a layer of a transformer, an
Inception module. It is recognised by what its nodes compute, never by the name of its class.
"""

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from torch import fx, nn

from mmbrecq.errors import PatternError
from mmbrecq.graph.roles import Roles
from mmbrecq.graph.symbolic import tensors_in
from mmbrecq.graph.units import is_below

MAX_LAYERS = 10
"""A module with more layers than this is a stage: the blocks within it are units, or else its layers."""


def find_blocks(model: nn.Module, graph: fx.Graph, blocks: Iterable[str] | None) -> list[str]:
    """Returns the paths of the outermost blocks of a traced graph without quantizers.

    ``blocks`` are class names or glob patterns over module paths, PatternError is raised for one that matches no
    module; with None the blocks are found by structure.
    """
    found = _structural_blocks(model, graph) if blocks is None else _named_blocks(model, tuple(blocks))
    outermost: list[str] = []
    for path, _ in model.named_modules():
        if path in found and not any(is_below(path, outer) for outer in outermost):
            outermost.append(path)
    return outermost


def _named_blocks(model: nn.Module, entries: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    for entry in entries:
        matches = {p for p, m in model.named_modules() if entry == type(m).__name__ or (p and fnmatchcase(p, entry))}
        if not matches:
            raise PatternError(f"expected quantizer.blocks to name a module type or a path, but '{entry}' matches none")
        found |= matches
    return found


def _structural_blocks(model: nn.Module, graph: fx.Graph) -> set[str]:
    """Returns the modules in which values of different layers meet, and the other modules of their types.

    Each has one output and 2 to :data:`MAX_LAYERS` layers, but not all of the graph. Modules of the first kind do not
    read the input of the graph, as a network that is written as one module does; inverted residuals without a shortcut
    are of the second kind. A module that chains blocks of different types and nothing else that has layers, as the
    layer of a transformer whose attention adds its own input, is a block itself; a stage chains blocks of one type.
    """
    regions: dict[str, set[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ('call_module', 'call_function', 'call_method'):
            for path in _ancestors(node.meta['owner']):
                regions.setdefault(path, set()).add(node)
    layers = {path: {layer for n in region for layer in n.meta.get('layers', ())} for path, region in regions.items()}
    whole = len(layers.get('', ()))
    possible = {}
    for path, region in regions.items():
        outputs = [node for node in region if _has_tensors(node) and not region.issuperset(node.users)]
        if 2 <= len(layers[path]) <= MAX_LAYERS and len(layers[path]) < whole and len(outputs) == 1:
            possible[path] = type(model.get_submodule(path))
    owners = (node.meta['owner'] for node in _joins(model, graph))
    joined = {next((path for path in _ancestors(owner) if len(layers[path]) > 1), '') for owner in owners}
    reading = set(next(n for n in graph.nodes if n.op == 'placeholder').users)
    joined = {path for path in joined if path in possible and not reading & regions[path]}
    types = {possible[path] for path in joined if not _is_list(possible[path])}
    found = {path for path, kind in possible.items() if path in joined or kind in types}
    children: dict[str, list[str]] = {}
    for path in found:
        children.setdefault(path.rpartition('.')[0], []).append(path)
    for path in children.keys() & possible.keys():
        has_all = layers[path] == {layer for child in children[path] for layer in layers[child]}
        if has_all and len({possible[child] for child in children[path]}) > 1 and not _is_list(possible[path]):
            found.add(path)
    return found


def _is_list(kind: type[nn.Module]) -> bool:
    return kind.forward in (nn.Sequential.forward, nn.Module.forward)


def _joins(model: nn.Module, graph: fx.Graph) -> Iterator[fx.Node]:
    """Yields sums, products and concatenations of values that went through different layers."""
    roles = Roles(model, graph)
    passed: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        sources = [passed[n] for n in node.all_input_nodes if n in passed]
        follows = 'values' in node.meta.get('depends', ('values',))
        if node.op == 'placeholder' or (sources and follows and _has_tensors(node)):
            passed[node] = frozenset(node.meta.get('layers', ())).union(*sources)
        joins = roles.is_add(node) or roles.is_concat(node) or roles.operation(node) == 'mul'
        if len(set(sources)) > 1 and joins:
            yield node


def _ancestors(path: str) -> Iterator[str]:
    """Yields ``path`` and the paths above it, the innermost first."""
    while path:
        yield path
        path = path.rpartition('.')[0]
    yield ''


def _has_tensors(node: fx.Node) -> bool:
    return any(True for _ in tensors_in(node.meta['example']))
