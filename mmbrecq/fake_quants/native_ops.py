"""Fake quantization of activations by the compiled kernels, where they can do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmbrecq.fake_quants.native import UNBOUNDED, Kernels, kernels, lies_as, takes
from mmbrecq.fake_quants.ops import code_bounds
from mmbrecq.qtype import QType


def native_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qtype: QType,
    keep: Tensor | None = None,
    rectifier: tuple[float, float] | None = None,
) -> Tensor | None:
    """What :class:`~mmbrecq.fake_quants.ops.FakeQuantizeFunction` computes, with the same bits; None where it cannot.

    Args:
        x (Tensor): Any shape.
        scale (Tensor): ``()``, or another shape, which it does not take.
        zero_point (Tensor): Of the same shape.
        qtype: The grid.
        keep (Tensor | None): Bytes of the shape of ``x``; the float value is passed on where they are 0.
        rectifier: Bounds of the activation function before.
    """
    if scale.dim() > 0 or not takes(x) or (keep is not None and not lies_as(keep, x)):
        return None
    bounds, native = code_bounds(zero_point, qtype), kernels()
    if bounds is None or native is None:
        return None
    call = _Call(native, scale.item(), *bounds, keep, rectifier or UNBOUNDED)
    result: Tensor = _NativeFakeQuantize.apply(x, scale, call)
    return result


@dataclass(frozen=True)
class _Call:
    """What a call needs beside the tensors that have gradients: the fewer arguments, the faster autograd is."""

    native: Kernels
    scale: float
    low: float
    high: float
    keep: Tensor | None
    rectifier: tuple[float, float]


class _NativeFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, call: _Call) -> Tensor:
        out = call.native.fake_quantize(x, call.keep, call.scale, call.low, call.high, call.rectifier)
        ctx.call = call
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (x, out), call = grads, ctx.saved_tensors, ctx.call
        if not takes(x, grad):
            grad = torch.empty_like(x).copy_(grad)
        low, high = (call.low - 0.5) * call.scale, (call.high + 0.5) * call.scale
        grad_x, change = call.native.fake_quantize_gradient(grad, x, out, call.keep, low, high, call.rectifier)
        return grad_x, torch.full((), change / call.scale) if ctx.needs_input_grad[1] else None, None
