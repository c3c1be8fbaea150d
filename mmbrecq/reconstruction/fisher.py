"""Diagonal Fisher information of the task loss at the outputs of the units."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from mmbrecq.errors import NonFiniteError
from mmbrecq.graph.components import plug
from mmbrecq.quantizers.prepared import QuantizedModel
from mmbrecq.reconstruction.cache import ActivationCache

TaskLoss = Callable[[Any, Tensor], Tensor]
"""From a batch of calibration data and its preprocessed images to the task loss, a scalar, through the model."""


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the values of the named nodes."""

    def __init__(self, module: fx.GraphModule, names: set[str]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.names = names
        self.recorded: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.recorded[n.name] = value
        return value


def fisher_weights(
    model: QuantizedModel, batches: Iterable[Any], images: Tensor, task_loss: TaskLoss, cache: ActivationCache
) -> dict[str, Tensor]:
    """Squared gradients of the float model's task loss at every unit output, normalised to mean 1.

    One forward and backward pass of the whole network per batch gives them for all units.

    Args:
        model: The prepared model.
        batches: Calibration data with annotations, in the order of ``images``.
        images (Tensor): Preprocessed images, ``(N, 3, H, W)``.
        task_loss: Computes the loss through ``model.model``.
        cache: Where the weights are kept.

    Returns:
        ``{output name: (N, ...)}``.

    Raises:
        NonFiniteError: A gradient is not finite, or all are zero.
    """
    names = {name for unit in model.units if unit.is_quantized for name in unit.outputs}
    weights: dict[str, Tensor] = {}
    recorder = _Recorder(model.compiled, names)
    start = 0
    plug(model.model, recorder.run)
    try:
        with torch.enable_grad(), model.quantization(weights=False, activations=False):
            for batch in batches:
                stop = start + _batch_size(batch)
                x = images[start:stop].to(cache.device).requires_grad_(True)
                loss = task_loss(batch, x)
                values = list(recorder.recorded.items())
                # the loss is a mean over the batch: undo it, so that every image counts by itself
                gradients = torch.autograd.grad(
                    loss * (stop - start), [value for _, value in values], allow_unused=True, materialize_grads=True
                )
                for (name, _), gradient in zip(values, gradients, strict=True):
                    if name not in weights:
                        weights[name] = cache.allocate((len(images), *gradient.shape[1:]))
                    weights[name][start:stop].copy_(gradient.square())
                start = stop
    finally:
        plug(model.model, model.compiled)
    for name, weight in weights.items():
        mean = float(weight.mean(dtype=torch.float64))
        if not 0 < mean < float('inf'):
            raise NonFiniteError(
                f"expected finite gradients at '{name}' that are not all zero, but their mean square is {mean}"
            )
        weight.div_(mean)
    return weights


def _batch_size(batch: Any) -> int:
    return len(batch['inputs'])
