"""The rounding of a layer learned by straight-through gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq.fake_quants.weight import WeightFakeQuantize
from mmbrecq.functional import expand
from mmbrecq.reconstruction.values import laid_out


class StraightThroughRounding:
    """The weight of a layer in steps of its grid, rounded in every iteration, as :class:`SoftRounding` is the soft one.

    A weight is learned relative to its scale, so that one learning rate serves all channels. What lies beyond the end
    of the grid by more than half a step has no gradient.

    Args:
        rounding: Fake quantizer of the layer.
        weight (Tensor): The float weight.
        layout: Order in memory of the weights of convolutions.

    Attributes:
        steps (Parameter): The variable, with the shape of the weight: ``weight / scale + zero_point`` at first.
        weight (Tensor): The quantized weight times its gain.
    """

    def __init__(self, rounding: WeightFakeQuantize, weight: Tensor, layout: torch.memory_format) -> None:
        self._rounding, self._layout = rounding, layout
        axis = rounding.qtype.ch_axis
        self._scale = expand(rounding.scale, weight.dim(), axis)
        self._offset = expand(rounding.zero_point.to(weight.dtype), weight.dim(), axis)
        self.steps = nn.Parameter(laid_out(weight / self._scale + self._offset, layout))
        self.weight = torch.empty_like(self.steps.detach())

    def _codes(self) -> Tensor:
        qtype = self._rounding.qtype
        return self.steps.detach().round().clamp_(qtype.quant_min, qtype.quant_max)

    def finish(self) -> None:
        """Keeps the integers of the last iteration."""
        self._rounding.codes.copy_(self._codes())

    def update(self, gain: Tensor | None) -> None:
        """Computes the weight anew, times a factor of one element or one for each scale."""
        torch.mul(self._codes().sub_(self._offset), self._scale, out=self.weight)
        if gain is not None:
            self.weight.mul_(gain.detach())

    def collect(self, grad: Tensor | None, gain: nn.Parameter | None, beta: Any, round_weight: Any) -> None:
        """Carries the gradient of the weight on to the variable and to the gain; there is no regulariser."""
        grad = torch.zeros_like(self.weight) if grad is None else laid_out(grad, self._layout)
        size = self._scale
        if gain is not None:
            gain.grad = (grad * self.weight).sum_to_size(gain.shape).div_(gain.detach())
            size = size * gain.detach()
        qtype = self._rounding.qtype
        self.steps.grad = torch.ops.aten.hardtanh_backward(
            grad * size, self.steps.detach(), qtype.quant_min - 0.5, qtype.quant_max + 0.5
        )
