"""The float and the quantized activations, carried forward from unit to unit."""

from collections.abc import Sequence
from functools import partial

import torch

from mmbrecq.data.groups import batches_of
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.quantizers.quantized_model import QuantizedGraph
from mmbrecq.reconstruction.batches import MicroBatches
from mmbrecq.reconstruction.cache import ActivationCache, last_readers
from mmbrecq.reconstruction.values import CachedValues, Values, memory_format


class Streams:
    """Two activation streams over all calibration images.

    Caching a unit costs one pass over that unit in each stream, whatever its depth: its inputs are the cached outputs
    of the units before it.

    Args:
        inputs: What the network reads: preprocessed images, ``(N, 3, H, W)``, or features of regions.
        quantized_inputs: What it reads in the quantized stream, where that is not the same.
        first: Number of the first input among those of all processes; None where they have no common order.
    """

    def __init__(
        self,
        graph: QuantizedGraph,
        units: Sequence[ReconstructionUnit],
        inputs: Values,
        cache: ActivationCache,
        batch_size: int,
        quantized_inputs: Values | None = None,
        first: int | None = 0,
    ) -> None:
        self.first = first
        self.images, self._batches = inputs, batches_of(inputs, batch_size, first)
        self.graph, self.units, self.cache = graph, units, cache
        name = next(n.name for n in graph.traced.graph.nodes if n.op == 'placeholder')
        self.float_values: dict[str, Values] = {name: inputs}
        self.quantized_values: dict[str, Values] = {name: inputs if quantized_inputs is None else quantized_inputs}
        self._last = last_readers(units)
        # an iteration reads inputs in two streams, targets once: the unit that reads a value decides
        self._layouts: dict[str, torch.memory_format] = {}
        for unit in units:
            for value in unit.inputs:
                self._layouts.setdefault(value, memory_format(unit.module))
        self.batch_size = min(batch_size, len(inputs))
        self._fitting: dict[str, MicroBatches] = {}

    def float_inputs(self, unit: ReconstructionUnit) -> list[Values]:
        """Returns the inputs of ``unit`` in the float stream, each ``(N, ...)``."""
        return [self.float_values[name] for name in unit.inputs]

    def quantized_inputs(self, unit: ReconstructionUnit) -> list[Values]:
        """Returns the inputs of ``unit`` in the quantized stream, each ``(N, ...)``."""
        return [self.quantized_values[name] for name in unit.inputs]

    def run(
        self, unit: ReconstructionUnit, inputs: Sequence[Values], weights: bool, activations: bool
    ) -> list[CachedValues]:
        """Computes the outputs of ``unit`` for all images, each ``(N, ...)``, with the given quantization."""
        outputs: list[CachedValues] = []

        def write(batch: slice, images: int) -> None:
            for start in range(batch.start, batch.stop, images):
                part = slice(start, min(start + images, batch.stop))
                results = unit.module(*[x[part] for x in inputs])
                if not outputs:
                    for name, result in zip(unit.outputs, results, strict=True):
                        shape = len(self.images), *result.shape[1:]
                        layout = self._layouts.get(name, torch.contiguous_format)
                        outputs.append(self.cache.allocate(shape, layout, self.images))
                for output, result in zip(outputs, results, strict=True):
                    output.write(start, result)

        fitting = self.micro_batches(unit)
        with torch.no_grad(), self.graph.quantization(weights, activations):
            for batch in self._batches:
                fitting.run(partial(write, batch))
        return outputs

    def observe(self, unit: ReconstructionUnit, size: int) -> None:
        """Passes the quantized inputs of ``unit`` through it, with quantized weights, while observers watch.

        What they make of values depends on the ``size`` of a batch, so it is that of the calibration.
        """
        inputs = self.quantized_inputs(unit)
        with torch.no_grad(), self.graph.quantization(weights=True, activations=False):
            for batch in batches_of(self.images, size, self.first):
                unit.module(*[x[batch] for x in inputs])

    def micro_batches(self, unit: ReconstructionUnit) -> MicroBatches:
        """Returns how many images a unit computes at once in a pass."""
        return self._fitting.setdefault(unit.name, MicroBatches(unit.name, self.batch_size))

    def advance(self, index: int, float_outputs: Sequence[Values], quantized_outputs: Sequence[Values]) -> None:
        """Hands the outputs of unit ``index`` on and frees what no later unit reads."""
        unit = self.units[index]
        self.float_values.update(zip(unit.outputs, float_outputs, strict=True))
        self.quantized_values.update(zip(unit.outputs, quantized_outputs, strict=True))
        for values in (self.float_values, self.quantized_values):
            for name in [n for n in values if self._last.get(n, -1) <= index]:
                del values[name]
