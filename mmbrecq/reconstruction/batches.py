"""Random batches of a training, the next one read while a step computes where reading takes time."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from mmbrecq.reconstruction.unit_data import Batch, UnitData
from mmbrecq.reconstruction.values import FileValues, MemoryValues


class Batches:
    """The batches of the steps, one after the other; a context manager.

    The images of a step are drawn when it begins, or ahead when the step before it has made all its own draws: the
    order of the draws does not depend on where values are kept.

    Args:
        data: What is read.
        batch_size: Images of a step.
        steps: Number of steps.
        generator: Source of the draws, on the CPU.
        device: Where the batches are used.
        floats: Whether the float inputs are read.
    """

    def __init__(
        self,
        data: UnitData,
        batch_size: int,
        steps: int,
        generator: torch.Generator,
        device: torch.device,
        floats: bool,
    ) -> None:
        self.data, self.batch_size, self.left = data, batch_size, steps
        self.generator, self.device, self.floats = generator, device, floats
        self._reader: ThreadPoolExecutor | None = None
        self._stream = torch.cuda.Stream(device) if device.type == 'cuda' else None
        self._next: tuple[Tensor, Future[Batch] | None] | None = None

    def __enter__(self) -> Batches:
        if takes_time(self.data):
            self._reader = ThreadPoolExecutor(1, 'batches')
        return self

    def __exit__(self, *exc: object) -> None:
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)

    def begin(self) -> None:
        """Begins the next step."""
        if self._next is None:
            self._draw()
        assert self._next is not None
        (self._index, self._future), self._next = self._next, None

    def current(self) -> Batch:
        """The batch of the step, fresh: what a failed attempt has changed in it is read again."""
        future, self._future = self._future, None
        batch = self._read(self._index) if future is None else future.result()
        if self._reader is not None and self._stream is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(self._stream)
            for tensor in batch.tensors:
                # else its memory could be given away while the step still reads it
                tensor.record_stream(stream)
        return batch

    def read_ahead(self) -> None:
        """Starts to read the batch of the next step; called when all draws of this step are made."""
        if self._reader is not None and self._next is None and self.left:
            self._draw()

    def _draw(self) -> None:
        index = torch.randperm(len(self.data.targets[0]), generator=self.generator)[: self.batch_size]
        self.left -= 1
        self._next = index, None if self._reader is None else self._reader.submit(self._read, index)

    def _read(self, index: Tensor) -> Batch:
        if self._reader is None or self._stream is None:
            return self.data.read(index, self.floats)
        with torch.cuda.stream(self._stream):
            return self.data.read(index, self.floats)


def takes_time(data: UnitData) -> bool:
    """Whether anything comes from a file, or from the memory of another device than the one that computes."""
    values = [*data.quantized_inputs, *data.float_inputs, *data.targets, *(data.fisher or ())]
    return any(
        isinstance(x, FileValues) or (isinstance(x, MemoryValues) and x.tensor.device.type != x.device.type)
        for x in values
    )
