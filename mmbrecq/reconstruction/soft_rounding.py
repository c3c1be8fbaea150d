"""The rounding variables of all layers of a unit, in one piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmbrecq.fake_quants.native import Kernels, kernels, takes
from mmbrecq.fake_quants.ops import (
    add_regulariser_gradient_,
    regulariser_factor,
    soft_weight_,
    through_sigmoid_,
)
from mmbrecq.fake_quants.weight import AdaRound
from mmbrecq.reconstruction.layout import laid_out


class SoftRounding:
    """One vector of variables for several layers, and their soft-quantized weights.

    Every pass over the weights is one operation for all layers, into memory that is kept from step to step.

    Args:
        roundings: The layers' fake quantizers, started; their ``alpha`` become views of the one vector.
        layout: Order in memory of the weights of convolutions.
    """

    def __init__(self, roundings: Sequence[AdaRound], layout: torch.memory_format) -> None:
        shapes = [rounding.codes.shape for rounding in roundings]
        self.curve = roundings[0].curve
        assert all(rounding.curve == self.curve for rounding in roundings)
        like = roundings[0].line()[0]
        count = sum(shape.numel() for shape in shapes)
        names = ('alpha', 'base', 'stride', 'sigma', 'weight', 'grad')
        vectors = {name: torch.empty(count, dtype=like.dtype, device=like.device) for name in names}
        views = {name: _views(vector, shapes, layout) for name, vector in vectors.items()}
        for index, rounding in enumerate(roundings):
            assert rounding.alpha is not None
            for name, tensor in zip(('base', 'stride'), rounding.line(), strict=True):
                views[name][index].copy_(tensor)
            views['alpha'][index].copy_(rounding.alpha.detach())
            rounding.alpha.data = views['alpha'][index]
        self.weights, self._views = views['weight'], views
        self.alpha = nn.Parameter(vectors['alpha'])
        self._vectors, self._layout = vectors, layout
        by_row = all(rounding.qtype.ch_axis in (None, 0) for rounding in roundings)
        self._native = kernels() if by_row and takes(like) else None
        unused = 0 if self._native is None else count
        self._scratch = (like.new_empty(count - unused), like.new_empty(count - unused))
        self._one = torch.ones(1, dtype=like.dtype, device=like.device)

    def update(self, gains: Sequence[Tensor | None]) -> None:
        """Computes the weights anew, each times its gain where that is not None."""
        v = self._vectors
        if self._native is None:
            soft_weight_(v['sigma'], v['weight'], v['alpha'], v['base'], v['stride'], self.curve)
            for weight, gain in zip(self.weights, gains, strict=True):
                if gain is not None:
                    weight.mul_(gain)
            return
        names = ('sigma', 'weight', 'alpha', 'base', 'stride')
        bounds = (self.curve.at(0), self.curve.at(1))
        for index, gain in enumerate(gains):
            sigma, weight, alpha, base, stride = (self._views[name][index] for name in names)
            self._native.soft_weight(sigma, weight, alpha, base, stride, self._one if gain is None else gain, bounds)

    def collect(
        self, grads: Sequence[Tensor | None], gains: Sequence[nn.Parameter | None], beta: float | None, weight: float
    ) -> None:
        """Carries the gradients of the weights on to the variables and to the gains.

        Args:
            grads: Of every layer's weight; None where it took no part.
            gains: The factors by which the weights are more than the soft-quantized ones.
            beta: Exponent of the regulariser; None for none.
            weight: Of the regulariser.
        """
        weight = 0.0 if beta is None else weight
        beta = 2.0 if beta is None else beta
        for index, (grad, gain) in enumerate(zip(grads, gains, strict=True)):
            # a layer that took no part is left to the regulariser
            known = torch.zeros_like(self.weights[index]) if grad is None else laid_out(grad, self._layout)
            if self._native is None:
                self._collect(index, known, gain)
            else:
                self._collect_native(self._native, index, known, gain, beta, weight)
        v = self._vectors
        if self._native is None:
            if weight > 0:
                add_regulariser_gradient_(v['grad'], v['sigma'], self.curve, beta, weight, self._scratch)
            through_sigmoid_(v['grad'], v['sigma'], self.curve)
        self.alpha.grad = v['grad']

    def _collect(self, index: int, grad: Tensor, gain: nn.Parameter | None) -> None:
        product = self._views['grad'][index]
        if gain is not None:
            # over the axes of the gain that are 1
            gain.grad = torch.mul(grad, self.weights[index], out=product).sum_to_size(gain.shape).div_(gain)
        torch.mul(grad, self._views['stride'][index], out=product)
        if gain is not None:
            product.mul_(gain)

    def _collect_native(
        self, native: Kernels, index: int, grad: Tensor, gain: nn.Parameter | None, beta: float, weight: float
    ) -> None:
        curve, views = self.curve, self._views
        gain_grad = native.rounding_gradient(
            views['grad'][index], grad, views['weight'][index],
            views['stride'][index], views['sigma'][index], self._one if gain is None else gain,
            (curve.at(0), curve.at(0.5), curve.at(1)), (beta - 2) / 2, regulariser_factor(curve, beta, weight),
        )  # fmt: skip
        if gain is not None:
            gain.grad = (gain_grad if gain.numel() > 1 else gain_grad.sum()).view(gain.shape)


def _views(vector: Tensor, shapes: Sequence[torch.Size], layout: torch.memory_format) -> list[Tensor]:
    """The parts of a vector that belong to the layers, each with its shape."""
    views = []
    for part, shape in zip(vector.split([shape.numel() for shape in shapes]), shapes, strict=True):
        if layout == torch.channels_last and len(shape) == 4:
            out, channels, height, width = shape
            views.append(part.view(out, height, width, channels).permute(0, 3, 1, 2))
        else:
            views.append(part.view(shape))
    return views
