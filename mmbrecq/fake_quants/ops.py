"""Autograd functions of fake quantization: gradients in closed form, and their ONNX operators.

A chain of elementary autograd operations would read and write every tensor five to ten times and keep as many copies
for the backward pass; a function here keeps what its gradient needs and no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmbrecq.functional import dequantize, expand
from mmbrecq.qtype import QType


@dataclass(frozen=True)
class Clip:
    """How an exported grid is cut that is smaller than its container.

    Args:
        bounds: Smallest and largest value, scalars: integers in the container's dtype, or real values.
        on_integers: Which of the two.
    """

    bounds: tuple[Tensor, Tensor]
    on_integers: bool


class FakeQuantizeFunction(torch.autograd.Function):
    """Fake quantization of activations: straight-through gradient for ``x``, LSQ's gradient for ``scale``.

    With ``r = round(x / scale)``, inside the range d/dx = 1 and d/dscale = r - x / scale; outside d/dx = 0 and
    d/dscale is the bound, ``quant_min - zero_point`` or ``quant_max - zero_point`` (Esser et al., ICLR 2020, eq. 3).
    Where ``keep`` is 0 the output is ``x`` itself: d/dx = 1, d/dscale = 0 (QDrop, Wei et al., ICLR 2022). Over all
    elements that makes ``dscale = (<grad, output> - <grad_x, x>) / scale``.

    In ONNX it is ``QuantizeLinear -> DequantizeLinear``; where the grid is smaller than its 8-bit container a Clip cuts
    the integers between the two, or the real values before them. Both give the same numbers.
    """

    # No boolean tensor anywhere: on a CPU torch selects by a mask some 20 times slower than it multiplies.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType, clip: Clip | None, keep: Tensor | None
    ) -> Tensor:
        step, offset = (expand(v.to(x.dtype), x.dim(), qtype.ch_axis) for v in (scale, zero_point))
        codes = (x / step).round_()
        if qtype.symmetric:
            codes.clamp_(qtype.quant_min, qtype.quant_max)
        else:
            codes.add_(offset).clamp_(qtype.quant_min, qtype.quant_max).sub_(offset)
        out = codes.mul_(step)
        if keep is not None:
            torch.lerp(x, out, keep, out=out)
        ctx.qtype = qtype
        ctx.save_for_backward(x, step, offset, out, keep)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, step, offset, out, keep = ctx.saved_tensors
        qtype: QType = ctx.qtype
        place = x / step
        if not qtype.symmetric:
            place.add_(offset)
        low, high = qtype.quant_min - 0.5, qtype.quant_max + 0.5
        grad_x = torch.ops.aten.hardtanh_backward(grad, place, low, high, grad_input=place)
        if keep is not None:
            torch.lerp(grad, grad_x, keep, out=grad_x)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            total = _inner(grad, out, qtype.ch_axis).sub_(_inner(grad_x, x, qtype.ch_axis))
            grad_scale = total.div_(step.reshape(total.shape))
        return grad_x if ctx.needs_input_grad[0] else None, grad_scale, None, None, None, None

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any, zero_point: Any, qtype: QType, clip: Clip | None, keep: None) -> Any:
        axis = {} if qtype.ch_axis is None else {'axis_i': qtype.ch_axis}
        bounds = [] if clip is None else [g.op('Constant', value_t=bound) for bound in clip.bounds]
        if clip is not None and not clip.on_integers:
            x = g.op('Clip', x, *bounds)
        codes = g.op('QuantizeLinear', x, scale, zero_point, **axis)
        if clip is not None and clip.on_integers:
            codes = g.op('Clip', codes, *bounds)
        return g.op('DequantizeLinear', codes, scale, zero_point, **axis)


def _inner(a: Tensor, b: Tensor, ch_axis: int | None) -> Tensor:
    """Sum of the products, over all axes but ``ch_axis``; ``()`` or ``(C,)``."""
    if ch_axis is None:
        return torch.dot(a.reshape(-1), b.reshape(-1))
    return (a * b).sum([axis for axis in range(a.dim()) if axis != ch_axis])


class DequantizeFunction(torch.autograd.Function):
    """Integers to real values; in ONNX one ``DequantizeLinear`` over an integer initializer."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor, zero_point: Tensor, ch_axis: int | None) -> Tensor:
        return dequantize(codes, scale, zero_point.to(scale.dtype), ch_axis)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, None, None

    @staticmethod
    def symbolic(g: Any, codes: Any, scale: Any, zero_point: Any, ch_axis: int | None) -> Any:
        axis = {} if ch_axis is None else {'axis_i': ch_axis}
        return g.op('DequantizeLinear', codes, scale, zero_point, **axis)


class SoftRoundFunction(torch.autograd.Function):
    """AdaRound's soft-quantized weight and its rounding regulariser (Nagel et al., ICML 2020, eq. 23 and 24).

    With ``s = sigmoid(alpha)`` and ``h = clamp(s * (zeta - gamma) + gamma, 0, 1)`` the weight is ``low + step * h``,
    where ``low`` is the weight rounded down and ``step`` the scale, or 0 where the weight is clipped. The regulariser
    is ``sum(1 - |2 h - 1| ** beta)``. ``dh/dalpha`` is ``(zeta - gamma) s (1 - s)`` strictly inside (0, 1), and 0 at
    the bounds.
    """

    @staticmethod
    def forward(
        ctx: Any, alpha: Tensor, low: Tensor, step: Tensor, zeta: float, gamma: float, beta: float | None
    ) -> tuple[Tensor, Tensor]:
        s = torch.sigmoid(alpha)
        h = s.mul(zeta - gamma).add_(gamma).clamp_(0, 1)
        ctx.stretch, ctx.beta = zeta - gamma, beta
        weight = torch.addcmul(low, step, h)
        if beta is None:
            ctx.save_for_backward(s, h, step)
            return weight, alpha.new_zeros(())
        centred = h.mul(2).sub_(1)
        distance = centred.abs()
        # a third of the time of pow, which does not vectorise as well; 0 comes out as 0
        power = distance.log2().mul_(beta - 1).exp2_()
        round_loss = distance.numel() - torch.dot(power.flatten(), distance.flatten())
        ctx.save_for_backward(s, h, step, power.copysign_(centred))
        return weight, round_loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_weight, grad_loss = grads
        s, h, step = ctx.saved_tensors[:3]
        grad = grad_weight * step
        if ctx.beta is not None:
            grad.addcmul_(ctx.saved_tensors[3], grad_loss, value=-2 * ctx.beta)
        # torch's own backward passes of clamp and sigmoid: one pass over the weights each
        grad = torch.ops.aten.hardtanh_backward(grad, h, 0, 1)
        return torch.ops.aten.sigmoid_backward(grad, s).mul_(ctx.stretch), None, None, None, None, None


def soft_rounding(alpha: Tensor, zeta: float, gamma: float) -> Tensor:
    """Rectified sigmoid ``clamp(sigmoid(alpha) * (zeta - gamma) + gamma, 0, 1)``; same shape as ``alpha``."""
    return torch.sigmoid(alpha).mul_(zeta - gamma).add_(gamma).clamp_(0, 1)


def initial_alpha(fraction: Tensor, zeta: float, gamma: float) -> Tensor:
    """The ``alpha`` whose soft rounding equals ``fraction``, in [0, 1); same shape."""
    return -torch.log((zeta - gamma) / (fraction - gamma) - 1)
