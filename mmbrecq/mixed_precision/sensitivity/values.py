"""Activations whose bits are chosen together: what shares a reader, or a quantizer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mmbrecq.quantizers.quantized_model import QuantizedGraph


@dataclass(frozen=True)
class ValueGroup:
    """Activations that have one number of bits.

    Args:
        quantizers: Their paths.
        layers: Layers that read them, in the order of the network.
    """

    quantizers: tuple[str, ...]
    layers: tuple[str, ...]


def value_groups(graph: QuantizedGraph, searched: Collection[str]) -> list[ValueGroup]:
    """The activations of one graph whose bits can be chosen.

    A value that several layers read has one quantizer, and a layer that pyramid levels share reads several values: all
    that hangs together so is one group. A group that a layer with fixed bits reads, too, keeps those.

    Args:
        graph: A prepared graph.
        searched: Layers whose bits are to be chosen.
    """
    groups: list[tuple[set[str], set[str]]] = []
    for layer, quantizers in graph.read_quantizers().items():
        joined = ({layer}, set(quantizers))
        for group in [g for g in groups if g[1] & quantizers]:
            groups.remove(group)
            joined = (joined[0] | group[0], joined[1] | group[1])
        if quantizers:
            groups.append(joined)
    order = {layer.name: index for index, layer in enumerate(graph.layers)}
    found = [
        ValueGroup(tuple(sorted(quantizers)), tuple(sorted(layers, key=order.__getitem__)))
        for layers, quantizers in groups
        if layers <= set(searched)
    ]
    return sorted(found, key=lambda group: order[group.layers[0]])
