"""The grids of a packed model, by which a checkpoint of other bits is told from one that fits.

Integers of all bit-widths lie in the same 8-bit containers, so that keys, shapes and dtypes alone do not tell.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mmbrecq.errors import CheckpointError
from mmbrecq.qtype import QType

_WEIGHT = '.parametrizations.weight.0'


def grids_of(model: nn.Module) -> dict[str, str]:
    """Range of the integers of every weight and activation, by the path of its layer or quantizer."""
    grids = {}
    for name, module in model.named_modules():
        qtype = getattr(module, 'qtype', None)
        if isinstance(qtype, QType):
            channels = '' if qtype.ch_axis is None else f' along axis {qtype.ch_axis}'
            grids[name.removesuffix(_WEIGHT)] = f'{qtype.quant_min}..{qtype.quant_max}{channels}'
    return grids


def check_grids(model: nn.Module, grids: Mapping[str, str], path: str) -> None:
    """Refuses the checkpoint ``path``, made with ``grids``, where ``model`` has other ones.

    Raises:
        CheckpointError: The number of grids that differ, and the first of them.
    """
    own = grids_of(model)
    others = [name for name in own if own[name] != grids.get(name)]
    if others:
        raise CheckpointError(
            f'{path} does not fit the quantizer of the config: {len(others)} of {len(own)} grids differ '
            f"(first: '{others[0]}' expected {own[others[0]]} but got {grids.get(others[0])})"
        )
