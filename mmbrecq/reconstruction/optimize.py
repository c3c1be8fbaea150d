"""The optimisation of one unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq.distributed import average, process_count
from mmbrecq.errors import NonFiniteError
from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.fake_quants.masks import RandomMasks, mix_
from mmbrecq.fake_quants.weight import WeightFakeQuantize
from mmbrecq.reconstruction.adam import build_adam
from mmbrecq.reconstruction.autocast import DTYPES, autocast
from mmbrecq.reconstruction.batches import Batches
from mmbrecq.reconstruction.layout import memory_format
from mmbrecq.reconstruction.micro_batches import MicroBatches
from mmbrecq.reconstruction.plateau import Plateau
from mmbrecq.reconstruction.rectifiers import rectified
from mmbrecq.reconstruction.schedules import LinearBeta
from mmbrecq.reconstruction.stages import Stage
from mmbrecq.reconstruction.unit_data import Batch, UnitData, UnitLoss
from mmbrecq.reconstruction.variables import Variables

CHECK_INTERVAL = 100
"""Steps between looks at the losses: each look waits for the device."""


def optimize_unit(
    name: str,
    module: nn.Module,
    weights: Sequence[tuple[nn.Module, WeightFakeQuantize]],
    quantizers: Sequence[FakeQuantize],
    data: UnitData,
    loss: UnitLoss,
    stage: Stage,
    generator: torch.Generator,
    device: torch.device,
    on_step: Callable[[int, float], None],
    micro_batches: MicroBatches | None = None,
) -> int:
    """Learns rounding and step sizes of one unit; the fake quantizers are switched as the stage needs them.

    Args:
        name: Of the unit, for messages.
        module: ``module(*inputs) -> tuple`` of outputs.
        weights: Modules with a quantized weight and their fake quantizers.
        quantizers: Activation quantizers.
        data: Inputs and targets.
        loss: Distance of an output from its target.
        stage: What is learned, and how.
        generator: Source of all random draws, on the CPU.
        device: Where the unit runs.
        on_step: Called now and then with the step and the loss.
        micro_batches: How many images the unit takes at once; None for whole batches as long as they fit.

    Returns:
        Number of steps taken; 0 where there is nothing to learn.

    Raises:
        NonFiniteError: The loss stops being finite; unit and step are named.
    """
    options = stage.options
    layout = memory_format(module)
    variables = Variables(module, weights, quantizers, stage, layout)
    if not variables.groups:
        return 0
    optimizer, alone = build_adam(variables.groups), process_count() == 1
    beta = LinearBeta(*options.beta, options.warmup)
    plateau = Plateau(options.plateau)
    # rounding is decided by what follows the warm-up
    end = int(options.warmup * options.iterations) if variables.weights.alphas else options.iterations
    # in the schedules; ahead of the steps where some were left out
    position = steps = 0
    parameters = [parameter for params, _, _ in variables.groups for parameter in params]
    losses = torch.zeros(options.iterations, device=device)
    drop = _Dropping(quantizers, options.drop_prob, generator)
    fitting = micro_batches or MicroBatches(name, min(options.batch_size, len(data.targets[0])))
    batches = Batches(data, options.batch_size, options.iterations, generator, device, drop.masks is not None)

    def distance_of(part: Batch) -> Tensor:
        part = part.laid_out(layout)
        distance = part.loss(network(*drop.inputs(part)), loss)
        # the masks of the step are drawn
        batches.read_ahead()
        return distance

    def find_gradients(images: int) -> Tensor:
        variables.drop_gradients()
        return _backward(batches.current(), images, distance_of)

    casting = autocast([layer for layer, _ in weights], DTYPES[options.autocast] if options.autocast else None)
    with torch.enable_grad(), drop, batches, variables.in_force(), casting, rectified(module) as network:
        while position < options.iterations:
            progress = position / options.iterations
            batches.begin()
            losses[steps] = fitting.run(find_gradients)
            optimizer.begin(progress)
            variables.collect_gradients(beta(progress), optimizer if alone else None)
            average(parameter.grad for parameter in parameters)
            optimizer.step()
            variables.update()
            steps, position = steps + 1, position + 1
            if steps % CHECK_INTERVAL == 0 or position == options.iterations:
                latest = losses[(steps - 1) // CHECK_INTERVAL * CHECK_INTERVAL : steps]
                average([latest])
                _check_finite(losses[:steps], name)
                mean = float(latest.mean())
                on_step(steps, mean)
                if plateau.reached(mean):
                    position = max(position, end)
    variables.finish()
    return steps


def _backward(batch: Batch, images: int, distance_of: Callable[[Batch], Tensor]) -> Tensor:
    """Adds up the gradients of a batch, so many images at once; returns the distance of the outputs.

    A loss is a mean over images, so each part counts by its share of them.
    """
    total: Any = 0
    for part in batch.parts(images):
        distance = distance_of(part)
        if part is batch:
            distance.backward()
            return distance.detach()
        share = len(part) / len(batch)
        (share * distance).backward()
        total = total + share * distance.detach()
    return total


def _check_finite(losses: Tensor, name: str) -> None:
    finite = torch.isfinite(losses)
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0])
        raise NonFiniteError(f"the loss of unit '{name}' is {float(losses[step])} at iteration {step}")


class _Dropping:
    """Random dropping of quantization, on the activations and on the inputs; a context manager."""

    def __init__(self, quantizers: Sequence[FakeQuantize], prob: float, generator: torch.Generator) -> None:
        self.quantizers = quantizers
        self.masks = RandomMasks(1 - prob, generator) if prob > 0 else None

    def __enter__(self) -> None:
        for quantizer in self.quantizers:
            quantizer.masks = self.masks

    def __exit__(self, *exc: object) -> None:
        for quantizer in self.quantizers:
            quantizer.masks = None

    def inputs(self, batch: Batch) -> Sequence[Tensor]:
        """The inputs of the batch, quantized and float ones mixed element by element, in place."""
        if self.masks is not None:
            for x, floating in zip(batch.quantized_inputs, batch.float_inputs, strict=True):
                if x is not floating:
                    mix_(x, floating, self.masks.draw(x))
        return batch.quantized_inputs
