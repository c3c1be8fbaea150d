"""Supervision of units by what their errors do behind them: to the outputs of the float rest of the network."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from mmbrecq.data.groups import batches_of
from mmbrecq.distributed import mean_over
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.quantizers.quantized_model import QuantizedGraph
from mmbrecq.reconstruction.batches import UnitData, UnitLoss
from mmbrecq.reconstruction.low_rank import low_rank_weights
from mmbrecq.reconstruction.streams import Streams
from mmbrecq.reconstruction.values import CachedValues


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


@dataclass
class Supervision:
    """Gives the losses of units what the float network behind them tells.

    The float outputs of the network are computed when they are first needed, and kept to the end of the pass; all else
    that the rest reads is in the float stream, since the units behind read it.

    Args:
        streams: The activations of a pass.
        rank: Errors whose responses the loss weighs by; 0 for none.
        weight: How much the distance of the outputs counts beside the loss of the unit; 0 for not at all.
        share: Fraction of the images of a batch on which it is computed.
    """

    streams: Streams
    rank: int
    weight: float
    share: float

    @cached_property
    def _outputs(self) -> dict[str, CachedValues]:
        """The float outputs of the network by name, each ``(N, ...)``."""
        (network,) = self.streams.graph.cut('net')
        found = self.streams.run(network, [self.streams.images], weights=False, activations=False)
        return dict(zip(network.outputs, found, strict=True))

    @cached_property
    def _powers(self) -> dict[str, float]:
        """The mean power of each output per image; none where the one output is scores of classes."""
        if [len(value[:1].shape) for value in self._outputs.values()] == [2]:
            return {}
        totals = dict.fromkeys(self._outputs, 0.0)
        for name, value in self._outputs.items():
            for index in batches_of(value, self.streams.batch_size):
                totals[name] += float(value[index].double().square().sum())
        return {name: max(mean_over(total, len(self.streams.images)), 1e-12) for name, total in totals.items()}

    def rest(self, unit: ReconstructionUnit) -> Rest:
        """Returns the network behind ``unit``, without the units that no output needs that depends on it."""
        units = self.streams.units
        later = units[next(i for i, other in enumerate(units) if other is unit) + 1 :]
        reached = set(unit.outputs)
        for other in later:
            if reached & set(other.inputs):
                reached |= set(other.outputs)
        outputs = [name for name in self._outputs if name in reached]
        needed: list[ReconstructionUnit] = []
        read = set(outputs)
        for other in reversed(later):
            if read & set(other.outputs):
                needed.insert(0, other)
                read |= set(other.inputs)
        beside = sorted(read - {name for other in (unit, *needed) for name in other.outputs})
        powers = [self._powers[name] for name in outputs if self._powers]
        return Rest(self.streams.graph, needed, unit.outputs, beside, outputs, powers)

    def add_to(
        self,
        data: UnitData[Any],
        unit: ReconstructionUnit,
        loss: UnitLoss,
        plain: UnitLoss,
        outputs: Sequence[CachedValues],
        activations: bool,
    ) -> tuple[UnitData[Any], UnitLoss]:
        """Returns the data with what the loss of a unit needs of the network behind it, and the loss.

        ``plain`` is the loss of a unit on which no output depends, if ``loss`` weighs by responses; ``outputs`` are the
        unit's quantized ones, and ``activations`` tells whether the pass quantizes activations.
        """
        rest = self.rest(unit) if self.rank or self.weight else None
        if rest is None or not rest.outputs:
            return data, plain if self.rank else loss
        streams, size, fisher = self.streams, self.streams.batch_size, data.fisher
        beside, targets = [streams.float_values[name] for name in rest.beside], [self._outputs[n] for n in rest.outputs]
        with_rest = replace(data, beside=beside, network_outputs=targets)
        if self.rank:
            runs = [outputs]
            # without activations the last two are one
            for quantized in list(dict.fromkeys((activations, False)))[: self.rank - 1]:
                runs.append(streams.run(unit, data.float_inputs, weights=True, activations=quantized))
            fisher = low_rank_weights(with_rest, rest.distance, runs, streams.cache, streams.micro_batches(unit))
        term = partial(rest.term, weight=1.0)
        data, with_rest = replace(data, fisher=fisher), replace(with_rest, fisher=fisher, term=term)
        if not self.weight:
            return data, loss
        of_unit = data.mean_loss(outputs, loss, size)
        behind = with_rest.mean_loss(outputs, loss, size) - of_unit
        weight = self.weight * of_unit / behind if behind > 0 else 0.0
        return replace(with_rest, term=partial(rest.term, weight=weight, share=self.share)), loss
