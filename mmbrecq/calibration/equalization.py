"""Equalises the ranges of channels, since a grid per tensor fits channels of alike ranges better.

The widest channel sets the scale of an activation, so narrow ones have one or two of 16 levels. Where the graph allows
it (:mod:`mmbrecq.graph.channels`) every channel is divided by a power of its range, and the weights that read it are
multiplied by it. Their own grids, one per output channel, then hold input channels that differ more, which rounding
learns.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq.calibration.calibrator import OBSERVED
from mmbrecq.calibration.regions import RegionCapture
from mmbrecq.data.groups import Images, batches_of, grouped
from mmbrecq.distributed import batch_number, gather
from mmbrecq.errors import GraphError
from mmbrecq.fake_quants.weight import original, set_original
from mmbrecq.graph.channels import find_channel_groups
from mmbrecq.graph.components import pre_hooks
from mmbrecq.graph.equality import unexplained_error
from mmbrecq.graph.roles import Roles
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.progress import track
from mmbrecq.quantizers.quantized_model import QuantizedGraph, QuantizedModel

SMALLEST = 0.01
"""Smallest range of a channel, relative to the widest: a channel that is always 0 must not be divided by 0."""


def equalize_parts(
    model: QuantizedModel, images: Images, regions: RegionCapture, at_once: int = OBSERVED, first_batch: int = 0
) -> int:
    """Equalises a model, by passes over ``at_once`` images, and its heads, see :func:`equalize`."""

    def run() -> None:
        for part in track(batches_of(images, at_once, regions.first), 'ranges of channels'):
            model.image_graph(images[part])

    count = equalize(model, model.image_graph, run, batch_number(regions.first, at_once, grouped(images).ends))
    return count + sum(equalize(model, head, regions.observe, first_batch) for head in model.region_graphs)


def equalize(model: QuantizedModel, graph: QuantizedGraph, run: Callable[[], None], first: int = 0) -> int:
    """Scales the channels of a graph, as much as the quantizer asks for; the network computes what it did before.

    With ``v`` the mean over the batches of a channel's largest absolute value, its factor is ``v ** strength``, over
    the geometric mean of all channels' factors. Where a group can shift, the middle of every channel's range becomes 0
    before. Grids are to be calibrated after this.

    ``run`` passes calibration data through the float network, from the batch ``first`` on, of those of all processes.
    Returns the number of groups of values that were equalised; GraphError if an output changes.
    """
    strengths = {False: model.equalization, True: model.smoothing}
    groups = [
        group
        for group in find_channel_groups(Roles(graph.model, graph.traced.graph))
        if group.quantizers and strengths[group.is_normalised]
    ]
    if not groups:
        return 0
    axes = {name: axis for group in groups for name, axis in group.quantizers.items()}
    own: dict[str, list[Tensor]] = {}

    def note(name: str, args: tuple[Tensor, ...]) -> None:
        values = args[0].transpose(0, axes[name]).flatten(1)
        own.setdefault(name, []).append(torch.stack([values.amax(1), -values.amin(1)]))

    quantizers = {name: graph.quantizers[name] for name in axes}
    with torch.no_grad(), pre_hooks(quantizers, note), model.quantization(weights=False, activations=False):
        run()
    ranges = _of_all_processes(own, first)
    before, count = _outputs(graph), 0
    for group in groups:
        seen = [torch.stack(ranges[name]) for name in group.quantizers if ranges.get(name)]
        if seen:
            if group.can_shift:
                above, below = torch.stack([ends.mean(0) for ends in seen]).mean(0)
                _shift(model.model, group.writers, group.readers, (above - below) / 2)
                seen = [ends.mean(1, keepdim=True) for ends in seen]
            widths = torch.stack([ends.amax(1).mean(0) for ends in seen]).mean(0)
            factors = _factors(widths, strengths[group.is_normalised])
            _scale(model.model, group.writers, group.readers, factors)
            count += 1
    difference = unexplained_error(graph, graph.traced.example, _outputs(graph), before, '{}')
    if difference:
        layers = ', '.join(path for group in groups for path in group.writers)
        raise GraphError(
            f'expected equalised channels to change no output, but they do by {difference} of the variance, '
            f'behind one of {layers}: set quantizer.equalization and quantizer.smoothing to 0'
        )
    return count


def _outputs(graph: QuantizedGraph) -> dict[str, Tensor]:
    """Returns the float outputs of the graph for the example that it was traced with."""
    with torch.no_grad(), graph.quantization(weights=False, activations=False):
        return flatten_outputs(graph(graph.traced.example))


def _factors(ranges: Tensor, strength: float) -> Tensor:
    """Returns the divisor of each channel, ``(C,)``."""
    largest = ranges.max()
    if not largest > 0:
        return torch.ones_like(ranges)
    factors = ranges.clamp_min(largest * SMALLEST) ** strength
    return factors / factors.log().mean().exp()


def _of_all_processes(ranges: dict[str, list[Tensor]], first: int) -> dict[str, list[Tensor]]:
    """Returns the ranges of the batches of all processes; two processes may share a batch."""
    batches: dict[str, dict[int, Tensor]] = {}
    for start, seen in gather((first, ranges)):
        for name, values in seen.items():
            known = batches.setdefault(name, {})
            for index, value in enumerate(values, start):
                known[index] = torch.maximum(known[index], value) if index in known else value
    return {name: [known[index] for index in sorted(known)] for name, known in batches.items()}


def _shift(model: nn.Module, writers: list[str], readers: list[str], centre: Tensor) -> None:
    """Takes ``centre``, ``(C,)``, from the channels that are written, and adds what the readers make of it to them."""
    with torch.no_grad():
        for path in writers:
            module = model.get_submodule(path)
            set_original(module, 'bias', original(module, 'bias') - centre)
        for path in readers:
            module = model.get_submodule(path)
            weight, groups = original(module, 'weight'), getattr(module, 'groups', 1)
            by_group = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
            change = by_group.view(groups, -1, by_group.shape[1]) @ centre.view(groups, -1, 1)
            set_original(module, 'bias', original(module, 'bias') + change.flatten())


def _scale(model: nn.Module, writers: list[str], readers: list[str], factors: Tensor) -> None:
    with torch.no_grad():
        for path in writers:
            module: Any = model.get_submodule(path)
            weight = original(module, 'weight')
            set_original(module, 'weight', weight / factors.view(-1, *[1] * (weight.dim() - 1)))
            if getattr(module, 'bias', None) is not None:
                set_original(module, 'bias', original(module, 'bias') / factors)
        for path in readers:
            module = model.get_submodule(path)
            weight, groups = original(module, 'weight'), getattr(module, 'groups', 1)
            by_group = weight.view(groups, -1, *weight.shape[1:])
            factors_of = factors.view(groups, 1, -1, *[1] * (weight.dim() - 2))
            set_original(module, 'weight', (by_group * factors_of).view_as(weight))
