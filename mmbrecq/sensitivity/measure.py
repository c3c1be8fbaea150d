"""How far quantized layers take the outputs of a network from the float ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from mmbrecq.distributed import gather, mean_over
from mmbrecq.fake_quants.bias import bias_correction
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.quantizers.prepared import QuantizedModel

BATCH = 64
"""Images per pass."""


@contextmanager
def quantizing(model: QuantizedModel, layers: Collection[str]) -> Iterator[None]:
    """Quantizes the weights of ``layers`` alone; all else is float, and as it was afterwards."""
    with model.quantization(weights=False, activations=False):
        for name, module, fake_quant in model.weights():
            if name in layers:
                fake_quant.enabled = True
                correction = bias_correction(module)
                if correction is not None:
                    correction.enabled = True
        yield


class OutputLoss:
    """Distance of the outputs of a graph from its float outputs, over given inputs.

    For scores of classes, one output ``(N, C)``, it is the mean divergence ``KL(float || quantized)`` of their softmax.
    For maps it is the sum over the outputs of the mean square of their errors, each over the mean square of the float
    output: scores and box offsets differ in scale.

    Args:
        model: The prepared graph.
        inputs (Tensor): ``(N, ...)`` images, or features of regions; of several processes each has its own.
    """

    def __init__(self, model: QuantizedModel, inputs: Tensor) -> None:
        self._model, self._inputs = model, inputs
        with model.quantization(weights=False, activations=False):
            self._targets = list(self._outputs())
        outputs = self._targets[0]
        self.kind = 'divergence' if len(outputs) == 1 and outputs[0].dim() == 2 else 'distance'
        own = [float(sum(batch[i].square().sum() for batch in self._targets)) for i in range(len(outputs))]
        self._power = [sum(parts) for parts in zip(*gather(own), strict=True)]

    def of(self, layers: Collection[str], quantizers: Collection[str] = ()) -> float:
        """The loss with the weights of ``layers`` and activations of ``quantizers`` quantized, all else in float."""
        total = 0.0
        with quantizing(self._model, layers):
            for path in quantizers:
                self._model.quantizers[path].enabled = True
            for outputs, targets in zip(self._outputs(), self._targets, strict=True):
                total += self._batch_loss(outputs, targets)
        return mean_over(total, len(self._inputs)) if self.kind == 'divergence' else sum(gather(total))

    def _batch_loss(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
        if self.kind == 'divergence':
            wanted, found = F.log_softmax(targets[0].double(), 1), F.log_softmax(outputs[0].double(), 1)
            return float(F.kl_div(found, wanted, reduction='sum', log_target=True))
        errors = [float((o - t).square().sum()) for o, t in zip(outputs, targets, strict=True)]
        return sum(error / max(power, 1e-12) for error, power in zip(errors, self._power, strict=True))

    @torch.no_grad()
    def _outputs(self) -> Iterator[list[Tensor]]:
        for batch in self._inputs.split(BATCH):
            yield list(flatten_outputs(self._model(batch)).values())
