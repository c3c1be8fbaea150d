"""What a unit has learned, and what a reconstruction reports of it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmbrecq.errors import CheckpointError
from mmbrecq.fake_quants.bias import bias_correction
from mmbrecq.fake_quants.weight import weight_fake_quant
from mmbrecq.graph.units import ReconstructionUnit

UnitState = dict[str, Tensor]
"""Tensors by the path of the layer or quantizer, what they belong to, and their own name."""


@dataclass(frozen=True)
class UnitResult:
    """Outcome of one unit in one pass.

    Args:
        name: Name of the unit.
        stage: Name of the pass: 'weights', 'activations', 'joint' or 'network'.
        layers: Paths of its quantized layers.
        loss_before: Loss over all calibration images before the pass: nearest rounding, observed step sizes.
        loss_after: Loss with what the pass learned.
        iterations: Iterations of the optimiser.
        seconds: Wall time, caching included.
        kept_nearest: The learned state was worse than the one before and was dropped.
        power: Loss of an output of zeros, to which both losses are compared.
        images_at_once: For how many images the GPU had room, where that is less than a batch.
    """

    name: str
    stage: str
    layers: tuple[str, ...]
    loss_before: float
    loss_after: float
    iterations: int
    seconds: float
    kept_nearest: bool
    power: float = math.nan
    images_at_once: int | None = None

    @property
    def learned_rounding(self) -> bool:
        """Tells whether the pass learns the rounding of weights; the others start from what was learned."""
        return self.stage not in ('activations', 'network')

    @property
    def relative_losses(self) -> tuple[float, float]:
        """Both losses over the power of the output; NaN where it has none."""
        power = self.power if self.power > 0 else math.nan
        return self.loss_before / power, self.loss_after / power


@dataclass(frozen=True)
class FinishedUnit:
    """A unit that an earlier run has reconstructed: what was reported of it, and what it has learned."""

    result: UnitResult
    state: UnitState


def layer_owners(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Returns the modules that learn something about a layer, each with ``'weight'`` or ``'bias'``."""
    owners = [(weight_fake_quant(module), 'weight'), (bias_correction(module), 'bias')]
    return [(owner, key) for owner, key in owners if owner is not None]


def unit_state(model: nn.Module, unit: ReconstructionUnit) -> UnitState:
    """Returns copies of all that a unit of ``model`` has learned: codes, scales, zero-points, corrections of biases."""
    return {name: tensor.detach().to('cpu', copy=True) for name, tensor in _tensors(model, unit)}


def load_unit_state(model: nn.Module, unit: ReconstructionUnit, state: UnitState) -> None:
    """Puts what :func:`unit_state` returned into the unit; CheckpointError names the first that is of another unit."""
    own = dict(_tensors(model, unit))
    for name in sorted({*own, *state}):
        if name not in own or name not in state or own[name].shape != state[name].shape:
            raise CheckpointError(f"expected the state of unit '{unit.name}', but it does not fit at '{name}'")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _tensors(model: nn.Module, unit: ReconstructionUnit) -> Iterator[tuple[str, Tensor]]:
    owners = [
        (f'{path}.{key}', owner) for path in unit.layers for owner, key in layer_owners(model.get_submodule(path))
    ]
    owners += [(path, model.get_submodule(path)) for path in unit.quantizers]
    for path, owner in owners:
        for name, tensor in (*owner.named_parameters(), *owner.named_buffers()):
            yield f'{path}.{name}', tensor
