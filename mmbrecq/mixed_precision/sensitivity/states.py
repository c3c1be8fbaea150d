"""Reconstructed states of units, a file for each unit and number of bits."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmbrecq.errors import CheckpointError
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.reconstruction.results import layer_owners
from mmbrecq.runs.storage import save_atomic


def state_path(folder: Path, unit: str, bits: int) -> Path:
    """Where the state of a unit is kept; names that file systems mind are told apart by a hash."""
    safe = ''.join(c if c.isalnum() or c in '._-' else '_' for c in unit)
    mark = '' if safe == unit else '-' + hashlib.sha256(unit.encode()).hexdigest()[:8]
    return folder / f'{safe}{mark}-w{bits}.pth'


def save_unit(model: nn.Module, unit: ReconstructionUnit, path: Path) -> None:
    """Writes integers, scales and bias corrections of the layers of a unit."""
    save_atomic({name: _state(model.get_submodule(name)) for name in unit.layers}, path)


def load_layers(model: nn.Module, layers: tuple[str, ...], path: Path) -> None:
    """Puts what :func:`save_unit` wrote into layers prepared with the same bits.

    Raises:
        CheckpointError: The file cannot be read, or is of other layers.
    """
    try:
        states = torch.load(path, map_location='cpu', weights_only=True)
        for name in layers:
            for owner, key in layer_owners(model.get_submodule(name)):
                owner.load_state_dict(states[name][key])
    except Exception as error:
        raise CheckpointError(
            f'{path}: expected the state of a reconstructed unit, but it does not fit: {error}'
        ) from error


def _state(module: nn.Module) -> dict[str, Any]:
    return {key: owner.state_dict() for owner, key in layer_owners(module)}
