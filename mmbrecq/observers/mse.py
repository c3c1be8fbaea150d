"""The search for the scale and zero-point that lose least, and the observer that uses it.

Every function takes ``rows`` of shape ``(R, N)``, one row per scale to find: the channels of a weight, or one row for
a whole tensor. Values are exact, or bins of a histogram with ``counts`` as weights. Rows and candidates are searched
together, in blocks; no loop runs over channels.

The candidates are those of BRECQ (Li et al., ICLR 2021; reference code, ``quant_layer.py``): the range ``[low, high]``
times ``1 - 0.01 * i``, ``i`` in ``0 .. 79``.
"""

import torch
from torch import Tensor

from mmbrecq.building import check_integer, check_number
from mmbrecq.functional import affine_from_range
from mmbrecq.observers.histogram import DistributionObserver
from mmbrecq.qtype import QType
from mmbrecq.registry import OBSERVERS

# The linear candidates end here, as the reference's do with 80 steps; a geometric tail serves heavy outliers.
LINEAR_END = 0.2
TAIL_RATIO = 0.8
TAIL_STEPS = 8
# The best scale for a handful of values may exceed max|x| / quant_max on a signed symmetric grid.
SYMMETRIC_START = 1.2
# From this row length on the loss is smooth enough to look at every fourth candidate before refining.
SMOOTH_LENGTH, SMOOTH_STRIDE = 128, 4
# Rows whose ends differ gain from moving one end alone, which moves the zero-point by one.
SHIFT_FACTORS = (0.8, 0.9, 1.0, 1.1, 1.25)
# Each refinement looks at these fractions of the distance between candidates, then the distance shrinks to a quarter.
REFINEMENTS, FRACTIONS = 2, (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75)
# Values times candidates in one pass: on a CPU as many as stay in its cache, which halves the time of a large layer.
CPU_BLOCK, DEVICE_BLOCK = 2**18, 2**24


def range_factors(steps: int, length: int, qtype: QType) -> list[float]:
    """Returns the multipliers of the range in falling order, 1 among them.

    There are ``steps`` linear ones between 1 and 0.2; 80 give the reference's spacing of 0.01. Rows of more values than
    128, ``length``, get every fourth; shorter ones on a symmetric signed grid start at 1.2.
    """
    spacing = (1 - LINEAR_END) / steps
    tail = [LINEAR_END * TAIL_RATIO**i for i in range(TAIL_STEPS)]
    if length >= SMOOTH_LENGTH:
        return ([1 - i * spacing for i in range(steps)] + tail)[::SMOOTH_STRIDE]
    above = round((SYMMETRIC_START - 1) / spacing) if qtype.symmetric and qtype.signed else 0
    return [1 - i * spacing for i in range(-above, steps)] + tail


def power_loss(
    rows: Tensor, scale: Tensor, zero_point: Tensor, qtype: QType, p: float, counts: Tensor | None = None
) -> Tensor:
    """Returns ``sum |x - q(x)|^p`` of every row, weighted by ``counts``.

    Args:
        rows (Tensor): ``(R, N)`` values.
        scale (Tensor): ``(R,)``, or ``(K, R)`` for ``K`` candidates at once.
        zero_point (Tensor): Same shape.
        qtype: The grid; its ``ch_axis`` is not read.
        p: Exponent, above 0.
        counts (Tensor, optional): ``(R, N)`` weights of the values.

    Returns:
        Tensor: Same shape as ``scale``, in float64, so that large values raised to ``p`` stay finite.
    """
    # |x - q(x)| = scale * |y - clamp(round(y))| with y = x / scale: two passes less than dequantizing, and in place.
    y = rows / scale[..., None]
    grid = torch.round(y)
    if qtype.symmetric:
        grid.clamp_(qtype.quant_min, qtype.quant_max)
    else:
        bounds = qtype.quant_min - zero_point[..., None], qtype.quant_max - zero_point[..., None]
        torch.clamp(grid, *bounds, out=grid)
    error = y.sub_(grid).abs_()
    if p == 2:
        error.square_()
    elif p != 1:
        # A third of the time of pow; log(0) is -inf and comes back as 0.
        error.log_().mul_(p).exp_()
    if counts is not None:
        error.mul_(counts)
    return error.sum(dim=-1).double() * scale.double() ** p


class _RowSearch:
    """The least loss of every row so far, and the scale, zero-point and spacing that gave it; each ``(R,)``."""

    def __init__(self, rows: Tensor, qtype: QType, p: float, counts: Tensor | None) -> None:
        self.rows, self.qtype, self.p, self.counts = rows, qtype, p, counts
        self.loss = torch.full((rows.shape[0],), torch.inf, dtype=torch.float64, device=rows.device)
        self.scale = rows.new_ones(rows.shape[0])
        self.zero_point = rows.new_zeros(rows.shape[0])
        self.spacing = rows.new_zeros(rows.shape[0])

    def offer(self, scale: Tensor, zero_point: Tensor, spacing: Tensor) -> None:
        """Keeps the candidates ``(K, R)`` that lose less, with the distance to the next one relative to the scale."""
        size = max(1, _block(self.rows) // self.rows.numel())
        for candidates in zip(*(torch.split(v, size) for v in (scale, zero_point, spacing)), strict=True):
            loss = power_loss(self.rows, candidates[0], candidates[1], self.qtype, self.p, self.counts)
            least, index = loss.min(dim=0)
            better = least < self.loss
            self.loss = torch.where(better, least, self.loss)
            for name, values in zip(('scale', 'zero_point', 'spacing'), candidates, strict=True):
                found = values.gather(0, index[None])[0]
                setattr(self, name, torch.where(better, found, getattr(self, name)))

    def shrink(self, low: Tensor, high: Tensor, factors: list[float]) -> None:
        """Offers the ranges ``[low, high]`` times ``factors``."""
        factor = torch.tensor(factors, dtype=low.dtype, device=low.device)[:, None]
        following = torch.cat([factor[1:], factor[-1:] * TAIL_RATIO])
        scale, zero_point = affine_from_range(low * factor, high * factor, self.qtype)
        self.offer(scale, zero_point, (1 - following / factor).expand_as(scale))

    def shift(self) -> None:
        """Offers the neighbouring zero-points, with scales around the best one."""
        factor = self.scale.new_tensor(SHIFT_FACTORS)[:, None]
        scale = torch.cat([self.scale * factor] * 2)
        step = torch.ones_like(scale)
        step[: len(SHIFT_FACTORS)] = -1
        zero_point = (self.zero_point + step).clamp(self.qtype.quant_min, self.qtype.quant_max)
        self.offer(scale, zero_point, self.spacing.clamp(min=0.1).expand_as(scale))

    def refine(self) -> None:
        """Offers scales between the best candidate and its neighbours."""
        fraction = self.scale.new_tensor(FRACTIONS)[:, None]
        for _ in range(REFINEMENTS):
            scale = self.scale * (1 + fraction * self.spacing)
            self.offer(scale, self.zero_point.expand_as(scale), self.spacing.expand_as(scale))
            self.spacing = self.spacing / 4


def mse_search(
    rows: Tensor, low: Tensor, high: Tensor, qtype: QType, p: float = 2.4, steps: int = 80, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Finds the scale and zero-point of every row that minimise ``sum |x - q(x)|^p``.

    Short rows see all candidates, long ones every fourth; both are refined between the candidates, and asymmetric
    grids also at the neighbouring zero-points.

    Args:
        rows (Tensor): ``(R, N)`` finite values.
        low (Tensor): ``(R,)`` smallest value of every row.
        high (Tensor): ``(R,)`` largest value of every row.
        qtype: The grid; its ``ch_axis`` is not read.
        p: Exponent of the error, above 0.
        steps: Number of linear steps of the range, at least 1.
        counts (Tensor, optional): ``(R, N)`` weights of the values.

    Returns:
        ``(scale, zero_point)``, each ``(R,)``; ``scale > 0`` and finite.
    """
    factors = range_factors(steps, rows.shape[1], qtype)
    size = max(1, _block(rows) // rows.shape[1])
    scales, zero_points = [], []
    for first in range(0, rows.shape[0], size):
        part = slice(first, first + size)
        search = _RowSearch(rows[part], qtype, p, None if counts is None else counts[part])
        search.shrink(low[part], high[part], factors)
        if not qtype.symmetric:
            search.shift()
        search.refine()
        scales.append(search.scale)
        zero_points.append(search.zero_point)
    return torch.cat(scales), torch.cat(zero_points)


def _block(rows: Tensor) -> int:
    """Returns the number of values to work on at once on the device of ``rows``."""
    return CPU_BLOCK if rows.device.type == 'cpu' else DEVICE_BLOCK


@OBSERVERS.register_module()
class MSEObserver(DistributionObserver):
    """Chooses the scale and zero-point with the least ``sum |x - q(x)|^p``; see :func:`mse_search`.

    Args:
        qtype: The grid, per tensor or (for a single batch, as a weight is) per channel.
        p: Exponent of the error, above 0; BRECQ uses 2.4.
        steps: Number of linear steps by which the range shrinks to a fifth, at least 1.
        bins: Number of bins of the histogram that many batches go into, at least 2,048.
    """

    def __init__(self, qtype: QType, p: float = 2.4, steps: int = 80, bins: int = 8192) -> None:
        check_number(p, '(0, inf)', 'p of MSEObserver')
        check_integer(steps, 1, 'steps of MSEObserver')
        super().__init__(qtype, bins)
        self.p, self.steps = p, steps

    def _solve(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.values is not None:
            return mse_search(self.values, low, high, self.qtype, self.p, self.steps)
        filled = self.histogram.counts.nonzero().squeeze(1)
        centers = self.histogram.centers(low.dtype)[filled]
        counts = self.histogram.counts[filled].to(low.dtype)
        return mse_search(centers[None], low, high, self.qtype, self.p, self.steps, counts[None])
