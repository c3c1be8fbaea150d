"""The rounding of a layer while it is learned: its variable, its soft-quantized weight, and the gradients of both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmbrecq.fake_quants.ops import add_regulariser_gradient_, regulariser_factor, soft_weight_, through_sigmoid_
from mmbrecq.fake_quants.weight import AdaRound
from mmbrecq.kernels.native import Curve, Kernel, kernel
from mmbrecq.reconstruction.values import laid_out


def learn_rounding(rounding: AdaRound, layout: torch.memory_format) -> SoftRounding:
    """Returns the rounding of a layer by compiled kernels where they can compute it, else by torch's operations.

    Args:
        rounding: Fake quantizer of the layer, started; its ``alpha`` gets the order in memory.
        layout: Order in memory of the weights of convolutions.
    """
    assert rounding.alpha is not None
    rounding.alpha.data = laid_out(rounding.alpha.detach(), layout)
    kernels = [kernel(name, rounding.alpha.detach()) for name in ('soft_weight', 'rounding_gradient')]
    write, derive = kernels
    if write is None or derive is None or rounding.qtype.ch_axis not in (None, 0):
        return SoftRounding(rounding, layout)
    return CompiledSoftRounding(rounding, layout, write, derive)


class SoftRounding:
    """The learned rounding of a layer, by torch's operations in memory that is kept from iteration to iteration.

    Args:
        rounding: Fake quantizer of the layer, started.
        layout: Order in memory of the weights of convolutions.

    Attributes:
        alpha (Parameter): The variable, with the shape of the weight.
        weight (Tensor): The soft-quantized weight times its gain.
    """

    def __init__(self, rounding: AdaRound, layout: torch.memory_format) -> None:
        assert rounding.alpha is not None
        self.alpha: nn.Parameter = rounding.alpha
        self.curve, self._layout = rounding.curve, layout
        self.weight, self._grad = (torch.empty_like(self.alpha.detach()) for _ in range(2))
        self._set_grid(rounding)

    def update(self, gain: Tensor | None) -> None:
        """Computes the weight anew, times a factor of one element or one for each scale."""
        soft_weight_(self._sigma, self.weight, self.alpha.detach(), self._base, self._stride, self.curve)
        if gain is not None:
            self.weight.mul_(gain.detach())

    def collect(self, grad: Tensor | None, gain: nn.Parameter | None, beta: float | None, round_weight: float) -> None:
        """Carries the gradient of the weight on to the variable and to the gain.

        Args:
            grad (Tensor | None): Gradient of the weight; a layer that took no part has none.
            gain: The factor; None where there is none.
            beta: Exponent of the regulariser; None for no regulariser.
            round_weight: Weight of the regulariser.
        """
        known = torch.zeros_like(self.weight) if grad is None else laid_out(grad, self._layout)
        self._collect(known, gain, 2.0 if beta is None else beta, 0.0 if beta is None else round_weight)
        self.alpha.grad = self._grad

    def _set_grid(self, rounding: AdaRound) -> None:
        self._base, self._stride = (laid_out(x, self._layout) for x in rounding.line())
        self._sigma, *self._scratch = (torch.empty_like(self._grad) for _ in range(3))

    def _collect(self, grad: Tensor, gain: nn.Parameter | None, beta: float, round_weight: float) -> None:
        if gain is not None:
            # over the axes of the gain that are 1
            gain.grad = torch.mul(grad, self.weight, out=self._grad).sum_to_size(gain.shape).div_(gain)
        torch.mul(grad, self._stride, out=self._grad)
        if gain is not None:
            self._grad.mul_(gain)
        if round_weight > 0:
            centred, power = self._scratch
            add_regulariser_gradient_(self._grad, self._sigma, self.curve, beta, round_weight, (centred, power))
        through_sigmoid_(self._grad, self._sigma, self.curve)


class CompiledSoftRounding(SoftRounding):
    """The learned rounding of a layer by compiled kernels: one pass each way, over grids of two bytes a weight.

    Args:
        rounding: Fake quantizer of the layer, started; its scale is one, or one for each row.
        layout: Order in memory of the weights of convolutions.
        write: The kernel ``soft_weight``.
        derive: The kernel ``rounding_gradient``.
    """

    def __init__(self, rounding: AdaRound, layout: torch.memory_format, write: Kernel, derive: Kernel) -> None:
        super().__init__(rounding, layout)
        curve, self._write, self._derive = self.curve, write, derive
        self._curve = Curve(curve.gamma, curve.stretch, curve.at(0), curve.at(0.5), curve.at(1))
        self._one, self._gain_grad = self.alpha.new_ones(1), self.alpha.new_empty(len(self.alpha))

    def _set_grid(self, rounding: AdaRound) -> None:
        self._grid, self._scale = laid_out(rounding.grid(), self._layout), rounding.scale

    def update(self, gain: Tensor | None) -> None:
        factor = self._one if gain is None else gain.detach()
        alpha = self.alpha.detach()
        self._write(len(alpha), alpha, self._grid, self._scale, factor, self.weight, self._curve)

    def _collect(self, grad: Tensor, gain: nn.Parameter | None, beta: float, round_weight: float) -> None:
        alpha, factor = self.alpha.detach(), self._one if gain is None else gain.detach()
        self._derive(
            len(alpha), alpha, self._grid, self._scale, factor, grad, self._grad, self._gain_grad, self._curve,
            (beta - 2) / 2, regulariser_factor(self.curve, beta, round_weight),
        )  # fmt: skip
        if gain is not None:
            gain_grad = self._gain_grad if gain.numel() > 1 else self._gain_grad.sum()
            gain.grad = gain_grad.view(gain.shape)
