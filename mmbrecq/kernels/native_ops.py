"""Fake quantization of activations by the compiled kernels, where they can do it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmbrecq.fake_quants.masks import Mask
from mmbrecq.fake_quants.ops import code_bounds
from mmbrecq.kernels.native import UNBOUNDED, Kernels, kernels, takes
from mmbrecq.qtype import QType


def native_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qtype: QType,
    keep: Mask | None = None,
    rectifier: tuple[float, float] | None = None,
) -> Tensor | None:
    """What :class:`~mmbrecq.fake_quants.ops.FakeQuantizeFunction` computes, with the same bits; None where it cannot.

    Args:
        x (Tensor): Any shape.
        scale (Tensor): ``()``, or another shape, which it does not take.
        zero_point (Tensor): Of the same shape.
        qtype: The grid.
        keep: The float value is passed on where it is 0.
        rectifier: Bounds of the activation function before.
    """
    if scale.dim() > 0 or not takes(x):
        return None
    bounds, native = code_bounds(zero_point, qtype), kernels()
    if bounds is None or native is None:
        return None
    result: Tensor = _NativeFakeQuantize.apply(x, scale, (native, scale.item(), *bounds, keep, rectifier or UNBOUNDED))
    return result


Call = tuple[Kernels, float, float, float, Mask | None, tuple[float, float]]
"""What a call needs beside the tensors that have gradients: the fewer arguments, the faster autograd is."""


class _NativeFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, call: Call) -> Tensor:
        native, size, low, high, keep, rectifier = call
        out = native.fake_quantize(x, None if keep is None else keep.address, size, low, high, rectifier)
        ctx.call = call
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (x, out) = grads, ctx.saved_tensors
        native, size, low, high, keep, rectifier = ctx.call
        if not takes(x, grad):
            grad = torch.empty_like(x).copy_(grad)
        place = None if keep is None else keep.address
        low, high = (low - 0.5) * size, (high + 0.5) * size
        grad_x, change = native.fake_quantize_gradient(grad, x, out, place, low, high, rectifier)
        return grad_x, torch.full((), change / size) if ctx.needs_input_grad[1] else None, None
