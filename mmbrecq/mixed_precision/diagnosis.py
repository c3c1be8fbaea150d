"""Finds the layers whose inputs cost the outputs most at 8 bits, and leaves them in float, before any work is spent.

In real networks a few values carry nearly all of the loss: one GELU of a vision transformer reaches two hundred times
the magnitude of the others (Sun et al., Massive Activations in Large Language Models, COLM 2024), and no grid has
levels for both. Their loss adds up, so that groups which lose next to nothing together need not be taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mmbrecq.mixed_precision.sensitivity.measure import OutputLoss
from mmbrecq.quantizers.options import FLOAT, FallbackOptions
from mmbrecq.quantizers.quantized_model import QuantizedGraph


@dataclass
class Diagnosis:
    """Tells what grids of activations cost, and which layers are better in float.

    Args:
        kind: Kind of the loss.
        before: Loss with all activations at 8 bits.
        after: The same without those of the layers that stay in float.
        worst: Loss with the grid of one activation alone, by its path, the worst first; what loses little is missing.
        layers: Layers that stay in float, each with the loss of the grid of its input.
    """

    kind: str
    before: float
    after: float
    worst: dict[str, float] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f'activations at 8 bits cost the outputs {self.before:.2g} ({self.kind})'
        count = len(self.layers)
        return f'{text}, {self.after:.2g} with {count} layers in float' if count else text

    def overrides(self) -> list[dict[str, str]]:
        """Returns the options of a quantizer that leave the layers in float."""
        return [
            {
                'pattern': layer,
                'weight_bits': FLOAT,
                'activation_bits': FLOAT,
                'reason': f'at 8 bits its input costs {loss:.2g} of {self.before:.2g} at the outputs ({self.kind})',
            }
            for layer, loss in self.layers.items()
        ]


@dataclass
class GridLoss:
    """Tells what one grid costs the outputs, all else in float.

    Args:
        name: Path of the layer for a weight, of the quantizer for an activation.
        kind: ``weight`` or ``activation``.
        bits: Its bits.
        loss: The loss.
        layers: The layers that read an activation, or the one that writes it where none does; empty for a weight.
    """

    name: str
    kind: str
    bits: int
    loss: float
    layers: list[str] = field(default_factory=list)


@dataclass
class GridLosses:
    """Holds the losses of all grids of a graph, the largest first.

    Args:
        kind: Kind of the loss.
        images: Number of images that it was measured with.
        together: Loss with all grids at once.
        grids: The single ones.
    """

    kind: str
    images: int
    together: float
    grids: list[GridLoss]


def measure_grids(graph: QuantizedGraph, loss: OutputLoss, images: int) -> GridLosses:
    """Switches every grid of a calibrated graph on by itself and measures the loss of the outputs."""
    owners = _owners(graph)
    grids = [GridLoss(name, 'weight', fq.qtype.bits, loss.of([name])) for name, _, fq in graph.weights()]
    grids += [
        GridLoss(path, 'activation', fq.qtype.bits, loss.of((), [path]), sorted(owners.get(path, ())))
        for path, fq in graph.quantizers.items()
    ]
    together = loss.of([grid.name for grid in grids if grid.kind == 'weight'], list(graph.quantizers))
    return GridLosses(loss.kind, images, together, sorted(grids, key=lambda grid: -grid.loss))


def diagnose(
    graph: QuantizedGraph, loss: Callable[[Sequence[str]], float], kind: str, options: FallbackOptions
) -> Diagnosis:
    """Finds the layers to leave in float: as few as bring the loss below the bound, within the limit.

    Args:
        graph: With calibrated 8-bit grids.
        loss: Returns the loss of the outputs with the given activation quantizers on, all else in float.
        kind: Kind of the loss, in words.
        options: The bound and the limit.
    """
    paths = list(graph.quantizers)
    before = loss(paths) if paths else 0.0
    found = Diagnosis(kind, before, before)
    if before <= options.bound:
        return found
    owners = _owners(graph)
    least = max(options.bound / 4, before / 20)
    found.worst = dict(sorted(_alone(paths, loss, before, least).items(), key=lambda item: -item[1]))
    room = options.limit * sum(layer.activation_bits is not None for layer in graph.layers)
    # what helps most for each layer that loses its integer kernel comes first
    for path in sorted(found.worst, key=lambda path: -found.worst[path] / max(len(owners.get(path, ())), 1)):
        own, layers = found.worst[path], owners.get(path, set()) - set(found.layers)
        if found.after <= options.bound or len(found.layers) + len(layers) > room or not layers:
            continue
        more = {**found.layers, **dict.fromkeys(sorted(layers), own)}
        rest = [other for other in paths if not owners.get(other) or not owners[other] <= set(more)]
        after = loss(rest)
        # errors of several grids may cancel each other
        if after < found.after:
            paths, found.layers, found.after = rest, more, after
    return found


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
    paths: Sequence[str], loss: Callable[[Sequence[str]], float], total: float, least: float
) -> dict[str, float]:
    """Returns the loss of every single grid but for groups that lose no more than ``least`` together."""
    if total <= least:
        return {}
    if len(paths) == 1:
        return {paths[0]: total}
    found: dict[str, float] = {}
    for part in (paths[: len(paths) // 2], paths[len(paths) // 2 :]):
        found |= _alone(part, loss, loss(part), least)
    return found
