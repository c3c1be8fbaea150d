"""Iterations captured as a CUDA graph: Python launches a graph in the time that it takes for one of its kernels."""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor

from mmbrecq.data.groups import grouped
from mmbrecq.distributed import process_count
from mmbrecq.errors import first_line
from mmbrecq.fake_quants.masks import RandomMasks
from mmbrecq.reconstruction.batches import Batches
from mmbrecq.reconstruction.values import to_device

SWITCH = 'MMBRECQ_GRAPHS'
"""Environment variable: with 0, every operation is launched by itself."""
WARM_UP = 3
"""Iterations before the one that is captured: libraries choose their kernels, and the optimizer makes its state."""
FEWEST = 50
"""Iterations of a unit from which a capture pays."""


class Replay:
    """Does a few iterations operation by operation, and the others by replaying a graph of all operations of one.

    If an iteration cannot be captured, since it waits for the GPU, say, all are done operation by operation.

    ``iterate`` does an iteration of the unit ``name`` with an exponent and a weight of the regulariser and the learning
    rates, which are scalars on the GPU, and returns the loss; ``masks`` is None where nothing is dropped.
    """

    def __init__(
        self, name: str, iterate: Callable[..., Tensor], batches: Batches, masks: RandomMasks | None, device: Any
    ) -> None:
        self._name, self._iterate, self._batches, self._device = name, iterate, batches, device
        self._masks = masks or RandomMasks(1, batches.generator)
        self._stream, self._done = torch.cuda.Stream(device), 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, beta: float | None, weight: float, *rates: float) -> Tensor:
        """Does an iteration and returns its loss, which the next one may overwrite."""
        numbers = torch.tensor([2.0, 0.0, *rates] if beta is None else [beta, weight, *rates], dtype=torch.float32)
        if not self._done:
            self._numbers = torch.empty_like(numbers, device=self._device)
        self._numbers.copy_(to_device(numbers, self._device))
        self._done += 1
        if self._done == WARM_UP + 1:
            self._capture()
        if self._graph is None:
            return self._aside()
        for old, new in zip(_tensors(self._source), _tensors(self._batches.source()), strict=True):
            old.copy_(new)
        for mask in self._drawn:
            mask.copy_(self._masks.draw(mask))
        self._batches.prefetch()
        self._graph.replay()
        return self._loss

    def _aside(self) -> Tensor:
        """Does an iteration on the stream of the capture, as autograd wants it, with all kernels of the capture."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        self._masks.drawn = []
        with torch.cuda.stream(self._stream):
            loss = self._iterate(*self._numbers.unbind())
        current.wait_stream(self._stream)
        return loss

    def _capture(self) -> None:
        """Captures an iteration, if possible; nothing is computed, and nothing drawn."""
        graph, batches, masks = torch.cuda.CUDAGraph(), self._batches, self._masks
        self._source = batches.fixed = batches.source()
        self._drawn, masks.drawn = [mask.clone() for mask in masks.drawn or ()], None
        masks.fixed = iter(self._drawn)
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode='thread_local'):
                self._loss = self._iterate(*self._numbers.unbind())
            self._graph = graph
        except Exception as error:
            text = f"unit '{self._name}' is launched operation by operation, for no CUDA graph can hold its iterations"
            # the context is what was refused, the error that the capture cannot end well then
            print_log(f'{text}: {first_line(error.__context__ or error)}', 'current', logging.WARNING)
        finally:
            batches.fixed = masks.fixed = None


def _tensors(source: Any) -> list[Tensor]:
    return [source] if isinstance(source, Tensor) else source.values


def can_capture(data: Any, iterations: int, device: torch.device) -> bool:
    """Returns whether iterations may be captured: on one GPU, if they are many, and all images of one size."""
    on_gpu = device.type == 'cuda' and process_count() == 1 and os.environ.get(SWITCH) != '0'
    return on_gpu and iterations >= FEWEST and len(grouped(data.targets[0]).parts) == 1
