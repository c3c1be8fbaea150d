"""Correction of biases: a learned offset that makes up for the mean error of a quantized layer.

The offset is added to the float bias while the layer is quantized, and is part of the bias in a finished model, so it
costs nothing there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class BiasCorrection(nn.Module):
    """Parametrization ``bias + offset``, off while the layer is float.

    Args:
        channels: Length of the bias.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enabled = False
        self.offset = nn.Parameter(torch.zeros(channels), requires_grad=False)
        # while it is learned: the corrected bias, which the reconstruction keeps up to date
        self.learned: Tensor | None = None

    def forward(self, bias: Tensor) -> Tensor:
        if not self.enabled:
            return bias
        return bias + self.offset if self.learned is None else self.learned


def correct_bias(module: Any) -> None:
    """Gives the bias of ``module`` a correction; a module without a bias is left alone."""
    if module.bias is not None:
        module.bias.requires_grad_(False)
        parametrize.register_parametrization(module, 'bias', BiasCorrection(len(module.bias)))


def bias_correction(module: nn.Module) -> BiasCorrection | None:
    """The correction of a module's bias, None where it has none."""
    if not parametrize.is_parametrized(module, 'bias'):
        return None
    parametrizations: Any = module.parametrizations
    found = parametrizations['bias'][0]
    return found if isinstance(found, BiasCorrection) else None


def bake_bias(module: nn.Module) -> None:
    """Adds the correction to the bias for good."""
    correction = bias_correction(module)
    if correction is not None:
        correction.enabled = True
        parametrize.remove_parametrizations(module, 'bias', leave_parametrized=True)


def round_bias(module: Any, step: Tensor) -> None:
    """Rounds the bias of ``module`` to multiples of ``step``, scalar or one per channel, as an int32 bias has them."""
    if module.bias is not None:
        with torch.no_grad():
            module.bias.copy_(torch.round(module.bias / step) * step)
