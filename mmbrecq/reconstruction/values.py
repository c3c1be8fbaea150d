"""Values over all calibration images, in memory or in a file, and the order in which they lie there."""

import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx, nn

from mmbrecq.byte_size import show_bytes
from mmbrecq.errors import StorageError

RESHAPES = ('view', 'flatten', 'unflatten', 'reshape')
"""Methods that may refuse channels that lie innermost, or copy."""


def memory_format(module: nn.Module) -> torch.memory_format:
    """Returns ``torch.channels_last`` for a graph that gains by it: on a GPU any with convolutions, else depthwise."""
    convolutions = [m for m in called_modules(module) if isinstance(m, nn.Conv2d)]
    gains = any(1 < m.groups == m.in_channels or any(p.is_cuda for p in m.parameters()) for m in convolutions)
    nodes = module.graph.nodes if isinstance(module, fx.GraphModule) else ()
    reshaped = any(node.op == 'call_method' and node.target in RESHAPES for node in nodes)
    return torch.channels_last if gains and not reshaped else torch.contiguous_format


def called_modules(module: nn.Module) -> set[nn.Module]:
    """Returns the modules that a graph calls; none are known of a module that is no graph."""
    nodes = module.graph.nodes if isinstance(module, fx.GraphModule) else ()
    return {module.get_submodule(str(node.target)) for node in nodes if node.op == 'call_module'}


def laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    """Returns ``x`` without gaps, of four axes in the given order: a copy or ``x`` itself."""
    return x.contiguous(memory_format=layout) if x.dim() == 4 else x.contiguous()


def empty(shape: Sequence[int], layout: torch.memory_format, **options: Any) -> Tensor:
    """Returns an uninitialised tensor in the order of :func:`laid_out`; ``options`` are those of ``torch.empty``."""
    return torch.empty(tuple(shape), memory_format=layout if len(shape) == 4 else torch.contiguous_format, **options)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Returns ``x`` on ``device``; nobody waits for a GPU."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' and x.is_cpu else x.to(device)


class Values(Protocol):
    """What can be read: :class:`CachedValues`, and a plain tensor where the model runs."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor | slice, /) -> Tensor:
        """Reads the values of the images ``index``, ``(n, ...)`` in float32 on the device of the model."""


class CachedValues(Values, Protocol):
    """One value of the graph for all calibration images, ``(N, ...)``."""

    def write(self, start: int, batch: Tensor) -> None:
        """Sets the values of the images from ``start`` on."""


class MemoryValues:
    """Values in a tensor ``(N, ...)`` without gaps, which is not copied; batches lie in memory in the same order."""

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self.tensor, self.device, self.sample_shape = tensor, device, tensor.shape[1:]
        self._layout = torch.contiguous_format if tensor.is_contiguous() else torch.channels_last
        self._rows = _rows(tensor, self._layout)

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: Tensor | slice, /) -> Tensor:
        if self.tensor.device.type != self.device.type and isinstance(index, Tensor):
            found = self._rows.new_empty((len(index), *self._rows.shape[1:]), pin_memory=True)
            torch.index_select(self._rows, 0, index, out=found)
        elif isinstance(index, Tensor):
            # in half of the time of an index in brackets
            found = self._rows.index_select(0, to_device(index, self._rows.device))
        else:
            found = self._rows[index]
        return _of_rows(found, self._layout).to(self.device, non_blocking=True).float()

    def write(self, start: int, batch: Tensor) -> None:
        self.tensor[start : start + len(batch)].copy_(batch)


class FileValues:
    """Values in a file without a name: its blocks are freed with this object, even if the process is killed.

    They are read and written by explicit calls: pages of a mapping would count as the memory of this process. Where the
    disk has no room for them, StorageError is raised. ``layout`` is the order of images, in the file and in memory.
    """

    def __init__(
        self,
        directory: Path,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._count, self.sample_shape = shape[0], torch.Size(shape[1:])
        self.dtype, self.device, self._layout = dtype, device, layout
        self._row_shape = _rows(torch.empty(tuple(shape), device='meta'), layout).shape[1:]
        self._stride = self.sample_shape.numel() * dtype.itemsize
        self._file, path = tempfile.mkstemp(prefix='.activations-', dir=directory)
        weakref.finalize(self, os.close, self._file)
        os.unlink(path)
        reserve(self._file, self._count * self._stride, directory, 'activations')

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Tensor | slice, /) -> Tensor:
        rows = range(*index.indices(self._count)) if isinstance(index, slice) else index.tolist()
        pinned = self.device.type == 'cuda'
        found = torch.empty((len(rows), *self._row_shape), dtype=self.dtype, pin_memory=pinned)
        buffer = _bytes_of(found)
        if isinstance(rows, range) and rows.step == 1:
            _read(self._file, buffer, rows.start * self._stride)
        else:
            for number, row in enumerate(rows):
                _read(self._file, buffer[number * self._stride : (number + 1) * self._stride], row * self._stride)
        wide = found.to(self.device, non_blocking=True).float() if pinned else _widened(found)
        return _of_rows(wide, self._layout)

    def write(self, start: int, batch: Tensor) -> None:
        rows = _rows(batch.detach().to('cpu', self.dtype), self._layout).contiguous()
        _write(self._file, _bytes_of(rows), start * self._stride)


class MirroredValues:
    """Images ``(N, C, H, W)``, and after them the mirror image of each."""

    def __init__(self, values: MemoryValues) -> None:
        self.values, self.sample_shape = values, values.sample_shape

    def __len__(self) -> int:
        return 2 * len(self.values)

    def __getitem__(self, index: Tensor | slice, /) -> Tensor:
        if isinstance(index, slice):
            index = torch.arange(*index.indices(len(self)))
        images = self.values[index % len(self.values)]
        mirrored = to_device(index >= len(self.values), images.device)
        # a selection by a mask would wait for a GPU
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def reserve(file: int, size: int, directory: Path, what: str) -> None:
    """Allocates the blocks of a file, so that a full disk is a StorageError here and not an error of a later write."""
    try:
        if hasattr(os, 'posix_fallocate') and size:
            os.posix_fallocate(file, 0, size)
        else:
            os.truncate(file, size)
    except OSError as error:
        raise StorageError(f'{directory} cannot hold {show_bytes(size)} of {what}: {error}') from error


def _rows(x: Tensor, layout: torch.memory_format) -> Tensor:
    """Returns a view of images ``(N, C, H, W)``, of which each lies in memory in the order of its axes."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 and layout == torch.channels_last else x


def _of_rows(rows: Tensor, layout: torch.memory_format) -> Tensor:
    """Inverts :func:`_rows`."""
    return rows.permute(0, 3, 1, 2) if rows.dim() == 4 and layout == torch.channels_last else rows


def _bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor on the CPU; NumPy, which gives it, has no bfloat16."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _widened(tensor: Tensor) -> Tensor:
    """Returns a float32 or bfloat16 tensor on the CPU in float32.

    The reading thread does it, and torch would start a second team of threads there, which slows the computing one down
    by a third on two cores. NumPy works in the one thread.
    """
    if tensor.dtype == torch.float32:
        return tensor
    assert tensor.dtype == torch.bfloat16
    codes = tensor.view(torch.int16).numpy().view(np.uint16)
    wide = np.left_shift(codes, 16, dtype=np.uint32)
    return torch.from_numpy(wide.view(np.float32))


def _read(file: int, buffer: memoryview, offset: int) -> None:
    while buffer:
        # one call moves 2 GiB at most
        count = os.preadv(file, [buffer], offset)
        if count == 0:
            raise StorageError(f'a file of activations ends {len(buffer)} bytes early')
        buffer, offset = buffer[count:], offset + count


def _write(file: int, buffer: memoryview, offset: int) -> None:
    while buffer:
        count = os.pwrite(file, buffer, offset)
        buffer, offset = buffer[count:], offset + count
