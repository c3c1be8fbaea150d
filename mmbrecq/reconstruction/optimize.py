"""The optimisation of one unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq.distributed import average
from mmbrecq.errors import NonFiniteError
from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.fake_quants.masks import RandomMasks
from mmbrecq.fake_quants.weight import WeightFakeQuantize
from mmbrecq.reconstruction.layout import laid_out, memory_format
from mmbrecq.reconstruction.schedules import LinearBeta
from mmbrecq.reconstruction.stages import Stage
from mmbrecq.reconstruction.values import Values
from mmbrecq.reconstruction.variables import Group, Variables

CHECK_INTERVAL = 100
"""Steps between looks at the losses: each look waits for the device."""

UnitLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class UnitData:
    """What a unit is trained on; all values are ``(N, ...)`` over the calibration images.

    Args:
        quantized_inputs: Inputs as the quantized units before it give them.
        float_inputs: Inputs of the float model.
        targets: Outputs of the float model.
        fisher: Fisher weights of the outputs, None where the loss needs none.
    """

    quantized_inputs: Sequence[Values]
    float_inputs: Sequence[Values]
    targets: Sequence[Values]
    fisher: Sequence[Values] | None = None

    def loss(self, outputs: Sequence[Tensor], index: Tensor | slice, loss: UnitLoss) -> Tensor:
        """Sum of the losses of all outputs, for the images ``index``."""
        total: Any = 0
        for i, (output, target) in enumerate(zip(outputs, self.targets, strict=True)):
            fisher = None if self.fisher is None else self.fisher[i][index]
            total = total + loss(output, target[index], fisher)
        return total


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
    optimizer = _optimizer(variables.groups)
    beta = LinearBeta(*options.beta, options.warmup)
    parameters = [parameter for params, _, _ in variables.groups for parameter in params]
    count = len(data.targets[0])
    losses = torch.zeros(options.iterations, device=device)
    drop = _Dropping(quantizers, options.drop_prob, generator, device)
    with torch.enable_grad(), drop, variables.in_force():
        for step in range(options.iterations):
            index = torch.randperm(count, generator=generator)[: options.batch_size]
            progress = step / options.iterations
            outputs = module(*(laid_out(x, layout) for x in drop.inputs(data, index)))
            reconstruction = data.loss(outputs, index, loss)
            variables.drop_gradients()
            reconstruction.backward()
            variables.collect_gradients(beta(progress))
            average(parameter.grad for parameter in parameters)
            _set_rates(optimizer, variables.groups, progress)
            optimizer.step()
            variables.update()
            losses[step] = reconstruction.detach()
            if (step + 1) % CHECK_INTERVAL == 0 or step + 1 == options.iterations:
                latest = losses[step - step % CHECK_INTERVAL : step + 1]
                average([latest])
                _check_finite(losses[: step + 1], name)
                on_step(step + 1, float(latest.mean()))
    variables.finish()
    return options.iterations


def _optimizer(groups: Sequence[Group]) -> torch.optim.Optimizer:
    """Adam over the groups."""
    parameters = [{'params': params, 'lr': lr} for params, lr, _ in groups]
    return torch.optim.Adam(parameters, fused=_fused_is_available(groups[0][0][0]))


def _set_rates(optimizer: torch.optim.Optimizer, groups: Sequence[Group], progress: float) -> None:
    """Sets the learning rates of a step; a scheduler of torch's takes as long as a small layer."""
    for group, (_, lr, schedule) in zip(optimizer.param_groups, groups, strict=True):
        group['lr'] = lr * schedule(progress)


def _fused_is_available(parameter: Tensor) -> bool:
    # on the CPU the fused step came with torch 2.4
    version = tuple(int(part) for part in torch.__version__.split('.')[:2])
    return parameter.device.type == 'cuda' or version >= (2, 4)


def _check_finite(losses: Tensor, name: str) -> None:
    finite = torch.isfinite(losses)
    if not bool(finite.all()):
        step = int((~finite).nonzero()[0])
        raise NonFiniteError(f"the loss of unit '{name}' is {float(losses[step])} at iteration {step}")


class _Dropping:
    """Random dropping of quantization, on the activations and on the inputs; a context manager."""

    def __init__(
        self, quantizers: Sequence[FakeQuantize], prob: float, generator: torch.Generator, device: torch.device
    ) -> None:
        self.quantizers, self.device = quantizers, device
        self.masks = RandomMasks(1 - prob, generator) if prob > 0 else None

    def __enter__(self) -> None:
        for quantizer in self.quantizers:
            quantizer.masks = self.masks

    def __exit__(self, *exc: object) -> None:
        for quantizer in self.quantizers:
            quantizer.masks = None

    def inputs(self, data: UnitData, index: Tensor) -> list[Tensor]:
        """The inputs of the images ``index``, quantized and float ones mixed element by element."""
        mixed = []
        for quantized, floating in zip(data.quantized_inputs, data.float_inputs, strict=True):
            x = quantized[index]
            if self.masks is not None and quantized is not floating:
                torch.lerp(floating[index], x, self.masks.draw(x), out=x)
            mixed.append(x)
        return mixed
