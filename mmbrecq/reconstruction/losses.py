"""Distances between the quantized and the float output of a unit."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mmbrecq.registry import LOSSES


@LOSSES.register_module()
class MSELoss:
    """Squared error, summed over channels (axis 1) and averaged over all other axes.

    The sum over channels is the reference implementation's; the weight of the rounding regulariser is meant for it.
    """

    needs_fisher = False

    def __call__(self, output: Tensor, target: Tensor, fisher: Tensor | None = None) -> Tensor:
        """Returns a scalar.

        Args:
            output (Tensor): ``(N, C, ...)`` quantized.
            target (Tensor): Same shape, float.
            fisher (Tensor | None): Not used.
        """
        return F.mse_loss(output, target) * output.shape[1]


@LOSSES.register_module()
class FisherLoss:
    """Squared error weighted by the diagonal of the Fisher information (Li et al., ICLR 2021, eq. 10).

    The weight of an output element is the squared gradient of the task loss at it, per image, normalised to mean 1
    over the calibration set so that the scale is that of :class:`MSELoss`.

    Args:
        floor: Weight that every element has at least, in [0, 1]; the rest of the unit mean is the gradient's.
            0 is the paper's loss.
    """

    needs_fisher = True

    def __init__(self, floor: float = 0.0) -> None:
        self.floor = floor

    def __call__(self, output: Tensor, target: Tensor, fisher: Tensor | None = None) -> Tensor:
        """Returns a scalar; ``fisher`` has the shape of ``output`` and mean 1."""
        assert fisher is not None
        weight = self.floor + (1 - self.floor) * fisher
        return ((output - target).square() * weight).sum(1).mean()
