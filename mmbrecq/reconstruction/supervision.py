"""Supervision of units by what their errors do to the outputs of the network."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from mmbrecq.data.groups import batches_of
from mmbrecq.distributed import mean_over
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.reconstruction.batches import UnitData, UnitLoss
from mmbrecq.reconstruction.low_rank import low_rank_weights
from mmbrecq.reconstruction.rest import Rest
from mmbrecq.reconstruction.streams import Streams
from mmbrecq.reconstruction.values import CachedValues


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
            fisher = low_rank_weights(with_rest, rest, runs, streams.cache, streams.micro_batches(unit))
        term = partial(rest.term, weight=1.0)
        data, with_rest = replace(data, fisher=fisher), replace(with_rest, fisher=fisher, term=term)
        if not self.weight:
            return data, loss
        of_unit = data.mean_loss(outputs, loss, size)
        behind = with_rest.mean_loss(outputs, loss, size) - of_unit
        weight = self.weight * of_unit / behind if behind > 0 else 0.0
        return replace(with_rest, term=partial(rest.term, weight=weight, share=self.share)), loss
