"""The rounding variables of all layers of a unit, in one piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmbrecq.fake_quants.ops import (
    add_regulariser_gradient_,
    regulariser_factor,
    soft_weight_,
    through_sigmoid_,
)
from mmbrecq.fake_quants.weight import AdaRound
from mmbrecq.kernels.native import Curve, Kernels, RoundingLayer, kernels, takes
from mmbrecq.reconstruction.adam import Ahead
from mmbrecq.reconstruction.layout import laid_out


def learn_rounding(roundings: Sequence[AdaRound], layout: torch.memory_format) -> SoftRounding:
    """The fastest that the layers allow.

    Args:
        roundings: The layers' fake quantizers, started; their ``alpha`` become views of one vector.
        layout: Order in memory of the weights of convolutions.
    """
    by_row = all(rounding.qtype.ch_axis in (None, 0) for rounding in roundings)
    native = kernels() if by_row and takes(roundings[0].line()[0]) else None
    return TorchSoftRounding(roundings, layout) if native is None else NativeSoftRounding(roundings, layout, native)


class SoftRounding:
    """One vector of variables for several layers, and their soft-quantized weights.

    Args:
        roundings: The layers' fake quantizers, started; their ``alpha`` become views of the one vector.
        layout: Order in memory of the weights of convolutions.
    """

    def __init__(self, roundings: Sequence[AdaRound], layout: torch.memory_format) -> None:
        self.curve = roundings[0].curve
        assert all(rounding.curve == self.curve for rounding in roundings)
        self._shapes, self._layout = [rounding.codes.shape for rounding in roundings], layout
        self._like = roundings[0].scale
        alpha, alphas = self._vector()
        for view, rounding in zip(alphas, roundings, strict=True):
            assert rounding.alpha is not None
            view.copy_(rounding.alpha.detach())
            rounding.alpha.data = view
        self.alpha = nn.Parameter(alpha)
        self._weight, self.weights = self._vector()
        self._grad, self._grads = self._vector()

    def _vector(self, dtype: torch.dtype | None = None) -> tuple[Tensor, list[Tensor]]:
        """A vector with an element for each weight, and its parts as the layers' weights lie."""
        vector = self._like.new_empty(sum(shape.numel() for shape in self._shapes), dtype=dtype)
        return vector, _views(vector, self._shapes, self._layout)

    def multiply_by(self, gains: Sequence[nn.Parameter | None]) -> None:
        """Sets the factors by which the weights are more than the soft-quantized ones.

        Args:
            gains: Of every layer; None for a layer without. They stay where they lie in memory.
        """
        self._gains = gains

    def update(self) -> None:
        """Computes the weights anew, each times its gain."""
        raise NotImplementedError

    def collect(
        self,
        grads: Sequence[Tensor | None],
        beta: float | None,
        weight: float,
        ahead: Ahead | None = None,
    ) -> None:
        """Carries the gradients of the weights on to the variables and to the gains.

        Args:
            grads: Of every layer's weight; None where it took no part.
            beta: Exponent of the regulariser; None for none.
            weight: Of the regulariser.
            ahead: The step that the variables may take at once; they have no gradient if they do.
        """
        # a layer that took no part is left to the regulariser
        known = [
            torch.zeros_like(own) if grad is None else laid_out(grad, self._layout)
            for grad, own in zip(grads, self.weights, strict=True)
        ]
        moved = self._collect(known, 2.0 if beta is None else beta, 0.0 if beta is None else weight, ahead)
        self.alpha.grad = None if moved else self._grad

    def _collect(
        self,
        grads: Sequence[Tensor],
        beta: float,
        weight: float,
        ahead: Ahead | None,
    ) -> bool:
        """Returns whether the variables took their step."""
        raise NotImplementedError


class TorchSoftRounding(SoftRounding):
    """By torch's operations: every pass over the weights is one for all layers, into memory that is kept."""

    def __init__(self, roundings: Sequence[AdaRound], layout: torch.memory_format) -> None:
        super().__init__(roundings, layout)
        self._base, bases = self._vector()
        self._stride, self._strides = self._vector()
        for rounding, base, stride in zip(roundings, bases, self._strides, strict=True):
            for view, tensor in zip((base, stride), rounding.line(), strict=True):
                view.copy_(tensor)
        self._sigma, self._scratch = torch.empty_like(self._grad), (self._vector()[0], self._vector()[0])

    def update(self) -> None:
        soft_weight_(self._sigma, self._weight, self.alpha.detach(), self._base, self._stride, self.curve)
        for weight, gain in zip(self.weights, self._gains, strict=True):
            if gain is not None:
                weight.mul_(gain.detach())

    def _collect(
        self,
        grads: Sequence[Tensor],
        beta: float,
        weight: float,
        ahead: Ahead | None,
    ) -> bool:
        for index, (grad, gain, product) in enumerate(zip(grads, self._gains, self._grads, strict=True)):
            if gain is not None:
                # over the axes of the gain that are 1
                gain.grad = torch.mul(grad, self.weights[index], out=product).sum_to_size(gain.shape).div_(gain)
            torch.mul(grad, self._strides[index], out=product)
            if gain is not None:
                product.mul_(gain)
        if weight > 0:
            add_regulariser_gradient_(self._grad, self._sigma, self.curve, beta, weight, self._scratch)
        through_sigmoid_(self._grad, self._sigma, self.curve)
        return False


class NativeSoftRounding(SoftRounding):
    """By compiled kernels: one pass each way, over grids that are two bytes a weight.

    Args:
        roundings: See :class:`SoftRounding`.
        layout: Likewise.
        native: The kernels.
    """

    def __init__(self, roundings: Sequence[AdaRound], layout: torch.memory_format, native: Kernels) -> None:
        super().__init__(roundings, layout)
        curve = self.curve
        self._native = native
        self._curve = Curve(curve.gamma, curve.stretch, curve.at(0), curve.at(0.5), curve.at(1))
        self._grid, grids = self._vector(torch.int16)
        self._one = self._like.new_ones(1)
        sizes = [4 * shape.numel() for shape in self._shapes]
        self._starts = [sum(sizes[:index]) for index in range(len(sizes))]
        rows = [shape[0] for shape in self._shapes]
        self._gain_grads = self._like.new_empty(sum(rows)).split(rows)
        # the addresses in the table stay good as long as the tensors live
        self._kept = [rounding.scale for rounding in roundings]
        self._layers = (RoundingLayer * len(roundings))()
        for index, (layer, rounding, grid) in enumerate(zip(self._layers, roundings, grids, strict=True)):
            grid.copy_(rounding.grid())
            layer.rows, layer.columns = rows[index], grid.numel() // rows[index]
            layer.alpha = self.alpha.data_ptr() + self._starts[index]
            layer.grid, layer.weight = grid.data_ptr(), self.weights[index].data_ptr()
            layer.out, layer.gain_grad = self._grads[index].data_ptr(), self._gain_grads[index].data_ptr()
            layer.scale, layer.scale_step = rounding.scale.data_ptr(), int(rounding.scale.numel() > 1)

    def multiply_by(self, gains: Sequence[nn.Parameter | None]) -> None:
        super().multiply_by(gains)
        for layer, gain in zip(self._layers, gains, strict=True):
            layer.gain = (self._one if gain is None else gain).data_ptr()
            layer.gain_step = int(gain is not None and gain.numel() > 1)
        self._shaped = [
            own.view(gain.shape) if gain is not None and gain.numel() > 1 else own
            for own, gain in zip(self._gain_grads, gains, strict=True)
        ]

    def update(self) -> None:
        self._native.soft_weights(self._layers, self._curve)

    def _collect(
        self,
        grads: Sequence[Tensor],
        beta: float,
        weight: float,
        ahead: Ahead | None,
    ) -> bool:
        (mean, square), step = ((None, None), None) if ahead is None else ahead
        for layer, grad, start in zip(self._layers, grads, self._starts, strict=True):
            layer.grad = grad.data_ptr()
            layer.mean, layer.square = (None if x is None else x.data_ptr() + start for x in (mean, square))
        factor = regulariser_factor(self.curve, beta, weight)
        self._native.rounding_gradients(self._layers, self._curve, (beta - 2) / 2, factor, step)
        for gain, gain_grad in zip(self._gains, self._shaped, strict=True):
            if gain is not None:
                gain.grad = gain_grad if gain.numel() > 1 else gain_grad.sum().view(gain.shape)
        return ahead is not None


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
