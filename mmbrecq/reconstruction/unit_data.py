"""What a unit is trained on, and batches of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmbrecq.distributed import mean_over
from mmbrecq.reconstruction.layout import laid_out
from mmbrecq.reconstruction.values import Values

UnitLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Batch:
    """Some images; every tensor is ``(n, ...)``.

    Args:
        quantized_inputs: See :class:`UnitData`.
        float_inputs: Likewise; an input that is the same in both streams is the same tensor.
        targets: Likewise.
        fisher: Likewise.
        importance: How much each output counts; None for all the same.
    """

    quantized_inputs: Sequence[Tensor]
    float_inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    fisher: Sequence[Tensor] | None = None
    importance: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.targets[0])

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*self.quantized_inputs, *self.float_inputs, *self.targets, *(self.fisher or ())]

    def parts(self, images: int) -> Iterator[Batch]:
        """The batch in parts of so many images; where one part is all, the batch itself."""
        if images >= len(self):
            yield self
            return
        for start in range(0, len(self), images):
            part = slice(start, start + images)
            quantized = [x[part] for x in self.quantized_inputs]
            floats = [
                q if x is whole else x[part]
                for x, whole, q in zip(self.float_inputs, self.quantized_inputs, quantized, strict=False)
            ]
            fisher = None if self.fisher is None else [x[part] for x in self.fisher]
            yield Batch(quantized, floats, [x[part] for x in self.targets], fisher, self.importance)

    def laid_out(self, layout: torch.memory_format) -> Batch:
        """The batch with its channels in the given order in memory."""
        quantized, targets = ([laid_out(x, layout) for x in values] for values in (self.quantized_inputs, self.targets))
        floats = [
            q if x is before else laid_out(x, layout)
            for x, before, q in zip(self.float_inputs, self.quantized_inputs, quantized, strict=False)
        ]
        fisher = None if self.fisher is None else [laid_out(x, layout) for x in self.fisher]
        return Batch(quantized, floats, targets, fisher, self.importance)

    def loss(self, outputs: Sequence[Tensor], loss: UnitLoss) -> Tensor:
        """Sum of the losses of all outputs, each as much as it counts."""
        total: Any = 0
        for i, (output, target) in enumerate(zip(outputs, self.targets, strict=True)):
            one = loss(output, target, None if self.fisher is None else self.fisher[i])
            total = total + (one if self.importance is None else self.importance[i] * one)
        return total


@dataclass(frozen=True)
class UnitData:
    """What a unit is trained on; all values are ``(N, ...)`` over the calibration images.

    Args:
        quantized_inputs: Inputs as the quantized units before it give them.
        float_inputs: Inputs of the float model.
        targets: Outputs of the float model.
        fisher: Fisher weights of the outputs, None where the loss needs none.
        importance: How much each output counts, 1 on average; None for all the same.
    """

    quantized_inputs: Sequence[Values]
    float_inputs: Sequence[Values]
    targets: Sequence[Values]
    fisher: Sequence[Values] | None = None
    importance: Sequence[float] | None = None

    def read(self, index: Tensor, floats: bool) -> Batch:
        """The images ``index``; of the float inputs only where ``floats`` asks for them."""
        quantized = [x[index] for x in self.quantized_inputs]
        pairs = zip(self.float_inputs, self.quantized_inputs, quantized, strict=True)
        return Batch(
            quantized,
            [q if x is values else x[index] for x, values, q in pairs] if floats else [],
            [x[index] for x in self.targets],
            None if self.fisher is None else [x[index] for x in self.fisher],
            self.importance,
        )

    def loss(self, outputs: Sequence[Tensor], index: Tensor | slice, loss: UnitLoss) -> Tensor:
        """Sum of the losses of all outputs, for the images ``index``."""
        fisher = None if self.fisher is None else [x[index] for x in self.fisher]
        return Batch([], [], [x[index] for x in self.targets], fisher, self.importance).loss(outputs, loss)

    def mean_loss(self, outputs: Sequence[Values], loss: UnitLoss, batch_size: int) -> float:
        """Loss of ``outputs`` over all images, those of other processes included."""
        return self._mean(lambda index: [output[index] for output in outputs], loss, batch_size)

    def power(self, loss: UnitLoss, batch_size: int) -> float:
        """Loss of outputs of zeros, likewise."""
        return self._mean(lambda index: [torch.zeros_like(x[index]) for x in self.targets], loss, batch_size)

    def _mean(self, outputs: Callable[[slice], Sequence[Tensor]], loss: UnitLoss, batch_size: int) -> float:
        count, total = len(self.targets[0]), 0.0
        for start in range(0, count, batch_size):
            index = slice(start, min(start + batch_size, count))
            total += float(self.loss(outputs(index), index, loss)) * (index.stop - index.start)
        return mean_over(total, count)
