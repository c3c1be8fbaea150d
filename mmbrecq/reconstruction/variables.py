"""What is optimised in a unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.fake_quants.bias import bias_correction
from mmbrecq.fake_quants.weight import AdaRound, WeightFakeQuantize, original_weight
from mmbrecq.reconstruction.schedules import constant, cosine
from mmbrecq.reconstruction.stages import Stage

Group = tuple[list[nn.Parameter], float, Callable[[float], float]]
"""Parameters, their learning rate, and its schedule."""

SMALLEST = 0.01
"""What a scale of an activation may shrink to, of what it was."""


class Variables:
    """The variables of one unit in one stage.

    Args:
        weights: Modules with a quantized weight and their fake quantizers.
        quantizers: Activation quantizers.
        stage: What is learned, and how.
    """

    def __init__(
        self, weights: Sequence[tuple[nn.Module, WeightFakeQuantize]], quantizers: Sequence[FakeQuantize], stage: Stage
    ) -> None:
        options = stage.options
        self.roundings = [fq for _, fq in weights if isinstance(fq, AdaRound)] if stage.learns_rounding else []
        alphas = [p for m, fq in weights if fq in self.roundings for p in fq.start(original_weight(m))]
        self._stretched = [fq for _, fq in weights] if options.weight_scale_lr > 0 else []
        gains = [p for m, fq in weights if fq in self._stretched for p in fq.start_scale(original_weight(m))]
        corrections = [bias_correction(m) for m, _ in weights] if options.bias_lr > 0 else []
        offsets = [correction.offset for correction in corrections if correction is not None]
        for offset in offsets:
            offset.requires_grad_(True)
        self._quantizers = list(quantizers) if stage.learns_scale else []
        scales = [p for q in self._quantizers for p in q.start()]
        groups: list[Group] = [
            (alphas, options.lr, constant),
            (gains, options.weight_scale_lr, cosine),
            (offsets, options.bias_lr, cosine),
            (scales, options.activation_lr, cosine),
        ]
        self._offsets = offsets
        self._floors = [(scale, scale.detach() * SMALLEST) for scale in scales]
        self.groups = [group for group in groups if group[0]]

    def keep_positive(self) -> None:
        """Keeps a step of the optimizer from taking a scale of an activation to 0 or below."""
        with torch.no_grad():
            for scale, floor in self._floors:
                torch.maximum(scale, floor, out=scale)

    def finish(self) -> None:
        """Fixes what was learned."""
        for rounding in self.roundings:
            rounding.finish()
        for fake_quant in self._stretched:
            fake_quant.finish_scale()
        for quantizer in self._quantizers:
            quantizer.finish()
        for offset in self._offsets:
            offset.requires_grad_(False)
            offset.grad = None
