"""Cuts a graph into reconstruction units.

A unit consists of consecutive nodes, so any cut is executable in order; it may have several inputs and outputs. What
crosses from unit to unit is kept image by image, so a value without the images along its first axis crosses none.
"""

from dataclasses import dataclass

from torch import Tensor, fx, nn

from mmbrecq.building import expect
from mmbrecq.graph.components import graph_module

GRANULARITIES = ('layer', 'block', 'stage', 'net')


@dataclass(frozen=True)
class ReconstructionUnit:
    """Holds consecutive nodes that are reconstructed together.

    Args:
        name: Path of the block, or of the layer.
        module: Computes the unit: ``module(*inputs) -> tuple`` of its outputs.
        inputs: Names of the values that it reads.
        outputs: Names of the values that others read, or that leave the network.
        layers: Paths of its quantized convolutions and linear layers.
        quantizers: Names of its activation quantizers.
    """

    name: str
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]
    quantizers: tuple[str, ...]

    @property
    def is_quantized(self) -> bool:
        """Whether it has a quantized layer or a quantizer."""
        return bool(self.layers or self.quantizers)


def is_below(path: str, ancestor: str) -> bool:
    """Returns whether ``path`` is ``ancestor`` or lies below it; all paths lie below the empty one."""
    return not ancestor or path == ancestor or path.startswith(ancestor + '.')


def check_granularity(granularity: str, where: str = 'granularity') -> None:
    """Raises ConfigError, which names ``where``, unless units are cut so."""
    expect(granularity in GRANULARITIES, f'{where} to be one of {list(GRANULARITIES)}', granularity)


def cut_units(
    model: nn.Module,
    graph: fx.Graph,
    layers: set[str],
    quantizers: set[str],
    blocks: list[str],
    path: str,
    granularity: str,
) -> list[ReconstructionUnit]:
    """Cuts a prepared graph into units in the order of execution.

    Quantized layers, activation quantizers and blocks are given by their paths below ``model``. ``path`` is that of the
    head that the graph computes, empty for the graph of the images; units without a name of their own are named after
    it, so that no two graphs have units of one name. ``granularity`` is ``layer`` (one layer with what follows it),
    ``block``, ``stage`` (blocks that share a parent) or ``net`` (everything).
    """
    check_granularity(granularity)
    runs = _merge_bound(_runs(graph, layers, blocks, granularity), layers)
    copied = [_copied(run) for run in runs]
    needed = {name for _, inputs in copied for name in inputs}
    needed |= {n.name for n in next(n for n in graph.nodes if n.op == 'output').all_input_nodes}
    units = []
    for index, (run, (copies, inputs)) in enumerate(zip(runs, copied, strict=True)):
        targets = list(dict.fromkeys(str(n.target) for n in run if n.op == 'call_module'))
        unit_layers = tuple(layer for t in targets for layer in sorted(layers) if is_below(layer, t))
        own = f'{path}.{granularity}{index}'.removeprefix('.')
        named = unit_layers[0] if unit_layers and granularity != 'net' else own
        name = _group_of(run[0], blocks, granularity) or named
        outputs = [n for n in run if n.name in needed and isinstance(n.meta['example'], Tensor)]
        unit_graph = copies[run[0]].graph
        unit_graph.output(tuple(copies[n] for n in outputs))
        names = tuple(inputs), tuple(n.name for n in outputs), unit_layers, tuple(t for t in targets if t in quantizers)
        units.append(ReconstructionUnit(name, graph_module(model, unit_graph, 'Unit'), *names))
    return units


def _group_of(node: fx.Node, blocks: list[str], granularity: str) -> str | None:
    if granularity == 'net':
        return ''
    if granularity == 'layer':
        return None
    block = next((b for b in blocks if is_below(node.meta.get('owner', ''), b)), None)
    return block.rpartition('.')[0] if block is not None and granularity == 'stage' else block


def _runs(graph: fx.Graph, layers: set[str], blocks: list[str], granularity: str) -> list[list[fx.Node]]:
    runs: list[list[fx.Node]] = []
    group: str | None = None
    has_layer = False
    for node in graph.nodes:
        if node.op in ('placeholder', 'output', 'get_attr'):
            continue
        node_group = _group_of(node, blocks, granularity)
        is_layer = node.op == 'call_module' and any(is_below(layer, str(node.target)) for layer in layers)
        if not runs or node_group != group or (node_group is None and is_layer and has_layer):
            runs.append([])
            has_layer = False
        runs[-1].append(node)
        has_layer |= is_layer
        group = node_group
    return runs


def _is_recomputed(node: fx.Node) -> bool:
    """Returns whether units compute the value where they read it: no tensor, or one of sizes and parameters alone."""
    if not isinstance(node.meta['example'], Tensor):
        return True
    return not node.meta.get('by_image', True) and node.meta.get('depends', {'values'}) <= {'size', 'state'}


def _merge_bound(runs: list[list[fx.Node]], layers: set[str]) -> list[list[fx.Node]]:
    """Merges the runs between the first and the last call of a layer, since its weight is learned only once.

    So it does those between a value that cannot be kept image by image and its last reader.
    """
    called: list[list[object]] = []
    for run in runs:
        targets = [str(n.target) for n in run if n.op == 'call_module' and str(n.target) in layers]
        read = [n for node in run for n in (node, *node.all_input_nodes)]
        called.append([*targets, *(n for n in read if not n.meta.get('by_image', True) and not _is_recomputed(n))])
    last = {layer: index for index, own in enumerate(called) for layer in own}
    merged: list[list[fx.Node]] = []
    end = -1
    for index, run in enumerate(runs):
        if index <= end:
            merged[-1].extend(run)
        else:
            merged.append(list(run))
        end = max([end, *(last[layer] for layer in called[index])])
    return merged


def _copied(run: list[fx.Node]) -> tuple[dict[fx.Node, fx.Node], list[str]]:
    """Copies a run of nodes into a graph of its own; returns the copies, and the names of the values that it reads.

    Values that are no tensors (sizes, tuples of a split) are recomputed where they are read, and tensors that follow
    from sizes without the images along their first axis, so that only values of images cross from unit to unit.
    """
    graph, body = fx.Graph(), set(run)
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[fx.Node] = []

    def copy(node: fx.Node) -> None:
        if node in copies:
            return
        if node in body or node.op == 'get_attr' or _is_recomputed(node):
            for source in node.all_input_nodes:
                copy(source)
            copies[node] = graph.node_copy(node, copies.__getitem__)
        else:
            with graph.inserting_after(copies[inputs[-1]] if inputs else None):
                copies[node] = graph.placeholder(node.name)
            inputs.append(node)

    for node in run:
        copy(node)
    return copies, [node.name for node in inputs]
