"""Computes uniform affine quantization in pure functions.

The grid is ``x_hat = (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale``
(Jacob et al., CVPR 2018, eq. 1; rounding is half to even, as ONNX's QuantizeLinear has it).
"""

import torch
from torch import Tensor

from mmbrecq.qtype import QType


def expand(values: Tensor, dim: int, ch_axis: int | None) -> Tensor:
    """Gives per-channel ``values`` of shape ``(C,)`` the shape ``(1, .., C, .., 1)`` of ``dim`` axes."""
    if ch_axis is None:
        return values
    return values.reshape([-1 if i == ch_axis else 1 for i in range(dim)])


def short_scale(scale: Tensor) -> Tensor:
    """Returns the nearest scale with 8 significant bits, as bfloat16 has them; same shape and dtype.

    A product of two such scales has 16 of float32's 24 bits. A sum of products of low-bit integers, up to 256 in
    value, fits the rest, and is then exact in any order of addition. Otherwise its last bit depends on the order, and
    moves some values to the other side of a rounding boundary.
    """
    return scale.bfloat16().to(scale.dtype)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType) -> Tensor:
    """Returns the integers of ``x`` on the grid, in the dtype of ``x``; same shape as ``x``."""
    s, z = expand(scale, x.dim(), qtype.ch_axis), expand(zero_point, x.dim(), qtype.ch_axis)
    return torch.clamp(torch.round(x / s) + z, qtype.quant_min, qtype.quant_max)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, ch_axis: int | None) -> Tensor:
    """Returns ``(q - zero_point) * scale`` in the dtype of ``scale``; same shape as ``q``."""
    s, z = expand(scale, q.dim(), ch_axis), expand(zero_point, q.dim(), ch_axis)
    return (q.to(s.dtype) - z) * s


def affine_from_range(low: Tensor, high: Tensor, qtype: QType) -> tuple[Tensor, Tensor]:
    """Returns scale and zero-point of the grid that covers ``[low, high]`` and represents 0 exactly.

    Args:
        low (Tensor): Smallest real value, ``()`` or ``(C,)``.
        high (Tensor): Largest real value, same shape.
        qtype: The grid.

    Returns:
        ``(scale, zero_point)``, float tensors of the same shape; ``scale > 0``, ``zero_point`` integral.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if not qtype.symmetric:
        scale = (high - low) / (qtype.quant_max - qtype.quant_min)
    elif qtype.signed:
        scale = torch.maximum(-low / -qtype.quant_min, high / qtype.quant_max)
    else:
        scale = high / qtype.quant_max
    scale = scale.clamp(min=torch.finfo(scale.dtype).eps)
    if qtype.symmetric:
        return scale, torch.zeros_like(low)
    return scale, (qtype.quant_min - torch.round(low / scale)).clamp(qtype.quant_min, qtype.quant_max)


def shared_affine_from_range(low: Tensor, high: Tensor, qtype: QType) -> tuple[Tensor, Tensor]:
    """Returns scales of channels that share their zero-point, see :func:`affine_from_range`; both are ``(C,)``.

    The zero-point minimises the sum of squared scales, each relative to the scale of its channel alone. No scale is
    below 2^-16 of the largest, since other numbers are divided by it.
    """
    alone, zero_point = affine_from_range(low, high, qtype)
    floor = alone.max() * 2.0**-16
    if not qtype.symmetric:
        low, high, alone = low.clamp(max=0), high.clamp(min=0), alone.maximum(floor)
        offsets = torch.arange(qtype.levels, device=low.device, dtype=low.dtype)[:, None]
        # 0 / 0 where neither the channel nor the grid has values on that side
        scales = torch.maximum(
            (-low / offsets).nan_to_num(0, torch.inf), (high / offsets.flip(0)).nan_to_num(0, torch.inf)
        )
        best = (scales / alone).square().sum(1).argmin()
        alone, zero_point = scales[best], torch.full_like(low, float(best) + qtype.quant_min)
    return alone.maximum(floor), zero_point
