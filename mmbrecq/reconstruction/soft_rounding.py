"""The rounding variables of all layers of a unit, in one piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmbrecq.fake_quants.ops import add_regulariser_gradient_, soft_weight_, through_sigmoid_
from mmbrecq.fake_quants.weight import AdaRound


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
        names = ('alpha', 'base', 'stride', 'sigma', 'weight', 'grad', 'scratch')
        vectors = {name: torch.empty(count, dtype=like.dtype, device=like.device) for name in names}
        views = {name: _views(vector, shapes, layout) for name, vector in vectors.items()}
        for index, rounding in enumerate(roundings):
            assert rounding.alpha is not None
            for name, tensor in zip(('base', 'stride'), rounding.line(), strict=True):
                views[name][index].copy_(tensor)
            views['alpha'][index].copy_(rounding.alpha.detach())
            rounding.alpha.data = views['alpha'][index]
        self.weights, self._strides, self._grads = views['weight'], views['stride'], views['grad']
        self.alpha = nn.Parameter(vectors['alpha'])
        self._vectors = vectors
        self._scratch = torch.empty_like(vectors['alpha'])

    def update(self) -> None:
        """Computes the weights anew."""
        v = self._vectors
        soft_weight_(v['sigma'], v['weight'], v['alpha'], v['base'], v['stride'], self.curve)

    def collect_weight(self, index: int, grad: Tensor | None, gain: Tensor | None) -> None:
        """Takes the gradient of one layer's weight, None for none.

        Args:
            index: Of the layer.
            grad (Tensor | None): Same shape as the weight.
            gain (Tensor | None): The factor by which the layer's weight is more than the soft-quantized one.
        """
        if grad is None:
            self._grads[index].zero_()
            return
        torch.mul(grad, self._strides[index], out=self._grads[index])
        if gain is not None:
            self._grads[index].mul_(gain)

    def collect(self, beta: float | None, round_weight: float) -> None:
        """Completes the gradient of the variables, all layers' gradients taken; ``beta`` as the regulariser has it."""
        v = self._vectors
        if beta is not None and round_weight > 0:
            scratch = (v['scratch'], self._scratch)
            add_regulariser_gradient_(v['grad'], v['sigma'], self.curve, beta, round_weight, scratch)
        through_sigmoid_(v['grad'], v['sigma'], self.curve)
        self.alpha.grad = v['grad']


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
