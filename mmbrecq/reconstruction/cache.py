"""Where cached activations live, decided from their sizes before the work starts."""

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from mmbrecq.building import expect
from mmbrecq.byte_size import show_bytes
from mmbrecq.calibration.calibrator import OBSERVED
from mmbrecq.data.groups import Grouped, Images
from mmbrecq.distributed import processes_here
from mmbrecq.errors import StorageError
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.reconstruction.values import CachedValues, FileValues, MemoryValues, MirroredValues, Values, empty, reserve

PLACES = ('auto', 'device', 'host', 'disk')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}


@dataclass(frozen=True)
class CachePlan:
    """Where activations are cached, and how much memory the work takes.

    Args:
        place: ``device``, ``host`` or ``disk``.
        peak_bytes: Most that is cached at any time, at ``peak_unit``.
        dtype: In which activations are cached; they are computed in float32.
        working_bytes: Most that the work on a unit takes beside that, of the memory of the device that computes.
        observed: Images whose activations are observed at once.
    """

    place: str
    peak_bytes: int
    peak_unit: str
    dtype: torch.dtype = torch.float32
    working_bytes: int = 0
    working_unit: str = ''
    observed: int = OBSERVED

    def __str__(self) -> str:
        kept = f'activations are cached on the {self.place} in {str(self.dtype).removeprefix("torch.")}'
        most = f"{show_bytes(self.peak_bytes)} at most, at '{self.peak_unit}'"
        beside = f"beside that the work takes {show_bytes(self.working_bytes)}, at '{self.working_unit}'"
        fewer = f'; {self.observed} images are observed at once, for {OBSERVED} have no room'
        return f'{kept}: {most}; {beside}{fewer if self.observed < OBSERVED else ""}'


def last_readers(units: Sequence[ReconstructionUnit]) -> dict[str, int]:
    """Returns the index of the last unit that reads each value."""
    return {name: index for index, unit in enumerate(units) for name in unit.inputs}


def peak_bytes(
    units: Sequence[ReconstructionUnit], sizes: Mapping[str, int], images: str, standing: int = 0, weights: int = 0
) -> tuple[int, str]:
    """Returns the most bytes cached at once over a run, and the unit at which that is.

    Two streams are carried, and while a unit runs its inputs and its outputs are there in both, the quantized outputs
    as they were before learning and after it. The ``images``, the network's input, are the same in both, and there from
    the start to the end, as are ``standing`` bytes: Fisher weights, outputs of the network. ``sizes`` are the bytes of
    each value over all calibration images; the loss of a unit weighs by so many values, ``weights``, of the size of its
    outputs, or finds them from so many.
    """
    last = last_readers(units)
    live: set[str] = {images}
    worst, where = 0, ''
    for index, unit in enumerate(units):
        live |= set(unit.outputs)
        total = standing + sum(sizes[name] * (1 if name == images else 2) for name in live)
        # what the weights are found from is gone when the unit has learned
        total += max(1, weights) * sum(sizes[name] for name in unit.outputs)
        if total > worst:
            worst, where = total, unit.name
        live = {name for name in live if name == images or last.get(name, -1) > index}
    return worst, where


def plan_cache(
    place: str,
    cached: tuple[int, str],
    working: tuple[int, str],
    device: torch.device,
    directory: Path,
    memory_limit: int | None,
    dtype: torch.dtype = torch.float32,
) -> CachePlan:
    """Chooses where activations are cached, in ``dtype``, for a model on ``device``.

    The config asks for ``place``, one of :data:`PLACES`. ``cached`` are the most bytes cached at once, ``working`` the
    most that the work on a unit takes beside that, each with the unit. ``memory_limit`` are bytes of host memory that
    both may take; None for half of what is available for the cache, and all of it for both.

    Raises:
        ConfigError: ``place`` is unknown.
        StorageError: They fit nowhere, or not where the config asks; said before any work is done.
    """
    expect(place in PLACES, f'reconstructor.cache to be one of {list(PLACES)}', place)
    available = psutil.virtual_memory().available // processes_here()
    memory = available if memory_limit is None else memory_limit
    # on a GPU, a batch that does not fit is split
    on_host = working[0] if device.type == 'cpu' else 0
    if on_host > memory:
        raise StorageError(
            f"expected {show_bytes(on_host)} of memory for the work on unit '{working[1]}', but there are only "
            f'{show_bytes(memory)}; use a smaller batch_size or a finer granularity'
        )
    free = {
        'device': torch.cuda.mem_get_info(device)[0] // 2 if device.type == 'cuda' else 0,
        'host': min(memory - on_host, _room_on_host(memory_limit)),
        'disk': shutil.disk_usage(directory).free,
    }
    if place == 'device' and device.type == 'cpu':
        place = 'host'
    order = ('device', 'host', 'disk') if place == 'auto' else (place,)
    for candidate in order:
        if cached[0] <= free[candidate]:
            return CachePlan(candidate, *cached, dtype, *working)
    have = ', '.join(f'{show_bytes(free[p])} on {p}' for p in order)
    raise StorageError(
        f"expected room for {show_bytes(cached[0])} of activations at unit '{cached[1]}', but there are only {have}; "
        'use fewer calibration images, cache_dtype bfloat16 or another cache'
    )


def allocate_images(
    shape: Sequence[int], like: Tensor, place: str, directory: Path, memory_limit: int | None
) -> Tensor:
    """Allocates the calibration images, ``(N, 3, H, W)``, by the rules of :func:`plan_cache`.

    They are of the dtype of ``like`` and on its device, that of the model, unless they are mapped from a file.
    StorageError is raised where there is no room for them.
    """
    size, on_host = math.prod(shape) * like.element_size(), not like.is_cuda
    free = torch.cuda.mem_get_info(like.device)[0] if like.is_cuda else _room_on_host(memory_limit)
    if on_host and (place == 'disk' or (place == 'auto' and size > free)):
        return _mapped(shape, like.dtype, directory)
    if size > free:
        raise StorageError(
            f'expected room for {show_bytes(size)} of calibration images, but there are only {show_bytes(free)} on the '
            f'{"host" if on_host else "device"}; use fewer calibration images{" or another cache" if on_host else ""}'
        )
    return like.new_empty(tuple(shape))


def images_on_disk(images: Images, directory: Path) -> Images:
    """Returns images in a mapped file: themselves where they are in one or on a GPU, else a copy, or StorageError."""
    if isinstance(images, Grouped):
        return Grouped([images_on_disk(part, directory) for part in images.parts], images.ends)
    return images if images.is_shared() else _mapped(images.shape, images.dtype, directory).copy_(images)


def _mapped(shape: Sequence[int], dtype: torch.dtype, directory: Path) -> Tensor:
    """Allocates a tensor in a file without a name, whose pages the system drops where memory is short."""
    count = math.prod(shape)
    with tempfile.NamedTemporaryFile(prefix='.images-', dir=directory) as file:
        reserve(file.fileno(), count * dtype.itemsize, directory, 'images')
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).reshape(tuple(shape))


def _room_on_host(memory_limit: int | None) -> int:
    """Returns the bytes that values may take on the host: the limit, without one half of what is available."""
    return psutil.virtual_memory().available // processes_here() // 2 if memory_limit is None else memory_limit


class ActivationCache:
    """Allocates values where the plan says, for a model on ``device``; files are written in ``directory``."""

    def __init__(self, plan: CachePlan, device: torch.device, directory: Path) -> None:
        self.plan, self.device, self.directory = plan, device, directory

    def allocate(
        self, shape: Sequence[int], layout: torch.memory_format = torch.contiguous_format, like: Values | None = None
    ) -> CachedValues:
        """Returns uninitialised values ``(N, ...)``; they are freed, on the disk too, when the last reference goes.

        ``layout`` is the order in memory of ``(N, C, H, W)``; ``like`` is another value of the images, which says
        whether they are groups, each with a shape of its own. StorageError is raised if the disk is full.
        """
        if isinstance(like, Grouped):
            return Grouped((), like.ends, like.starts, partial(self.allocate, layout=layout))
        if self.plan.place == 'disk':
            return FileValues(self.directory, shape, self.plan.dtype, self.device, layout)
        place = self.device if self.plan.place == 'device' else 'cpu'
        return MemoryValues(empty(shape, layout, dtype=self.plan.dtype, device=place), self.device)

    def hold(self, images: Images, mirror: bool = False) -> Values:
        """Returns images, or features of regions, as values, without a copy; mirror images may follow, by group."""
        if isinstance(images, Grouped):
            return Grouped([self.hold(part, mirror) for part in images.parts], images.ends)
        values = MemoryValues(images, self.device)
        return MirroredValues(values) if mirror else values
