"""Finds the layers whose inputs cost the outputs most at 8 bits, and leaves them in float, before any work is spent.

In real networks a few values carry nearly all of the loss: one GELU of a vision transformer reaches two hundred times
the magnitude of the others (Sun et al., Massive Activations in Large Language Models, COLM 2024), and no grid has
levels for both. Their loss adds up, so that groups which lose next to nothing together need not be taken apart.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Any

from mmbrecq.mixed_precision.sensitivity.measure import OutputLoss
from mmbrecq.qtype import MAX_BITS
from mmbrecq.quantizers.options import FLOAT, FallbackOptions
from mmbrecq.quantizers.quantized_model import QuantizedGraph

ROUNDS = 2
"""Times that the worst grids at 8 bits are looked for; the second is without what the first has left in float."""

RAISING_PASSES = 128
"""Most passes over a few images that look for the worst grids below 8 bits."""


@dataclass
class Diagnosis:
    """Tells what grids of activations cost, and which layers are better in float.

    Args:
        kind: Kind of the loss.
        before: Loss with all activations at 8 bits.
        after: The same without those of the layers that stay in float.
        layers: Layers that stay in float, each with the loss of the grid of its input.
        raised: Layers that read 8 bits where the config has fewer, each with the loss of the grid of its input.
    """

    kind: str
    before: float = 0.0
    after: float = 0.0
    layers: dict[str, float] = field(default_factory=dict)
    raised: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        found = []
        if self.before:
            count, kind = len(self.layers), self.kind
            more = f', {self.after:.2g} with {count} layers in float' if count else ''
            found.append(f'activations at 8 bits cost the outputs {self.before:.2g} ({kind}){more}')
        if self.raised:
            worst = ', '.join(f'{layer} ({loss:.2g})' for layer, loss in self.raised.items())
            found.append(
                f'inputs of layers get {MAX_BITS} bits, for fewer alone cost the outputs ({self.kind}): {worst}'
            )
        return '; '.join(found)

    def overrides(self) -> list[dict[str, Any]]:
        """Returns the options of a quantizer that leave the layers in float, or give them more bits."""
        found: list[dict[str, Any]] = []
        for layer, loss in self.raised.items():
            reason = f'with fewer bits its input alone costs the outputs {loss:.2g} ({self.kind})'
            found.append({'pattern': layer, 'activation_bits': MAX_BITS, 'reason': reason})
        for layer, loss in self.layers.items():
            reason = f'at 8 bits its input costs {loss:.2g} of {self.before:.2g} at the outputs ({self.kind})'
            found.append({'pattern': layer, 'weight_bits': FLOAT, 'activation_bits': FLOAT, 'reason': reason})
        return found


@dataclass
class GridLoss:
    """Tells what one grid, of a ``weight`` or an ``activation``, costs the outputs, all else in float.

    Args:
        name: Path of the layer for a weight, of the quantizer for an activation.
        layers: The layers that read an activation, or the one that writes it where none does; empty for a weight.
    """

    name: str
    kind: str
    bits: int
    loss: float
    layers: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The name, of an activation without the module that has all of them."""
        return self.name.removeprefix('activation_quantizers.')


@dataclass
class GridLosses:
    """Holds the losses of the grids of a graph over some images, the largest first.

    ``together`` is the loss with all grids at once, ``grids`` are those that were measured alone, all or the worst, and
    ``count`` is the number of all grids.
    """

    kind: str
    images: int
    together: float
    grids: list[GridLoss]
    count: int

    def describe_worst(self, bound: float, shown: int = 5) -> str | None:
        """Names the grids that cost more than a bound; None where there are none."""
        worst = [grid for grid in self.grids if grid.loss > bound]
        names = [f'{grid.kind} {grid.label} {grid.loss:.2g}' for grid in worst[:shown]]
        more = f' and {len(worst) - shown} more' if len(worst) > shown else ''
        text = f'grids that alone cost the outputs more than {bound:.2g} before anything is learned ({self.kind})'
        return f'{text}: {", ".join(names)}{more}' if worst else None


def measure_grids(graph: QuantizedGraph, loss: OutputLoss, images: int, passes: int | None = None) -> GridLosses:
    """Switches the grids of a calibrated graph on one by one and measures the loss of the outputs over some images.

    Where there are more grids than ``passes``, the worst are looked for group by group in so many passes over the
    images; None for a pass for every grid.
    """
    owners = _owners(graph)
    found = {name: GridLoss(name, 'weight', fq.qtype.bits, 0.0) for name, _, fq in graph.weights()}
    for path, fq in graph.quantizers.items():
        found[path] = GridLoss(path, 'activation', fq.qtype.bits, 0.0, sorted(owners.get(path, ())))

    def of(names: Collection[str]) -> float:
        weights = [name for name in names if found[name].kind == 'weight']
        return loss.of(weights, [name for name in names if found[name].kind != 'weight'])

    together = of(found)
    alone = _alone(list(found), of, together, 0.0, math.inf if passes is None else passes)
    grids = [replace(found[name], loss=value) for name, value in alone.items()]
    return GridLosses(loss.kind, images, together, sorted(grids, key=lambda grid: -grid.loss), len(found))


def diagnose(
    graph: QuantizedGraph, loss: Callable[[Sequence[str]], float], kind: str, options: FallbackOptions
) -> Diagnosis:
    """Finds the layers to leave in float: as few as bring the loss below the bound, within the limit.

    ``graph`` has calibrated 8-bit grids; ``loss``, of a ``kind`` in words, returns that of the outputs with the given
    activation quantizers on and all else in float.
    """
    paths = list(graph.quantizers)
    before = loss(paths) if paths else 0.0
    found = Diagnosis(kind, before, before)
    if before <= options.bound:
        return found
    owners = _owners(graph)
    room = options.limit * sum(layer.activation_bits is not None for layer in graph.layers)
    for _ in range(ROUNDS):
        # what single grids cost shows when those that cost more are gone
        start, least = found.after, max(options.bound / 4, found.after / 20)
        worst = _alone(paths, loss, start, least)
        # what helps most for each layer that loses its integer kernel comes first
        for path in sorted(worst, key=lambda path: -worst[path] / max(len(owners.get(path, ())), 1)):
            layers = owners.get(path, set()) - set(found.layers)
            if found.after <= options.bound or len(found.layers) + len(layers) > room or not layers:
                continue
            more = {**found.layers, **dict.fromkeys(sorted(layers), worst[path])}
            rest = [other for other in paths if not owners.get(other) or not owners[other] <= set(more)]
            after = loss(rest)
            # errors of several grids may cancel each other
            if after < found.after:
                paths, found.layers, found.after = rest, more, after
        if found.after <= options.bound or found.after == start:
            break
    return found


def find_raised(
    graph: QuantizedGraph, loss: Callable[[Sequence[str]], float], options: FallbackOptions
) -> dict[str, float]:
    """Returns the layers whose input on a grid below 8 bits loses more than its bound alone, with that loss.

    Where they are more than the limit allows the worst are taken. ``graph`` has calibrated grids of the bits of the
    config; ``loss`` is that of :func:`diagnose`.
    """
    paths = [path for path, quantizer in graph.quantizers.items() if quantizer.qtype.bits < MAX_BITS]
    if options.low_bound is None or not paths:
        return {}
    owners = _owners(graph)
    if (together := loss(paths)) <= options.low_bound:
        return {}
    alone = _alone(paths, loss, together, options.low_bound, RAISING_PASSES)
    worst = sorted(((path, own) for path, own in alone.items() if own > options.low_bound), key=lambda item: -item[1])
    raised = [(layer, own) for path, own in worst for layer in sorted(owners.get(path, ()))]
    return dict(raised[: math.ceil(options.low_limit * len(graph.layers))])


def _owners(graph: QuantizedGraph) -> dict[str, set[str]]:
    """Returns the layers that read each activation on its grid; where there are none, the one that writes it."""
    owners: dict[str, set[str]] = {}
    for layer, read in graph.read_quantizers().items():
        for path in read:
            owners.setdefault(path, set()).add(layer)
    layers = {layer.name for layer in graph.layers}
    for node in graph.traced.graph.nodes:
        if node.op == 'call_module' and node.target in graph.quantizers and node.target not in owners:
            owners[str(node.target)] = layers & {str(source.target) for source in node.all_input_nodes}
    return owners


def _alone(
    paths: Sequence[str],
    loss: Callable[[Sequence[str]], float],
    total: float,
    least: float,
    passes: float | None = None,
) -> dict[str, float]:
    """Returns the loss of every grid alone, or, without so many ``passes``, but for groups that lose ``least`` or less.

    The group that loses most is halved first, so that the worst are found; None is for as many passes as that takes.
    """
    if passes is not None and len(paths) <= passes:
        return {path: loss([path]) for path in paths}
    found: dict[str, float] = {}
    groups, left = [(-total, 0, paths)], math.inf if passes is None else passes
    while groups and -groups[0][0] > least:
        negative, start, group = heappop(groups)
        if len(group) == 1:
            found[group[0]] = -negative
        elif left >= 2:
            middle, left = len(group) // 2, left - 2
            for begin, part in ((start, group[:middle]), (start + middle, group[middle:])):
                heappush(groups, (-loss(part), begin, part))
    return found
