"""What the work on one unit takes beside cached activations, estimated before it from the traced example."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mmbrecq.calibration.calibrator import OBSERVED
from mmbrecq.fake_quants.masks import ALIGNMENT, STARTS
from mmbrecq.fake_quants.weight import original_weight
from mmbrecq.graph.shapes import call_with, stand_in, state_on
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.observers.histogram import CHUNK, DistributionObserver
from mmbrecq.quantizers.quantized_model import QuantizedGraph
from mmbrecq.reconstruction.losses import FISHER_BATCH, weighted_outputs
from mmbrecq.reconstruction.stages import Stage

LEARNED_WEIGHT = 80
"""Bytes per weight whose rounding is learned: the variable with its gradient and Adam's two moments, what is fixed
about its grid, what an iteration saves for the backward pass, and what that makes on its way."""
FIXED_WEIGHT = 24
"""Bytes per weight whose rounding is fixed: its values, stretched, and the gradient at them."""
PASSING = 6
"""Tensors of the largest size that come and go within an iteration: gradients, and copies in the kernels' layout."""
HEADROOM = 1.75
"""Memory of the process over that of its tensors: what the allocator keeps between them. Up to 1.54 was measured."""
CAST = 0.5
"""Size of the copies in bfloat16 over that of the tensors, where layers multiply in it."""
BASE = 16 * 2**20
"""Bytes that any work takes: code and buffers of the kernels, a thread that reads."""
OF_LOSS = 3
"""Tensors of the size of the outputs that a loss makes, gradients included."""
OF_FISHER = 3
"""Tensors of that size that Fisher weights add."""
OF_OBSERVING = 5
"""Tensors of the largest size that are there at once in a pass that is observed, copies in other layouts included."""
OF_HISTOGRAM = 3 * 4 * CHUNK
"""Bytes of the values that a histogram counts at once, of their bins and of copies of these."""
KEPT = 4 * DistributionObserver.MAX_KEPT
"""Most bytes of a first batch that an observer keeps."""


@dataclass(frozen=True)
class Footprint:
    """Sizes of a unit.

    Args:
        saved: Bytes per image that a forward pass saves for the backward pass.
        largest: Bytes per image of the largest tensor.
        inputs: Bytes per image of its inputs.
        outputs: Bytes per image of its outputs.
        weights: Number of quantized weights.
    """

    saved: int
    largest: int
    inputs: int
    outputs: int
    weights: int


def measure_footprint(
    module: nn.Module, inputs: Sequence[Tensor], weights: Iterable[Tensor], layers: Iterable[nn.Module] = ()
) -> Footprint:
    """Measures a unit by running it once on the shapes of its inputs, so that what opaque modules save is known, too.

    Args:
        module: ``module(*inputs) -> tuple`` of outputs, its weights in float.
        inputs: Each ``(n, ...)``.
        weights: Quantized weights.
        layers: Modules whose outputs are saved, too, as gradients are taken from them.
    """
    own, given = next(module.parameters(), torch.empty(0)).device, (inputs, list(weights), list(layers))
    try:
        return _measure(module, *given, 'meta')
    except Exception:
        # some operations have no form that computes shapes
        return _measure(module, *given, own)


def _measure(
    module: nn.Module,
    examples: Sequence[Tensor],
    weights: list[Tensor],
    layers: list[nn.Module],
    device: torch.device | str,
) -> Footprint:
    inputs, state = [stand_in(example, device) for example in examples], state_on(module, device)
    for path, _ in module.named_parameters():
        state[path].requires_grad_(state[path].is_floating_point())
    # inputs are counted by themselves; an example may be a view of all images
    known = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in (*state.values(), *inputs)}
    # kept until all is counted: another storage might get the place of one that is gone
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> None:
        # the tensor itself, handed back, would keep the operation alive that made it
        storage = tensor.untyped_storage()
        if id(storage) not in known:
            kept[id(storage)] = storage

    with ExitStack() as stack, torch.enable_grad(), saved_tensors_hooks(note, lambda nothing: nothing):
        for layer in layers:
            stack.callback(layer.register_forward_hook(lambda _module, _inputs, output: note(output)).remove)
        outputs = call_with(module, state, *inputs)
    count, saved = len(inputs[0]), [storage.nbytes() for storage in kept.values()]
    sizes = [tensor.nbytes for tensor in (*inputs, *outputs)]
    return Footprint(
        sum(saved) // count,
        max([*saved, *sizes]) // count,
        sum(tensor.nbytes for tensor in inputs) // count,
        sum(tensor.nbytes for tensor in outputs) // count,
        sum(weight.numel() for weight in weights),
    )


def working_memory(
    graph: QuantizedGraph,
    units: Sequence[ReconstructionUnit],
    stage: Stage,
    images: int,
    fisher: bool,
    rank: int = 0,
    has_rest: bool = False,
) -> list[tuple[int, str]]:
    """Returns the most bytes that the work on each unit takes beside cached activations, and its name.

    An iteration is of ``images`` images; ``fisher`` tells whether the loss has Fisher weights, ``rank`` how many
    factors a unit has of its own, and ``has_rest`` whether gradients come through the network behind a unit.
    """
    examples = {node.name: node.meta.get('example') for node in graph.traced.graph.nodes}
    needed = []
    with graph.quantization(weights=False, activations=stage.quantizes_activations):
        behind = 0
        for unit in reversed(units):
            layers = [module for module, _ in graph.unit_weights(unit)]
            footprint = measure_footprint(
                unit.module,
                [examples[name] for name in unit.inputs],
                [original_weight(layer) for layer in layers],
                [] if stage.learns_rounding else layers,
            )
            own = iteration_bytes(footprint, stage, images, 1 + rank if rank else fisher)
            needed.append((_with_headroom(own + (images * behind if has_rest else 0)), unit.name))
            # values that pass the next units by are inputs of one of them
            behind += footprint.saved + footprint.inputs + footprint.outputs
        if fisher:
            (network,) = graph.cut('net')
            footprint = measure_footprint(network.module, [examples[name] for name in network.inputs], [])
            outputs = sum(examples[name][:1].nbytes for name in weighted_outputs(graph))
            each = footprint.saved + PASSING * footprint.largest + footprint.inputs + 3 * outputs
            needed.append((_with_headroom(max(images, FISHER_BATCH) * each), network.name))
    return needed


def iteration_bytes(unit: Footprint, stage: Stage, images: int, fisher: int) -> int:
    """Returns the most bytes that an iteration takes, with the variables and the state of the optimizer.

    The loss weighs by so many values, ``fisher``, of the size of the outputs.
    """
    dropping = stage.options.drop_prob > 0
    batch = unit.inputs * (2 if dropping else 1) + unit.outputs * (1 + fisher)
    of_loss = unit.outputs * (OF_LOSS + OF_FISHER * fisher)
    # the next batch may be read meanwhile
    total = images * (unit.saved + PASSING * unit.largest + of_loss + 2 * batch)
    if stage.options.autocast is not None:
        total += int(CAST * (images * (unit.saved + unit.largest) + 4 * unit.weights))
    total += unit.weights * (LEARNED_WEIGHT if stage.learns_rounding else FIXED_WEIGHT)
    if dropping:
        # the pool of masks, and the random bytes that it is made of
        total += 2 * (images * unit.largest // 4 + STARTS * ALIGNMENT)
    return total


@dataclass(frozen=True)
class ObservedUnit:
    """A unit whose activations are observed, or the network as one.

    Args:
        name: Its name.
        footprint: Its sizes.
        quantizers: Number of its quantizers that observe.
        inputs: Inputs of the unit per image: several where it is run on regions.
    """

    name: str
    footprint: Footprint
    quantizers: int
    inputs: int = 1

    def bytes_of(self, images: int) -> int:
        """Returns the most bytes that a pass of ``images`` images takes, whose activations the quantizers observe."""
        unit, count = self.footprint, images * self.inputs
        largest = count * unit.largest
        passing = count * (unit.inputs + unit.outputs) + OF_OBSERVING * largest
        return _with_headroom(passing + self.quantizers * min(KEPT, largest) + min(OF_HISTOGRAM, 3 * largest))


def observed_units(graph: QuantizedGraph, units: Iterable[ReconstructionUnit], inputs: int = 1) -> list[ObservedUnit]:
    """Returns the units that have activations to observe, of a graph that reads so many ``inputs`` per image."""
    examples = {node.name: node.meta.get('example') for node in graph.traced.graph.nodes}
    found = []
    for unit in units:
        quantizers = graph.unit_quantizers(unit)
        if quantizers:
            footprint = measure_footprint(unit.module, [examples[name] for name in unit.inputs], [])
            found.append(ObservedUnit(unit.name, footprint, len(quantizers), inputs))
    return found


def fitting_images(observed: Sequence[ObservedUnit], room: int) -> int:
    """Returns how many images are observed at once: 64, and half as many until all units have ``room`` bytes."""
    images = OBSERVED
    while images > 1 and any(unit.bytes_of(images) > room for unit in observed):
        images //= 2
    return images


def _with_headroom(tensors: int) -> int:
    return BASE + int(HEADROOM * tensors)
