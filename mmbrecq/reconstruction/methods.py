"""The methods of reconstruction that a config can name."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq.building import parse_options
from mmbrecq.data.groups import batches_of
from mmbrecq.distributed import gather
from mmbrecq.fake_quants.bias import bias_correction
from mmbrecq.fake_quants.weight import WeightFakeQuantize
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.reconstruction.cache import CachePlan
from mmbrecq.reconstruction.callbacks import Callback
from mmbrecq.reconstruction.reconstructor import BaseReconstructor
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.reconstruction.stages import Stage, StageOptions, Task
from mmbrecq.registry import RECONSTRUCTORS

Errors = dict[str, tuple[Tensor, int]]


@RECONSTRUCTORS.register_module()
@dataclass(eq=False)
class BRECQReconstructor(BaseReconstructor):
    """Learns weights first, with float activations; then the step sizes of activations (Li et al., ICLR 2021).

    Its other options are those of :class:`BaseReconstructor`.

    Args:
        weights: Options of :class:`StageOptions` for the first pass.
        activations: Options for the second.

    Example:
        >>> reconstructor = BRECQReconstructor({'iterations': 2000}, {'iterations': 500})
        >>> [(stage.name, stage.options.iterations) for stage in reconstructor.stages]
        [('weights', 2000), ('activations', 500)]
    """

    weights: Mapping[str, Any] | None = None
    activations: Mapping[str, Any] | None = None

    def own_stages(self) -> Sequence[Stage]:
        first = parse_options(StageOptions, self.weights or {}, 'reconstructor.weights')
        second = parse_options(StageOptions, self.activations or {}, 'reconstructor.activations', iterations=5000)
        return Stage('weights', first, True, False), Stage('activations', second, False, True)


@RECONSTRUCTORS.register_module()
@dataclass(eq=False)
class QDropReconstructor(BaseReconstructor):
    """Learns rounding and step sizes together, with random dropping of quantization (Wei et al., ICLR 2022).

    Its other options are those of :class:`BaseReconstructor`.

    Args:
        joint: Options of :class:`StageOptions` for the one pass.
    """

    joint: Mapping[str, Any] | None = None

    def own_stages(self) -> Sequence[Stage]:
        joint = self.joint or {}
        options = parse_options(StageOptions, joint, 'reconstructor.joint', drop_prob=0.5)
        return (Stage('joint', options, True, True),)


@RECONSTRUCTORS.register_module()
class NearestReconstructor(BaseReconstructor):
    """Keeps the grids of the calibration and weights rounded to nearest, and corrects biases.

    The bias of every layer is moved by the mean error of its outputs, ``E[(W - W_q) x]`` over the calibration images,
    as float layers before it compute ``x`` (Nagel et al., Data-Free Quantization Through Weight Equalization and Bias
    Correction, ICCV 2019, section 4.2). It takes one pass over the images. The corrections are kept if they bring the
    outputs of the network nearer to float: where one token alone is read, the mean over all of them may not.

    Args:
        memory_limit: As in :class:`BaseReconstructor`.
    """

    def __init__(self, memory_limit: int | str | None = None) -> None:
        super().__init__(memory_limit=memory_limit)

    def passes(self, task: Task, plan: CachePlan, callback: Callback) -> Iterator[tuple[Stage, list[UnitResult]]]:
        """Corrects the biases; there is no pass over units."""
        errors: Errors = {}
        with torch.no_grad(), ExitStack() as stack:
            for name, module, fake_quant in task.model.weights():
                if bias_correction(module) is not None:
                    hook = partial(_note_error, errors, name, fake_quant)
                    stack.callback(module.register_forward_hook(hook).remove)
            if task.model.region_graphs:
                task.regions.observe()
            else:
                with task.model.quantization(weights=False, activations=False):
                    for batch in batches_of(task.images, plan.observed, task.first):
                        task.model(task.images[batch])
        everywhere, offsets = gather(errors), []
        for name in {name: None for seen in everywhere for name in seen}:
            sums, counts = zip(*(seen[name] for seen in everywhere if name in seen), strict=True)
            correction = bias_correction(task.model.model.get_submodule(name))
            if correction is not None and sum(counts):
                correction.offset.data.copy_(torch.stack(sums).sum(0) / sum(counts))
                offsets.append(correction.offset.data)
        means, corrected = [offset.clone() for offset in offsets], _error_of_outputs(task, plan)
        for offset in offsets:
            offset.zero_()
        if corrected < _error_of_outputs(task, plan):
            for offset, mean in zip(offsets, means, strict=True):
                offset.copy_(mean)
        yield from ()


@torch.no_grad()
def _error_of_outputs(task: Task, plan: CachePlan) -> float:
    """Returns what quantized weights change of the outputs for the first images: squared errors over powers, summed."""
    images = task.images[batches_of(task.images, plan.observed, task.first)[0]]
    found: list[list[Tensor]] = []
    for weights in (False, True):
        with task.model.quantization(weights=weights, activations=False):
            found.append([value.double() for value in flatten_outputs(task.model(images)).values()])
    errors = [(q - f).square().sum() / f.square().sum().clamp_min(1e-30) for f, q in zip(*found, strict=True)]
    return sum(gather(float(sum(errors))))


def _note_error(
    errors: Errors, name: str, fake_quant: WeightFakeQuantize, module: nn.Module, args: tuple[Any, ...], output: Tensor
) -> None:
    """Adds, by the path of the layer and per channel, what quantizing its weight takes from its outputs."""
    fake_quant.enabled = True
    try:
        difference = output - module.forward(*args)
    finally:
        fake_quant.enabled = False
    axis = -1 if isinstance(module, nn.Linear) else 1
    rows = difference.movedim(axis, 0).flatten(1)
    total, count = errors.get(name, (0, 0))
    errors[name] = (total + rows.sum(1), count + rows.shape[1])
