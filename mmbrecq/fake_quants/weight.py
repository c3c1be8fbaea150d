"""Fake quantization of weights, as parametrizations of ``module.weight``.

Two phases. While a model is being quantized its weight keeps the float values and a :class:`WeightFakeQuantize` maps
them to the grid; the quantization can be switched off, since the float stream needs the float model. A finished model
holds :class:`PackedWeight`: integers, scale and zero-point alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmbrecq.fake_quants.ops import DequantizeFunction, Sigmoid, initial_alpha, soft_rounding
from mmbrecq.functional import dequantize, expand, quantize, short_scale
from mmbrecq.qtype import QType
from mmbrecq.registry import FAKE_QUANTS


class WeightFakeQuantize(nn.Module):
    """Maps a float weight to its quantized values.

    ``codes`` are the integers in force: nearest rounding after :meth:`calibrate`, whatever a subclass has learned
    after :meth:`finish`.

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
        self.gain: nn.Parameter | None = None
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
        return self.quantized(weight) if self.learned is None else self.learned

    def quantized(self, weight: Tensor) -> Tensor:
        """Returns the quantized values; same shape as ``weight``."""
        return self._values if self.gain is None else self._values * self.gain

    @property
    def _values(self) -> Tensor:
        """Real values of the codes at the present scale."""
        return dequantize(self.codes, self.scale, self.zero_point.to(self.scale.dtype), self.qtype.ch_axis)

    def start_scale(self, weight: Tensor) -> list[nn.Parameter]:
        """Begins the optimisation of a factor for each scale, and returns the parameters that are learned.

        The integers do not follow the factor: it stretches the grid under them.
        """
        ones = torch.ones_like(self.scale)
        self.gain = nn.Parameter(expand(ones, weight.dim(), self.qtype.ch_axis).clone())
        return [self.gain]

    def finish_scale(self) -> None:
        """Ends the optimisation of the scale: multiplies the factor in, and keeps 8 significant bits."""
        assert self.gain is not None
        self.scale.copy_(short_scale(self.scale * self.gain.detach().reshape(self.scale.shape)))
        self.gain = None

    def start(self, weight: Tensor) -> list[nn.Parameter]:
        """Begins the optimisation of the rounding, and returns the parameters that are learned."""
        return []

    def finish(self) -> None:
        """Ends the optimisation: fixes ``codes``."""


@FAKE_QUANTS.register_module()
class NearestRounding(WeightFakeQuantize):
    """Rounds to nearest; nothing is learned."""


@FAKE_QUANTS.register_module()
class AdaRound(WeightFakeQuantize):
    """Learns to round up or down (Nagel et al., ICML 2020).

    Args:
        qtype: The grid.
        shape: Shape of the weight.
        zeta: Upper stretch of the rectified sigmoid, > 1.
        gamma: Lower stretch, < 0.
    """

    def __init__(self, qtype: QType, shape: torch.Size, zeta: float = 1.1, gamma: float = -0.1) -> None:
        super().__init__(qtype, shape)
        self.zeta, self.gamma = zeta, gamma
        self.alpha: nn.Parameter | None = None

    def start(self, weight: Tensor) -> list[nn.Parameter]:
        scale = expand(self.scale, weight.dim(), self.qtype.ch_axis)
        offset = expand(self.zero_point.to(weight.dtype), weight.dim(), self.qtype.ch_axis)
        ratio = weight / scale
        floor = torch.floor(ratio)
        codes = floor + offset
        movable = (codes >= self.qtype.quant_min) & (codes < self.qtype.quant_max)
        self._codes_low = codes.clamp(self.qtype.quant_min, self.qtype.quant_max)
        self._movable = movable
        self._low = (self._codes_low - offset) * scale
        self._step = scale * movable
        self.alpha = nn.Parameter(initial_alpha(ratio - floor, self.zeta, self.gamma))
        return [self.alpha]

    @property
    def curve(self) -> Sigmoid:
        """The rectified sigmoid."""
        return Sigmoid(self.zeta, self.gamma)

    def line(self) -> tuple[Tensor, Tensor]:
        """Returns ``base`` and ``stride`` of :func:`soft_weight_`; same shape as the weight."""
        return self._low + self._step * self.gamma, self._step * self.curve.stretch

    def grid(self) -> Tensor:
        """Returns twice the lower integer of every weight, without zero-point, plus 1 where the upper one differs."""
        offset = expand(self.zero_point.to(self._codes_low.dtype), self._codes_low.dim(), self.qtype.ch_axis)
        return (2 * (self._codes_low - offset) + self._movable).to(torch.int16)

    @property
    def _values(self) -> Tensor:
        if self.alpha is None:
            return super()._values
        return self._low + self._step * soft_rounding(self.alpha, self.zeta, self.gamma)

    def finish(self) -> None:
        assert self.alpha is not None
        up = (soft_rounding(self.alpha.detach(), self.zeta, self.gamma) >= 0.5) & self._movable
        self.codes.copy_(self._codes_low + up)
        self.alpha = None
        del self._low, self._step, self._codes_low, self._movable


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
    if not parametrize.is_parametrized(module, 'weight'):
        return None
    parametrizations: Any = module.parametrizations
    found = parametrizations['weight'][0]
    return found if isinstance(found, WeightFakeQuantize) else None


def original_weight(module: nn.Module) -> Tensor:
    """Returns the float weight of a module that carries a :class:`WeightFakeQuantize`."""
    parametrizations: Any = module.parametrizations
    weight: Tensor = parametrizations['weight'].original
    return weight.detach()


def pack_weight(module: nn.Module) -> None:
    """Replaces the float weight of ``module`` by its integers."""
    fake_quant = weight_fake_quant(module)
    assert fake_quant is not None
    parametrize.remove_parametrizations(module, 'weight', leave_parametrized=False)
    module.weight.requires_grad_(False)
    packed = PackedWeight(fake_quant.qtype, fake_quant.codes, fake_quant.scale, fake_quant.zero_point)
    parametrize.register_parametrization(module, 'weight', packed, unsafe=True)
    del packed._initial
