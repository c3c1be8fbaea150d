"""Biases of quantized layers: a learned offset that makes up for the mean error, and int32 as runtimes have it.

The offset is added to the float bias while the layer is quantized, and is part of the bias in a finished model, so it
costs nothing there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmbrecq.fake_quants.weight import WeightFakeQuantize, find_parametrization

LARGEST_BIAS = 2.0**30
"""In units of input scale times weight scale; int32 then has as much room again for the sum of products."""


class BiasCorrection(nn.Module):
    """A parametrization ``bias + offset``, each of ``channels`` elements, off while the layer is float."""

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
    """Returns the correction of a module's bias, None where it has none."""
    return find_parametrization(module, 'bias', BiasCorrection)


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


def scale_read(module: Any, scale: Tensor) -> Tensor:
    """Returns the input scale, one per output channel of a depthwise convolution; else the largest of its channels."""
    if scale.dim() and getattr(module, 'groups', 1) == len(scale):
        return scale.detach().repeat_interleave(module.out_channels // len(scale))
    return scale.detach().max()


def raise_weight_scale(
    module: Any, fake_quant: WeightFakeQuantize, weight: Tensor, inputs: Sequence[Tensor], largest: float
) -> None:
    """Raises the weight scale where the bias would exceed ``largest`` units of input scale times weight scale.

    A runtime that rounds biases to int32 in these units wraps around where one does not fit, as that of a channel whose
    weights a BatchNorm has scaled to almost 0. On the raised scale the weights are off by half a step at most, which is
    ``255 / largest`` of the bias in a product.

    ``inputs`` are the scales of the grids that the layer reads. Where a weight scale changes, the values ``weight`` of
    all channels are rounded anew.
    """
    if module.bias is None or not inputs:
        return
    steps = [scale_read(module, scale) for scale in inputs]
    step = torch.stack(list(torch.broadcast_tensors(*steps))).amin(0)
    needed = module.bias.detach().abs() / (step * largest)
    scale = torch.maximum(fake_quant.scale, needed if fake_quant.scale.dim() else needed.max())
    if not torch.equal(scale, fake_quant.scale):
        fake_quant.calibrate(weight, scale, fake_quant.zero_point)
