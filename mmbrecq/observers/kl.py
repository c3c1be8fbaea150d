"""The search for the range whose quantized distribution diverges least, and the observer that uses it."""

import torch
from torch import Tensor

from mmbrecq.building import check_integer, expect
from mmbrecq.functional import affine_from_range, quantize
from mmbrecq.observers.histogram import DistributionObserver
from mmbrecq.qtype import QType
from mmbrecq.registry import OBSERVERS

# Stands for an empty bin of the candidate distribution, whose logarithm would be infinite.
EMPTY = 1e-12


def fill_zero_bin(counts: Tensor, zero_bin: int) -> Tensor:
    """Replaces the bin that begins at 0 by the larger of its neighbours.

    The zeros that ReLU makes are exact on every grid; left in, their spike would decide the range alone (NVIDIA's
    entropy calibrator sets ``bin[0] = bin[1]`` for this reason).
    """
    neighbours = [counts[i] for i in (zero_bin - 1, zero_bin + 1) if 0 <= i < counts.numel()]
    filled = counts.clone()
    filled[zero_bin] = torch.stack(neighbours).amax()
    return filled


def kl_divergence(counts: Tensor, levels: Tensor, inside: Tensor) -> Tensor:
    """``KL(P || Q)`` of one candidate range (Migacz, 8-bit inference with TensorRT, GTC 2017).

    P holds the bins inside the range, the outliers added to its end bins; Q spreads what each level holds evenly
    over the bins of that level in which P is not empty.

    Args:
        counts (Tensor): ``(K,)`` counts, not negative.
        levels (Tensor): ``(K,)`` int64, level of every bin, from 0.
        inside (Tensor): ``(K,)`` bool, one contiguous run; the divergence is infinite when no value lies inside.
    """
    held = counts[inside]
    if held.sum() == 0:
        return torch.full_like(counts.sum(), torch.inf)
    first = int(inside.to(torch.int8).argmax())
    reference = held.clone()
    reference[0] += counts[:first].sum()
    reference[-1] += counts[first + held.numel() :].sum()
    filled = (reference > 0).to(counts.dtype)
    level = levels[inside]
    size = int(level.max()) + 1
    mass = torch.zeros(size, dtype=counts.dtype, device=counts.device).index_add_(0, level, held)
    share = torch.zeros_like(mass).index_add_(0, level, filled)
    candidate = (mass / share.clamp(min=1))[level] * filled
    reference = reference / reference.sum()
    candidate = (candidate / candidate.sum()).clamp(min=EMPTY)
    return (reference * torch.log(reference.clamp(min=EMPTY) / candidate)).sum()


def kl_search(
    centers: Tensor, counts: Tensor, low: Tensor, high: Tensor, width: float, qtype: QType, steps: int = 128
) -> tuple[Tensor, Tensor]:
    """Finds the scale and zero-point of the range with the least divergence.

    The candidates are ``[low, high]`` times ``1 - i / steps``, symmetric about 0 for symmetric signed grids, as far
    as a level is no narrower than a bin. ``low`` and ``high`` are the ends of the values; like the results they are
    ``()``.

    ``centers`` are the middles of the bins of this ``width``, rising, and ``counts`` their counts in a float dtype;
    both are ``(K,)``.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if qtype.symmetric and qtype.signed:
        high = torch.maximum(-low, high)
        low = -high
    best = affine_from_range(low, high, qtype)
    least = torch.full_like(counts.sum(), torch.inf)
    for i in range(steps):
        bottom, top = low * (1 - i / steps), high * (1 - i / steps)
        scale, zero_point = affine_from_range(bottom, top, qtype)
        if i > 0 and scale < width:
            break
        levels = (quantize(centers, scale, zero_point, qtype) - qtype.quant_min).long()
        loss = kl_divergence(counts, levels, (centers >= bottom) & (centers <= top))
        if loss < least:
            least, best = loss, (scale, zero_point)
    return best


@OBSERVERS.register_module()
class HistogramObserver(DistributionObserver):
    """Chooses the range whose quantized histogram has the least KL divergence; see :func:`kl_search`.

    Args:
        qtype: The grid, per tensor.
        bins: Number of bins of the histogram, at least 2,048; 4,096 over both signs are TensorRT's 2,048 over ``|x|``.
        steps: Number of candidate ranges, at least 1.
    """

    #: The divergence is defined on bins, so a copy of the values would not be read.
    MAX_KEPT = 0

    def __init__(self, qtype: QType, bins: int = 4096, steps: int = 128) -> None:
        expect(qtype.ch_axis is None, 'one scale per tensor, ch_axis None, for HistogramObserver', qtype.ch_axis)
        check_integer(steps, 1, 'steps of HistogramObserver')
        super().__init__(qtype, bins)
        self.steps = steps

    def _solve(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        histogram = self.histogram
        counts = fill_zero_bin(histogram.counts.to(low.dtype), histogram.zero_bin)
        centers = histogram.centers(low.dtype)
        return kl_search(centers, counts, low[0], high[0], histogram.width, self.qtype, self.steps)
