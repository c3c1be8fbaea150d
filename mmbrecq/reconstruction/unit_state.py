"""What a unit has learned, as tensors by name: to go back to, to save, to take up again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mmbrecq.errors import CheckpointError
from mmbrecq.fake_quants.bias import bias_correction
from mmbrecq.fake_quants.weight import weight_fake_quant
from mmbrecq.graph.units import ReconstructionUnit

UnitState = dict[str, Tensor]
"""Tensors by the path of the layer or quantizer, what they belong to, and their own name."""


def layer_owners(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """What of a layer is learned, each with a word for it: its fake quantizer and the correction of its bias."""
    owners = [(weight_fake_quant(module), 'weight'), (bias_correction(module), 'bias')]
    return [(owner, key) for owner, key in owners if owner is not None]


def unit_state(model: nn.Module, unit: ReconstructionUnit) -> UnitState:
    """Copies of all that the unit has learned: codes, scales, zero-points and corrections of biases.

    Args:
        model: The prepared model, owner of all modules.
        unit: One of its units.
    """
    return {name: tensor.detach().to('cpu', copy=True) for name, tensor in _tensors(model, unit)}


def load_unit_state(model: nn.Module, unit: ReconstructionUnit, state: UnitState) -> None:
    """Puts what :func:`unit_state` gave into the unit.

    Raises:
        CheckpointError: The state is of another unit; the first name that differs is given.
    """
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
