"""What a unit is trained on, random batches of it, and smaller ones where a GPU has no room for a whole batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from mmengine.logging import print_log
from torch import Tensor

from mmbrecq.data.groups import batches_of, grouped
from mmbrecq.distributed import mean_over
from mmbrecq.errors import StorageError
from mmbrecq.reconstruction.values import FileValues, MemoryValues, Values, laid_out, to_device

T = TypeVar('T')
V = TypeVar('V', bound=Values)
UnitLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
OutputTerm = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class UnitData(Generic[V]):
    """Holds what a unit is trained on, ``(N, ...)``: over the calibration images, or a batch of them as tensors.

    Args:
        quantized_inputs: Inputs as the quantized units before it compute them.
        float_inputs: Inputs of the float model; an input that is the same in both streams is the same object.
        targets: Outputs of the float model.
        fisher: Fisher weights of the outputs, None where the loss needs none.
        importance: How much each output counts, 1 on average; None for all the same.
        term: A term of the loss for the outputs of the network; None for none.
        beside: What the rest of the network reads beside the outputs of the unit.
        network_outputs: Outputs of the float network.
    """

    quantized_inputs: Sequence[V]
    float_inputs: Sequence[V]
    targets: Sequence[V]
    fisher: Sequence[V] | None = None
    importance: Sequence[float] | None = None
    term: OutputTerm | None = None
    beside: Sequence[V] = ()
    network_outputs: Sequence[V] = ()

    def __len__(self) -> int:
        return len(self.targets[0])

    @property
    def values(self) -> list[V]:
        """All values, shared inputs twice."""
        own = [*self.quantized_inputs, *self.float_inputs, *self.targets, *(self.fisher or ())]
        return [*own, *self.beside, *self.network_outputs]

    def read(self, index: Tensor | slice, floats: bool = True) -> Batch:
        """Reads the images ``index``; their float inputs only where ``floats`` asks for them."""
        return self._mapped(itemgetter(index), floats)

    def parts(self: Batch, images: int) -> Iterator[Batch]:
        """Yields parts of ``images`` images each; where one part is all, the batch itself."""
        if images >= len(self):
            yield self
            return
        for start in range(0, len(self), images):
            yield self.read(slice(start, start + images))

    def laid_out(self: Batch, layout: torch.memory_format) -> Batch:
        """Returns the batch with its channels in the given order in memory."""
        return self._mapped(lambda x: laid_out(x, layout))

    def loss(self: Batch, outputs: Sequence[Tensor], loss: UnitLoss) -> Tensor:
        """Returns the sum of the losses of all outputs, each as much as it counts, and of the term."""
        total: Any = 0
        for i, (output, target) in enumerate(zip(outputs, self.targets, strict=True)):
            one = loss(output, target, None if self.fisher is None else self.fisher[i])
            total = total + (one if self.importance is None else self.importance[i] * one)
        return total if self.term is None else total + self.term(outputs, self.beside, self.network_outputs)

    def mean_loss(self, outputs: Sequence[Values], loss: UnitLoss, batch_size: int) -> float:
        """Returns the loss of ``outputs`` over all images, those of other processes included."""
        return self._mean(lambda index: [output[index] for output in outputs], loss, batch_size)

    def power(self, loss: UnitLoss, batch_size: int) -> float:
        """Returns the loss of outputs of zeros, over all images of all processes."""
        return self._mean(lambda index: [torch.zeros_like(x[index]) for x in self.targets], loss, batch_size)

    @torch.no_grad()
    def _mean(self, outputs: Callable[[slice], Sequence[Tensor]], loss: UnitLoss, batch_size: int) -> float:
        total, without_inputs = 0.0, replace(self, quantized_inputs=(), float_inputs=())
        for index in batches_of(self.targets[0], batch_size):
            total += float(without_inputs.read(index).loss(outputs(index), loss)) * (index.stop - index.start)
        return mean_over(total, len(self))

    def _mapped(self, change: Callable[[V], Tensor], floats: bool = True) -> Batch:
        """Returns a batch of every value changed; inputs shared by both streams stay shared."""
        quantized = [change(x) for x in self.quantized_inputs]
        # a batch may have been read without its float inputs
        pairs = zip(self.float_inputs if floats else (), self.quantized_inputs, quantized, strict=False)
        return UnitData(
            quantized,
            [q if x is before else change(x) for x, before, q in pairs],
            [change(x) for x in self.targets],
            None if self.fisher is None else [change(x) for x in self.fisher],
            self.importance,
            self.term,
            [change(x) for x in self.beside],
            [change(x) for x in self.network_outputs],
        )


Batch: TypeAlias = UnitData[Tensor]


@dataclass(eq=False)
class Batches:
    """The batches of all iterations, one after the other; a context manager.

    Where reading takes time, the next batch is read while an iteration computes. Images are drawn when an iteration
    begins, or when the one before has made all its own draws: the order of the draws does not depend on where values
    are kept.

    Args:
        left: How many batches are still to be drawn.
        generator: Source of the draws, on the CPU.
        device: Where the batches are used.
        floats: Whether the float inputs are read.
    """

    data: UnitData[Any]
    batch_size: int
    left: int
    generator: torch.Generator
    device: torch.device
    floats: bool

    def __post_init__(self) -> None:
        self._reader: ThreadPoolExecutor | None = None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == 'cuda' else None
        self._next: tuple[Tensor, Future[Batch] | None] | None = None
        # what a CUDA graph reads, while it is captured
        self.fixed: Batch | Tensor | None = None

    def __enter__(self) -> Batches:
        if is_slow(self.data):
            self._reader = ThreadPoolExecutor(1, 'batches')
        return self

    def __exit__(self, *exc: object) -> None:
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)

    def begin(self) -> None:
        """Begins the next iteration."""
        if self._next is None:
            self._draw()
        assert self._next is not None
        (self._index, self._future), self._next = self._next, None

    def current(self) -> Batch:
        """Returns the batch of the iteration; it is read again after a failed attempt, which may have changed it."""
        if self.fixed is not None:
            return self.data.read(self.fixed, self.floats) if isinstance(self.fixed, Tensor) else self.fixed
        future, self._future = self._future, None
        batch = self._read(self._index) if future is None else future.result()
        if self._reader is not None and self._stream is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(self._stream)
            for tensor in batch.values:
                # else its memory could be given away while the iteration still reads it
                tensor.record_stream(stream)
        return batch

    def source(self) -> Batch | Tensor:
        """Returns what a CUDA graph reads in the iteration: the indices of the images if all lie on the GPU."""
        return to_device(self._index, self.device) if self._reader is None else self.current()

    def prefetch(self) -> None:
        """Starts to read the next batch; called when all draws of this iteration are made."""
        if self._reader is not None and self.fixed is None and self._next is None and self.left:
            self._draw()

    def _draw(self) -> None:
        starts = grouped(self.data.targets[0]).starts
        # a group gives as many of the batches as it has of the images
        image = int(torch.randint(starts[-1], (), generator=self.generator)) if len(starts) > 2 else 0
        first, stop = next(group for group in pairwise(starts) if image < group[1])
        index = first + torch.randperm(stop - first, generator=self.generator)[: self.batch_size]
        self.left -= 1
        self._next = index, None if self._reader is None else self._reader.submit(self._read, index)

    def _read(self, index: Tensor) -> Batch:
        if self._reader is None or self._stream is None:
            return self.data.read(index, self.floats)
        with torch.cuda.stream(self._stream):
            return self.data.read(index, self.floats)


def is_slow(data: UnitData[Any]) -> bool:
    """Returns whether reading takes time: from a file, or from the memory of another device than the computing one."""
    return any(
        isinstance(x, FileValues) or (isinstance(x, MemoryValues) and x.tensor.device.type != x.device.type)
        for value in data.values
        for x in grouped(value).parts
    )


class MicroBatches:
    """How many images a unit computes at once: half as many whenever the GPU runs out of memory.

    ``images`` starts as a whole batch; ``split`` tells whether it is less by now.
    """

    def __init__(self, unit: str, images: int) -> None:
        self.unit, self.images, self.split = unit, images, False

    def run(self, work: Callable[[int], T]) -> T:
        """Calls ``work(images)``, again with fewer where memory does not suffice; StorageError if one does not fit."""
        while True:
            try:
                return work(self.images)
            except torch.cuda.OutOfMemoryError as error:
                if self.images == 1:
                    raise StorageError(
                        f"expected room on the GPU for the work on unit '{self.unit}', but a single image takes more "
                        'than it has; use a finer granularity or cache=host'
                    ) from error
            # out of the except clause, whose traceback holds the tensors of the failed attempt
            self.images, self.split = (self.images + 1) // 2, True
            torch.cuda.empty_cache()
            text = f"the GPU has no room for a batch of unit '{self.unit}': it takes {self.images} images at once now"
            print_log(text, 'current', logging.WARNING)
