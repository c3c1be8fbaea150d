"""Computes what the error of a unit does behind it: the float rest of the network, and the distance of its outputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.quantizers.quantized_model import QuantizedGraph


@dataclass(frozen=True)
class Rest:
    """The float network behind a unit.

    Args:
        graph: The graph, whose switches are off while the rest computes.
        units: Those that the outputs need behind the unit, in the order of execution.
        inputs: Names of the outputs of the unit.
        beside: Names of the other values that the rest reads.
        outputs: Names of the outputs of the network that depend on the unit.
        powers: For each, its mean power per image; empty for scores of classes, one output ``(N, C)``.
    """

    graph: QuantizedGraph
    units: Sequence[ReconstructionUnit]
    inputs: Sequence[str]
    beside: Sequence[str]
    outputs: Sequence[str]
    powers: Sequence[float]

    def __call__(self, inputs: Sequence[Tensor], beside: Sequence[Tensor]) -> list[Tensor]:
        """Returns the outputs of the network for given outputs of the unit, and float values of the same images."""
        values = dict(zip((*self.inputs, *self.beside), (*inputs, *beside), strict=True))
        with self.graph.quantization(weights=False, activations=False):
            for unit in self.units:
                values.update(zip(unit.outputs, unit.module(*[values[name] for name in unit.inputs]), strict=True))
        return [values[name] for name in self.outputs]

    def distance(self, inputs: Sequence[Tensor], beside: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Returns the distance of the outputs from the float ones ``targets``, a mean over the images.

        For scores of classes it is the divergence ``KL(float || found)`` of their softmax, else the sum over the
        outputs of their squared error over their power.
        """
        found = self(inputs, beside)
        if not self.powers:
            wanted = F.log_softmax(targets[0], 1)
            return F.kl_div(F.log_softmax(found[0], 1), wanted, reduction='batchmean', log_target=True)
        rows = zip(found, targets, self.powers, strict=True)
        return sum(((o - t).square().sum() / (len(t) * power) for o, t, power in rows), found[0].new_zeros(()))

    def term(self, *values: Sequence[Tensor], weight: float, share: float = 1.0) -> Tensor:
        """Returns ``weight`` times the distance, of the first images of a batch alone, a ``share`` of it in (0, 1]."""
        count = math.ceil(share * len(values[0][0]))
        return weight * self.distance(*([x[:count] for x in xs] for xs in values))
