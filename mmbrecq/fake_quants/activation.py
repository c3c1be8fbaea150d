"""Fake quantization of activations: modules that are called by nodes of the graph."""

import torch
from torch import Tensor, nn

from mmbrecq.errors import ExportError
from mmbrecq.fake_quants.masks import RandomMasks
from mmbrecq.fake_quants.ops import UNBOUNDED, Clip, fake_quantize
from mmbrecq.functional import short_scale
from mmbrecq.observers.base import BaseObserver
from mmbrecq.qtype import QType
from mmbrecq.registry import FAKE_QUANTS


@FAKE_QUANTS.register_module()
class FakeQuantize(nn.Module):
    """Fake quantization with a fixed, observed scale.

    Args:
        qtype: The grid.
        channels: Number of channels, where the grid has one scale per channel.
        integer_clip: Where an exported grid is cut that is smaller than its container: at the integers between Q and
            DQ, else at the real values before Q.
        full_scale: Whether the scale keeps all its bits, not 8 of them.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, qtype: QType, channels: int = 1, integer_clip: bool = True, full_scale: bool = False) -> None:
        super().__init__()
        self.qtype, self.integer_clip, self.full_scale = qtype, integer_clip, full_scale
        self.enabled = False
        self.observer: BaseObserver | None = None
        # where there are some, the float value is passed on wherever a mask has a zero
        self.masks: RandomMasks | None = None
        # whether the step size stays as observed even where this type learns it
        self.fixed = False
        # of what is observed, and of the grid by that
        self.bounds = UNBOUNDED
        # bounds of the activation function that a unit in training leaves to its quantizer
        self.rectifier: tuple[float, float] | None = None
        shape = () if qtype.ch_axis is None else (channels,)
        self._register_scale(torch.ones(shape))
        self.register_buffer('zero_point', torch.zeros(shape, dtype=qtype.container))

    def _register_scale(self, scale: Tensor) -> None:
        self.register_buffer('scale', scale)

    def set_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Sets the scale, to the bits that it keeps, and the zero-point, both ``()`` or ``(C,)``."""
        with torch.no_grad():
            self.scale.copy_(scale if self.full_scale else short_scale(scale))
            self.zero_point.copy_(zero_point)

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.observe(x.detach() if self.bounds == UNBOUNDED else x.detach().clamp(*self.bounds))
        if not self.enabled:
            return x
        clip = keep = None
        if torch.onnx.is_in_onnx_export():
            clip = self._clip()
        elif self.masks is not None and torch.is_grad_enabled():
            keep = self.masks.draw(x)
        return fake_quantize(x, self.scale, self.zero_point, self.qtype, clip, keep, self.rectifier)

    def _clip(self) -> Clip | None:
        """Returns the cut that an export needs, None where the bounds of the container are the grid's."""
        qtype, info = self.qtype, torch.iinfo(self.qtype.container)
        if (qtype.quant_min, qtype.quant_max) == (info.min, info.max):
            return None
        bounds = torch.tensor([qtype.quant_min, qtype.quant_max])
        if self.integer_clip:
            low, high = bounds.to(qtype.container).unbind()
        else:
            if qtype.ch_axis is not None:
                raise ExportError('expected a grid per tensor below 8 bits to export, but got one per channel')
            low, high = ((bounds - int(self.zero_point)) * self.scale.detach().cpu()).unbind()
        return low.clone(), high.clone()


@FAKE_QUANTS.register_module()
class LSQ(FakeQuantize):
    """Learned step size (Esser et al., ICLR 2020): the scale is a parameter, trained by the reconstruction.

    Adam, which trains it, is invariant to the gradient scale of the paper, so none is applied.
    """

    def _register_scale(self, scale: Tensor) -> None:
        self.scale = nn.Parameter(scale, requires_grad=False)
