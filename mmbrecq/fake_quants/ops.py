"""Autograd functions of fake quantization: gradients in closed form, and their ONNX operators.

A chain of elementary autograd operations would read and write every tensor five to ten times and keep as many copies
for the backward pass; a function here keeps what its gradient needs and no more.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmbrecq.functional import dequantize, expand
from mmbrecq.kernels.native import BLOCK, kernel
from mmbrecq.qtype import QType

Clip = tuple[Tensor, Tensor]
"""How an exported grid is cut that is smaller than its container: the smallest and the largest value, scalars. They are
integers in the container's dtype between Q and DQ, or real values before Q."""

UNBOUNDED = (-math.inf, math.inf)
"""Bounds of a rectifier that changes nothing."""


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qtype: QType,
    clip: Clip | None = None,
    keep: Tensor | None = None,
    rectifier: tuple[float, float] | None = None,
) -> Tensor:
    """Fake-quantizes activations by a compiled kernel where it can, else by :class:`FakeQuantizeFunction`.

    Args:
        x (Tensor): Any shape.
        scale (Tensor): ``()``, or ``(C,)`` where the grid has one scale per channel.
        zero_point (Tensor): Same shape.
        qtype: The grid.
        clip: How an exported grid is cut.
        keep (Tensor | None): A mask of bytes; the float value is passed on where it is 0.
        rectifier: Bounds of the activation function before, which costs no pass of its own over memory here.

    Example:
        >>> x = torch.tensor([-0.3, 0.1, 0.34, 9.0])
        >>> fake_quantize(x, torch.tensor(0.25), torch.tensor(0), QType(4))
        tensor([-0.2500,  0.0000,  0.2500,  1.7500])
    """
    compute = None if torch.onnx.is_in_onnx_export() else kernel('fake_quantize', x, keep)
    bounds = None if compute is None or scale.dim() > 0 else code_bounds(zero_point, qtype)
    if compute is not None and bounds is not None:
        call = (compute, scale.item(), bounds, keep, rectifier or UNBOUNDED)
        return _CompiledFakeQuantize.apply(x, scale, call)
    rectified = x if rectifier is None else torch.nn.functional.hardtanh(x, *rectifier)
    return FakeQuantizeFunction.apply(rectified, scale, zero_point, qtype, clip, keep)


class _CompiledFakeQuantize(torch.autograd.Function):
    """The same outputs and gradients as :class:`FakeQuantizeFunction`, with one pass over memory each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, call: tuple[Any, ...]) -> Tensor:
        compute, size, bounds, keep, rectifier = call
        out = torch.empty_like(x)
        compute(x, keep, out, size, *bounds, *rectifier)
        ctx.call = call
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (x, out), (_, size, (low, high), keep, rectifier) = grads, ctx.saved_tensors, ctx.call
        if grad.stride() != x.stride():
            grad = torch.empty_like(x).copy_(grad)
        compute = kernel('fake_quantize_gradient', x, grad)
        assert compute is not None
        grad_x, sums = torch.empty_like(x), torch.empty(max(1, -(-x.numel() // BLOCK)), dtype=torch.float64)
        compute(grad, x, out, keep, grad_x, sums, (low - 0.5) * size, (high + 0.5) * size, *rectifier)
        return grad_x, torch.full((), sums[0].item() / size) if ctx.needs_input_grad[1] else None, None


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
        ctx.qtype, ctx.bounds = qtype, code_bounds(zero_point, qtype)
        keep = None if keep is None else keep.to(x.dtype)
        size = expand(scale.to(x.dtype), x.dim(), qtype.ch_axis)
        offset = None if ctx.bounds is not None else expand(zero_point.to(x.dtype), x.dim(), qtype.ch_axis)
        codes = (x / size).round_()
        if offset is None:
            codes.clamp_(*ctx.bounds)
        else:
            codes.add_(offset).clamp_(qtype.quant_min, qtype.quant_max).sub_(offset)
        out = codes.mul_(size)
        if keep is not None:
            torch.lerp(x, out, keep, out=out)
        ctx.save_for_backward(x, out, keep, size, offset)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, out, keep, size, offset = ctx.saved_tensors
        qtype: QType = ctx.qtype
        low, high = (qtype.quant_min, qtype.quant_max) if ctx.bounds is None else ctx.bounds
        ratio = x / size
        if offset is not None:
            ratio.add_(offset)
        grad_x = torch.ops.aten.hardtanh_backward(grad, ratio, low - 0.5, high + 0.5, grad_input=ratio)
        if keep is not None:
            torch.lerp(grad, grad_x, keep, out=grad_x)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            total = _inner(grad, out, qtype.ch_axis).sub_(_inner(grad_x, x, qtype.ch_axis))
            grad_scale = total.div_(size.reshape(total.shape))
        return grad_x if ctx.needs_input_grad[0] else None, grad_scale, *[None] * 4

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any, zero_point: Any, qtype: QType, clip: Clip | None, keep: None) -> Any:
        axis = {} if qtype.ch_axis is None else {'axis_i': qtype.ch_axis}
        bounds = [g.op('Constant', value_t=bound) for bound in clip or ()]
        if clip is not None and clip[0].is_floating_point():
            x = g.op('Clip', x, *bounds)
        codes = g.op('QuantizeLinear', x, scale, zero_point, **axis)
        if clip is not None and not clip[0].is_floating_point():
            codes = g.op('Clip', codes, *bounds)
        return g.op('DequantizeLinear', codes, scale, zero_point, **axis)


def code_bounds(zero_point: Tensor, qtype: QType) -> tuple[float, float] | None:
    """Returns the bounds of ``round(x / scale)``, None where they are many, or a device would be waited for."""
    if qtype.symmetric:
        return qtype.quant_min, qtype.quant_max
    if zero_point.dim() > 0 or zero_point.device.type != 'cpu':
        return None
    offset = int(zero_point)
    return qtype.quant_min - offset, qtype.quant_max - offset


def _inner(a: Tensor, b: Tensor, ch_axis: int | None) -> Tensor:
    """Returns the sum of the products, over all axes but ``ch_axis``; ``()`` or ``(C,)``."""
    if ch_axis is None:
        return torch.dot(*_flat(a, b))
    return (a * b).sum([axis for axis in range(a.dim()) if axis != ch_axis])


def _flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both as vectors with the same order of elements, without a copy where they lie alike."""
    if all(x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) for x in (a, b)):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return a.reshape(-1), b.reshape(-1)


class DequantizeFunction(torch.autograd.Function):
    """Maps integers to real values; in ONNX it is one ``DequantizeLinear`` over an integer initializer."""

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


@dataclass(frozen=True)
class Sigmoid:
    """AdaRound's rectified sigmoid: the soft rounding ``h = clamp(sigmoid(alpha) * (zeta - gamma) + gamma, 0, 1)``.

    ``sigma`` is the sigmoid of ``alpha``, clamped to where the soft rounding is not cut.

    Args:
        zeta: Upper stretch of the rectified sigmoid, > 1.
        gamma: Lower stretch, < 0.
    """

    zeta: float
    gamma: float

    @property
    def stretch(self) -> float:
        """``dh / dsigma``."""
        return self.zeta - self.gamma

    def soft(self, alpha: Tensor) -> Tensor:
        """Returns the soft rounding; same shape."""
        return torch.clamp(torch.sigmoid(alpha) * self.stretch + self.gamma, 0, 1)

    def inverse(self, fraction: Tensor) -> Tensor:
        """Returns the ``alpha`` whose soft rounding equals ``fraction``, in [0, 1); same shape."""
        return -torch.log(self.stretch / (fraction - self.gamma) - 1)

    def at(self, h: float) -> float:
        """Returns the ``sigma`` of a soft rounding ``h``."""
        return (h - self.gamma) / self.stretch


def soft_weight_(sigma: Tensor, weight: Tensor, alpha: Tensor, base: Tensor, stride: Tensor, curve: Sigmoid) -> None:
    """Writes ``sigma`` and the soft-quantized ``weight = base + stride * sigma`` (Nagel et al., ICML 2020, eq. 23).

    All tensors have the same shape. ``base`` and ``stride`` are the line through the weight rounded down, at ``h = 0``,
    and rounded up, at ``h = 1``.
    """
    torch.sigmoid(alpha, out=sigma).clamp_(curve.at(0), curve.at(1))
    torch.addcmul(base, stride, sigma, out=weight)


def add_regulariser_gradient_(
    grad: Tensor, sigma: Tensor, curve: Sigmoid, beta: Any, factor: Any, scratch: tuple[Tensor, Tensor]
) -> None:
    """Adds to ``grad`` the gradient with respect to ``sigma`` of ``factor * sum(1 - |2 h - 1| ** beta)`` (eq. 24).

    That is ``-2 beta factor (zeta - gamma) |c| ** (beta - 1) sign(c)`` with ``c = 2 h - 1`` and ``beta > 1``. Nobody
    reads the value of the regulariser, so it is not computed. All tensors have the same shape; those of ``scratch`` are
    overwritten. ``beta`` and ``factor`` may be scalars on the device, as in a CUDA graph.
    """
    centred, power = scratch
    torch.sub(sigma, curve.at(0.5), out=centred)
    if isinstance(beta, Tensor):
        # 0 has no power that is not positive
        torch.abs(centred, out=power).clamp_(min=torch.finfo(power.dtype).tiny).pow_(beta - 2)
        grad.addcmul_(centred, power.mul_(regulariser_factor(curve, beta, factor)))
        return
    torch.mul(centred, centred, out=power)
    if beta <= 2:
        power.clamp_(min=torch.finfo(power.dtype).tiny)
    # a third of the time of pow, which does not vectorise as well; 0 comes out as 0
    power.log2_().mul_((beta - 2) / 2).exp2_()
    grad.addcmul_(centred, power, value=regulariser_factor(curve, beta, factor))


def regulariser_factor(curve: Sigmoid, beta: Any, factor: Any) -> Any:
    """Returns the gradient's factor of ``d * |d| ** (beta - 2)``, with ``d = sigma - sigma(h = 1/2)``."""
    return -2 * beta * factor * (2 * curve.stretch) ** (beta - 1) * curve.stretch


def through_sigmoid_(grad: Tensor, sigma: Tensor, curve: Sigmoid) -> None:
    """Turns the gradient with respect to ``sigma`` into that with respect to ``alpha``: 0 where the curve is cut."""
    # torch's own backward passes of clamp and sigmoid: one pass over the weights each
    torch.ops.aten.hardtanh_backward(grad, sigma, curve.at(0), curve.at(1), grad_input=grad)
    torch.ops.aten.sigmoid_backward(grad, sigma, grad_input=grad)


class OutputGradient(torch.autograd.Function):
    """Passes the output of a layer on, and finds the gradients of its weight's scale and of its bias from it.

    The output is linear in the weight, so ``<dweight, weight> = <doutput, output - bias>`` for every channel, and the
    gradient of a factor on the weight needs no gradient of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, gain: Tensor | None, offset: Tensor | None, bias: Tensor | None, ch_axis: int
    ) -> Tensor:
        """Returns ``output``, ``(N, C, ...)``, or ``(..., C)`` of a linear layer, whose axis of ``C`` is ``ch_axis``.

        It holds ``gain``, a factor with ``C`` elements or one, and ``bias``, ``(C,)``, already; ``offset``, ``(C,)``,
        is the part of ``bias`` that is learned.
        """
        ctx.ch_axis = ch_axis
        ctx.save_for_backward(output, gain, bias)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        output, gain, bias = ctx.saved_tensors
        out_grad = grad
        if ctx.ch_axis == -1:
            output, out_grad = (t.reshape(-1, t.shape[-1]) for t in (output, grad))
        mean = output.new_zeros(output.shape[1]) if bias is None else bias
        if grad.device.type == 'cpu':
            # the sums of a normalisation's backward pass, which takes both of them in one pass over memory
            _, product, total = torch.ops.aten.native_batch_norm_backward(
                out_grad, output, None, None, None, mean, torch.ones_like(mean), True, 0.0, [False, True, True]
            )
        else:
            others = [axis for axis in range(output.dim()) if axis != 1]
            total = out_grad.sum(others)
            product = (out_grad * output).sum(others) - mean * total
        grad_gain = None
        if ctx.needs_input_grad[1]:
            grad_gain = (product if gain.numel() > 1 else product.sum()).reshape(gain.shape) / gain
        return grad, grad_gain, total if ctx.needs_input_grad[2] else None, None, None
