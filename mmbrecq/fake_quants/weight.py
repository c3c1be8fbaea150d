"""Fake quantization of weights, as parametrizations of ``module.weight``.

Two phases. While a model is being quantized its weight keeps the float values and a :class:`WeightFakeQuantize` maps
them to the grid; the quantization can be switched off, since the float stream needs the float model. A finished model
holds :class:`PackedWeight`: integers, scale and zero-point alone.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmbrecq.fake_quants.ops import DequantizeFunction, Sigmoid
from mmbrecq.functional import dequantize, quantize, short_scale
from mmbrecq.qtype import QType
from mmbrecq.registry import FAKE_QUANTS

T = TypeVar('T')


class WeightFakeQuantize(nn.Module):
    """Maps a float weight to its quantized values.

    ``codes`` are the integers in force: nearest rounding after :meth:`calibrate` or what was learned.

    Args:
        qtype: The grid.
        shape: Shape of the weight, ``(C_out, C_in, kH, kW)`` of a convolution or ``(C_out, C_in)`` of a linear layer.
    """

    scale: Tensor
    zero_point: Tensor
    codes: Tensor

    def __init__(self, qtype: QType, shape: torch.Size) -> None:
        super().__init__()
        self.qtype = qtype
        self.enabled = False
        channels = qtype.scale_shape(shape)
        self.register_buffer('scale', torch.ones(channels))
        self.register_buffer('zero_point', torch.zeros(channels, dtype=qtype.container))
        self.register_buffer('codes', torch.zeros(shape, dtype=qtype.container))
        # while something is learned: the quantized weight, which the reconstruction keeps up to date
        self.learned: Tensor | None = None

    def calibrate(self, weight: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Sets the grid, its scale to 8 significant bits, and rounds ``weight`` to nearest on it."""
        self.scale.copy_(short_scale(scale))
        self.zero_point.copy_(zero_point)
        self.codes.copy_(quantize(weight, self.scale, self.zero_point.to(weight.dtype), self.qtype))

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        return self.values if self.learned is None else self.learned

    @property
    def values(self) -> Tensor:
        """Real values of the codes, of the shape of the weight."""
        return dequantize(self.codes, self.scale, self.zero_point.to(self.scale.dtype), self.qtype.ch_axis)


@FAKE_QUANTS.register_module()
class NearestRounding(WeightFakeQuantize):
    """Rounds to nearest; nothing is learned."""


@FAKE_QUANTS.register_module()
class AdaRound(WeightFakeQuantize):
    """Learns to round up or down (Nagel et al., ICML 2020), in a reconstruction.

    Args:
        qtype: The grid.
        shape: Shape of the weight.
        zeta: Upper stretch of the rectified sigmoid, > 1.
        gamma: Lower stretch, < 0.
    """

    def __init__(self, qtype: QType, shape: torch.Size, zeta: float = 1.1, gamma: float = -0.1) -> None:
        super().__init__(qtype, shape)
        self.curve = Sigmoid(zeta, gamma)


@FAKE_QUANTS.register_module()
class StraightThrough(WeightFakeQuantize):
    """Learns the weight itself, in a reconstruction, by gradients that pass rounding as if it were not there.

    That is how step sizes and weights are learned together in LSQ (Esser et al., ICLR 2020). A weight may move by more
    than one step of its grid.
    """


class PackedWeight(nn.Module):
    """A parametrization whose originals are ``(codes, scale, zero_point)``: what a deployed model stores."""

    def __init__(self, qtype: QType, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.qtype = qtype
        self._initial = (codes.clone(), scale.clone(), zero_point.clone())

    def right_inverse(self, weight: Tensor) -> Sequence[Tensor]:
        return self._initial

    def forward(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return DequantizeFunction.apply(codes, scale, zero_point, self.qtype.ch_axis)


def weight_fake_quant(module: nn.Module) -> WeightFakeQuantize | None:
    """Returns the fake quantizer of ``module.weight``, None where the weight is float or packed."""
    return find_parametrization(module, 'weight', WeightFakeQuantize)


def find_parametrization(module: Any, name: str, kind: type[T]) -> T | None:
    """Returns the parametrization of a tensor of a module, None where it has none of this kind."""
    found = module.parametrizations[name][0] if parametrize.is_parametrized(module, name) else None
    return found if isinstance(found, kind) else None


def original_weight(module: nn.Module) -> Tensor:
    """Returns the float weight of a module that carries a :class:`WeightFakeQuantize`."""
    return original(module, 'weight')


def original(module: Any, name: str) -> Tensor:
    """Returns a tensor of a module, without its parametrization where it has one; it shares the tensor's memory."""
    own = module.parametrizations[name].original if parametrize.is_parametrized(module, name) else getattr(module, name)
    return own.detach()


def set_original(module: Any, name: str, value: Tensor) -> None:
    """Sets the tensor that :func:`original` returns; another module that shared the old one keeps it."""
    parametrized = parametrize.is_parametrized(module, name)
    owner, key = (module.parametrizations[name], 'original') if parametrized else (module, name)
    setattr(owner, key, nn.Parameter(value, requires_grad=False))


def pack_weight(module: nn.Module) -> None:
    """Replaces the float weight of ``module`` by its integers."""
    fake_quant = weight_fake_quant(module)
    assert fake_quant is not None
    parametrize.remove_parametrizations(module, 'weight', leave_parametrized=False)
    module.weight.requires_grad_(False)
    packed = PackedWeight(fake_quant.qtype, fake_quant.codes, fake_quant.scale, fake_quant.zero_point)
    parametrize.register_parametrization(module, 'weight', packed, unsafe=True)
    del packed._initial
