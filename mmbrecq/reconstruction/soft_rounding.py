"""The rounding of a layer while it is learned: its variable, the weight that it makes, and the gradients of both."""

from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq.fake_quants.ops import add_regulariser_gradient_, regulariser_factor, soft_weight_, through_sigmoid_
from mmbrecq.fake_quants.weight import AdaRound, WeightFakeQuantize
from mmbrecq.functional import expand
from mmbrecq.kernels.native import Curve, as_array, kernel
from mmbrecq.reconstruction.values import laid_out


class SoftRounding:
    """The learned rounding of a layer, by compiled kernels where they can compute it, else by torch's operations.

    Kernels take one pass over memory each way, with a grid of two bytes a weight; torch's operations work in memory
    that is kept from iteration to iteration.

    Args:
        rounding: Fake quantizer of the layer.
        weight (Tensor): The float weight.
        layout: Order in memory of the weights of convolutions.

    Attributes:
        alpha (Parameter): The variable, with the shape of the weight; at first a weight inside the grid is kept.
        weight (Tensor): The soft-quantized weight times its gain.
    """

    def __init__(self, rounding: AdaRound, weight: Tensor, layout: torch.memory_format) -> None:
        self._rounding, self._curve, self._layout = rounding, rounding.curve, layout
        qtype, self._scale = rounding.qtype, rounding.scale
        scale = expand(rounding.scale, weight.dim(), qtype.ch_axis)
        offset = expand(rounding.zero_point.to(weight.dtype), weight.dim(), qtype.ch_axis)
        ratio = weight / scale
        floor = torch.floor(ratio)
        codes = floor + offset
        self._movable = (codes >= qtype.quant_min) & (codes < qtype.quant_max)
        self._low = codes.clamp(qtype.quant_min, qtype.quant_max)
        self.alpha = nn.Parameter(laid_out(self._curve.inverse(ratio - floor), layout))
        self.weight, self._grad = (torch.empty_like(self.alpha.detach()) for _ in range(2))
        by_row, names = qtype.ch_axis in (None, 0), ('soft_weight', 'rounding_gradient')
        self._write, self._derive = (kernel(name, self.weight) if by_row else None for name in names)
        if self._write is None or self._derive is None:
            # the line through the weight rounded down and the weight rounded up
            step = scale * self._movable
            self._base = laid_out((self._low - offset) * scale + step * self._curve.gamma, layout)
            self._stride = laid_out(step * self._curve.stretch, layout)
            self._sigma, self._centred, self._power = (torch.empty_like(self.weight) for _ in range(3))
        else:
            at = self._curve.at
            self._compiled_curve = Curve(self._curve.gamma, self._curve.stretch, at(0), at(0.5), at(1))
            # twice the lower integer, without zero-point, plus 1 where the upper one differs
            self._grid = laid_out((2 * (self._low - offset) + self._movable).to(torch.int16), layout)
            self._one, self._gain_grad = self.weight.new_ones(1), self.weight.new_empty(len(self.weight))
            # none of these moves in memory
            self._read = [as_array(x, x.dtype) for x in (self.alpha.detach(), self._grid, self._scale)]
            self._written = [as_array(x) for x in (self.weight, self._grad, self._gain_grad)]

    def finish(self) -> None:
        """Rounds every weight to the integer that it is closer to."""
        self._rounding.codes.copy_(self._low + ((self._curve.soft(self.alpha.detach()) >= 0.5) & self._movable))

    def update(self, gain: Tensor | None) -> None:
        """Computes the weight anew, times a factor of one element or one for each scale."""
        if self._write is not None and self._derive is not None:
            factor = self._one if gain is None else gain.detach()
            self._write(len(self.weight), *self._read, factor, self._written[0], self._compiled_curve)
            return
        soft_weight_(self._sigma, self.weight, self.alpha.detach(), self._base, self._stride, self._curve)
        if gain is not None:
            self.weight.mul_(gain.detach())

    def collect(self, grad: Tensor | None, gain: nn.Parameter | None, beta: Any, round_weight: Any) -> None:
        """Carries the gradient of the weight, None of a layer that took no part, on to the variable and to the gain.

        ``beta`` is the exponent of the regulariser, None for no regulariser, and ``round_weight`` its weight; both may
        be scalars on the device, as in a CUDA graph.
        """
        grad = torch.zeros_like(self.weight) if grad is None else laid_out(grad, self._layout)
        exponent, weight = (2.0, 0.0) if beta is None else (beta, round_weight)
        self.alpha.grad = self._grad
        if self._write is not None and self._derive is not None:
            factor = self._one if gain is None else gain.detach()
            self._derive(
                len(self.weight), *self._read, factor, grad, *self._written[1:], self._compiled_curve,
                (exponent - 2) / 2, regulariser_factor(self._curve, exponent, weight),
            )  # fmt: skip
            if gain is not None:
                gain.grad = (self._gain_grad if gain.numel() > 1 else self._gain_grad.sum()).view(gain.shape)
            return
        if gain is not None:
            # over the axes of the gain that are 1
            gain.grad = torch.mul(grad, self.weight, out=self._grad).sum_to_size(gain.shape).div_(gain)
        torch.mul(grad, self._stride, out=self._grad)
        if gain is not None:
            self._grad.mul_(gain)
        if isinstance(weight, Tensor) or weight > 0:
            scratch = (self._centred, self._power)
            add_regulariser_gradient_(self._grad, self._sigma, self._curve, exponent, weight, scratch)
        through_sigmoid_(self._grad, self._sigma, self._curve)


class StraightThroughRounding:
    """The rounding of a layer learned by straight-through gradients, with the arguments and calls of the soft one.

    A weight is learned relative to its scale, so that one learning rate serves all channels. What lies beyond the end
    of the grid by more than half a step has no gradient, and there is no regulariser.

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
