"""The float and the quantized activations, carried forward from unit to unit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.quantizers.prepared import QuantizedModel
from mmbrecq.reconstruction.cache import ActivationCache, last_readers


class Streams:
    """Two activation streams over all calibration images.

    Caching a unit costs one pass over that unit in each stream, whatever its depth: its inputs are the cached outputs
    of the units before it.

    Args:
        model: The prepared model.
        units: Its units in the order of execution.
        inputs (Tensor): What the network reads: preprocessed images, ``(N, 3, H, W)``, or features of regions.
        cache: Where activations are kept.
        batch_size: Images per forward pass.
        quantized_inputs (Tensor | None): What it reads in the quantized stream, where that is not the same.
    """

    def __init__(
        self,
        model: QuantizedModel,
        units: Sequence[ReconstructionUnit],
        inputs: Tensor,
        cache: ActivationCache,
        batch_size: int,
        quantized_inputs: Tensor | None = None,
    ) -> None:
        self.model, self.units, self.cache, self.batch_size = model, units, cache, batch_size
        name = next(n.name for n in model.arithmetic.graph.nodes if n.op == 'placeholder')
        self.count = len(inputs)
        self.float_values: dict[str, Tensor] = {name: inputs}
        self.quantized_values: dict[str, Tensor] = {name: inputs if quantized_inputs is None else quantized_inputs}
        self._last = last_readers(units)

    def float_inputs(self, unit: ReconstructionUnit) -> list[Tensor]:
        """Inputs of ``unit`` in the float stream, each ``(N, ...)``."""
        return [self.float_values[name] for name in unit.inputs]

    def quantized_inputs(self, unit: ReconstructionUnit) -> list[Tensor]:
        """Inputs of ``unit`` in the quantized stream, each ``(N, ...)``."""
        return [self.quantized_values[name] for name in unit.inputs]

    def run(self, unit: ReconstructionUnit, inputs: Sequence[Tensor], weights: bool, activations: bool) -> list[Tensor]:
        """Outputs of ``unit`` for all images, each ``(N, ...)``, with the given quantization switched on."""
        count, device = self.count, self.cache.device
        outputs: list[Tensor] = []
        with torch.no_grad(), self.model.quantization(weights, activations):
            for start in range(0, count, self.batch_size):
                batch = [x[start : start + self.batch_size].to(device) for x in inputs]
                results = unit.module(*batch)
                if not outputs:
                    outputs = [self.cache.allocate((count, *r.shape[1:])) for r in results]
                for output, result in zip(outputs, results, strict=True):
                    output[start : start + len(result)].copy_(result)
        return outputs

    def advance(self, index: int, float_outputs: Sequence[Tensor], quantized_outputs: Sequence[Tensor]) -> None:
        """Hands the outputs of unit ``index`` on and frees what no later unit reads."""
        unit = self.units[index]
        self.float_values.update(zip(unit.outputs, float_outputs, strict=True))
        self.quantized_values.update(zip(unit.outputs, quantized_outputs, strict=True))
        for values in (self.float_values, self.quantized_values):
            for name in [n for n in values if self._last.get(n, -1) <= index]:
                del values[name]
