from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from mmbrecq.errors import ConfigError, StorageError
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.reconstruction.cache import (
    PLACES,
    ActivationCache,
    CachePlan,
    allocate_images,
    images_on_disk,
    last_readers,
    peak_bytes,
    plan_cache,
)

MB = 10**6
CPU, GPU = torch.device('cpu'), torch.device('cuda')
NOTHING = (0, 'u')


def unit(name: str, inputs: Sequence[str], outputs: Sequence[str], layers: Sequence[str] = ('conv',)) -> Any:
    module: Any = None
    return ReconstructionUnit(name, module, tuple(inputs), tuple(outputs), tuple(layers), ())


# a shortcut: `a` is read by the second and by the third unit
UNITS = [unit('one', ['x'], ['a']), unit('two', ['a'], ['b']), unit('three', ['a', 'b'], ['c'], layers=())]
SIZES = {'x': 1000, 'a': 100, 'b': 10, 'c': 1}


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``room(device=, host=, disk=)``: free MiB of each, of which half are for the cache on the device and the host."""

    def set_free(device: float = 0, host: float = 0, disk: float = 0) -> None:
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda _: (int(device * MB), 10**12))
        monkeypatch.setattr(psutil, 'virtual_memory', lambda: SimpleNamespace(available=int(host * MB)))
        monkeypatch.setattr(shutil, 'disk_usage', lambda _: SimpleNamespace(free=int(disk * MB)))

    return set_free


def test_last_readers() -> None:
    assert last_readers(UNITS) == {'x': 0, 'a': 2, 'b': 2}


def test_the_peak_counts_what_lives_at_once() -> None:
    peak, where = peak_bytes(UNITS, SIZES, 'x')
    # both streams share the images, and carry each its own of all else
    assert where == 'one'
    assert peak >= 1000 + 2 * 100
    others = {**SIZES, 'x': 1, 'c': 50}
    peak, where = peak_bytes(UNITS, others, 'x')
    # `a` is there until the last unit; the images are not there any more
    assert where == 'three'
    assert peak >= 2 * (100 + 10 + 50)


def test_what_no_later_unit_reads_is_not_counted() -> None:
    chain = [unit(str(i), [f'v{i}'], [f'v{i + 1}']) for i in range(50)]
    sizes = {f'v{i}': 100 for i in range(51)}
    assert peak_bytes(chain, sizes, 'v0')[0] <= 100 * 2 * 3


def test_what_stands_from_the_start_is_added() -> None:
    assert peak_bytes(UNITS, SIZES, 'x', standing=110)[0] == peak_bytes(UNITS, SIZES, 'x')[0] + 110


@pytest.mark.parametrize(
    ('needed', 'place'), [(10, 'device'), (11, 'host'), (50, 'host'), (51, 'disk'), (1000, 'disk')]
)
def test_the_fastest_place_with_room(room: Any, tmp_path: Path, needed: int, place: str) -> None:
    room(device=20, host=100, disk=1000)
    plan = plan_cache('auto', (needed * MB, 'u'), NOTHING, GPU, tmp_path, None)
    assert plan == CachePlan(place, needed * MB, 'u', working_unit='u')


def test_a_cpu_has_no_memory_of_its_own(room: Any, tmp_path: Path) -> None:
    room(device=1000, host=100, disk=1000)
    assert plan_cache('auto', (MB, 'u'), NOTHING, CPU, tmp_path, None).place == 'host'
    assert plan_cache('device', (MB, 'u'), NOTHING, CPU, tmp_path, None).place == 'host'


def test_the_limit_of_host_memory(room: Any, tmp_path: Path) -> None:
    room(host=1000, disk=1000)
    assert plan_cache('auto', (5 * MB, 'u'), NOTHING, CPU, tmp_path, 5 * MB).place == 'host'
    assert plan_cache('auto', (5 * MB + 1, 'u'), NOTHING, CPU, tmp_path, 5 * MB).place == 'disk'


def test_the_limit_bounds_what_is_cached_and_the_work_together(room: Any, tmp_path: Path) -> None:
    room(host=1000, disk=1000)
    work = 3 * MB, 'layer4'
    plan = plan_cache('auto', (5 * MB, 'layer1'), work, CPU, tmp_path, 8 * MB)
    assert plan == CachePlan('host', 5 * MB, 'layer1', torch.float32, *work)
    assert plan_cache('auto', (5 * MB, 'layer1'), work, CPU, tmp_path, 8 * MB - 1).place == 'disk'
    # on the disk the limit is for the work alone
    assert plan_cache('auto', (5 * MB, 'layer1'), work, CPU, tmp_path, 3 * MB).place == 'disk'
    with pytest.raises(StorageError, match="of activations at unit 'layer1', but there are only 4.00 MB on host"):
        plan_cache('host', (5 * MB, 'layer1'), work, CPU, tmp_path, 7 * MB)


@pytest.mark.parametrize('place', PLACES)
def test_a_limit_too_small_for_a_single_unit(room: Any, tmp_path: Path, place: str) -> None:
    room(host=1000, disk=1000)
    with pytest.raises(StorageError) as error:
        plan_cache(place, (MB, 'layer1'), (3 * MB, 'layer4'), CPU, tmp_path, 2 * MB)
    assert str(error.value) == (
        "expected 3.00 MB of memory for the work on unit 'layer4', but there are only 2.00 MB; use a smaller "
        'batch_size or a finer granularity'
    )


def test_without_a_limit_the_cache_takes_half_and_the_work_the_rest(room: Any, tmp_path: Path) -> None:
    room(host=100, disk=1000)
    for cached, working, place in ((50, 50, 'host'), (51, 0, 'disk'), (40, 61, 'disk'), (40, 60, 'host')):
        plan = plan_cache('auto', (cached * MB, 'u'), (working * MB, 'u'), CPU, tmp_path, None)
        assert plan.place == place, (cached, working)
    with pytest.raises(StorageError, match='expected 101 MB of memory'):
        plan_cache('auto', (MB, 'u'), (101 * MB, 'u'), CPU, tmp_path, None)


def test_the_work_on_a_gpu_takes_no_host_memory(room: Any, tmp_path: Path) -> None:
    room(device=2, host=100, disk=1000)
    assert plan_cache('auto', (5 * MB, 'u'), (50 * MB, 'u'), GPU, tmp_path, 5 * MB).place == 'host'


def test_a_plan_in_words() -> None:
    plan = CachePlan('disk', 1500 * MB, 'layer1', torch.bfloat16, 100 * MB, 'layer4')
    assert str(plan) == (
        "activations are cached on the disk in bfloat16: 1.50 GB at most, at 'layer1'; beside that the work takes "
        "100 MB, at 'layer4'"
    )
    assert str(replace(plan, observed=16)) == f'{plan}; 16 images are observed at once, for 64 have no room'


@pytest.mark.parametrize('place', ['device', 'host', 'disk'])
def test_the_place_that_the_config_asks_for(room: Any, tmp_path: Path, place: str) -> None:
    room(device=1000, host=1000, disk=1000)
    assert plan_cache(place, (MB, 'u'), NOTHING, GPU, tmp_path, None).place == place


def test_nothing_fits(room: Any, tmp_path: Path) -> None:
    room(device=20, host=100, disk=70)
    with pytest.raises(StorageError) as error:
        plan_cache('auto', (80 * MB, 'backbone.layer1'), NOTHING, GPU, tmp_path, None)
    assert str(error.value) == (
        "expected room for 80.0 MB of activations at unit 'backbone.layer1', but there are only 10.0 MB on device, "
        '50.0 MB on host, 70.0 MB on disk; use fewer calibration images, cache_dtype bfloat16 or another cache'
    )


def test_the_asked_place_is_too_small(room: Any, tmp_path: Path) -> None:
    room(host=100, disk=1000)
    with pytest.raises(StorageError, match=r"60.0 MB of activations at unit 'u', but there are only 50.0 MB on host;"):
        plan_cache('host', (60 * MB, 'u'), NOTHING, CPU, tmp_path, None)


def test_an_unknown_place(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^expected reconstructor\.cache to be one of \['auto', 'device', 'host', 'disk'\], but got 'ram'$",
    ):
        plan_cache('ram', (1, 'u'), NOTHING, CPU, tmp_path, None)


def test_the_disk_is_used_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    reserve = os.posix_fallocate
    monkeypatch.setattr(os, 'posix_fallocate', lambda fd, start, size: sizes.append(size) or reserve(fd, start, size))
    for dtype in (torch.float32, torch.bfloat16):
        ActivationCache(CachePlan('disk', 0, 'u', dtype), CPU, tmp_path).allocate((100, 3))
    assert sizes == [4 * 300, 2 * 300]


def test_no_file_outlives_its_values(tmp_path: Path) -> None:
    """Nothing is left behind by a process that is killed."""
    values = ActivationCache(CachePlan('disk', 0, 'u'), CPU, tmp_path).allocate((4, 3))
    assert not list(tmp_path.iterdir())
    values.write(0, torch.full((4, 3), 2.0))
    assert float(values[:].sum()) == 24


def test_what_is_in_memory_touches_no_disk(tmp_path: Path) -> None:
    cache = ActivationCache(CachePlan('host', 0, 'u'), CPU, tmp_path)
    cache.allocate((4, 3))
    assert not list(tmp_path.iterdir())


def test_what_the_network_reads_is_not_copied(tmp_path: Path) -> None:
    images = torch.zeros(4, 3, 2, 2)
    cache = ActivationCache(CachePlan('disk', 0, 'u'), CPU, tmp_path)
    values, mirrored = cache.hold(images), cache.hold(images, mirror=True)
    images[1, 0, 0, 1] = 1
    assert values[:].tolist() == images.tolist()
    assert mirrored[torch.tensor([5])].tolist() == images[1:2].flip(-1).tolist()


def test_images_on_the_disk(tmp_path: Path) -> None:
    images = torch.randn(5, 3, 4, 2, generator=torch.Generator().manual_seed(0))
    copy = images_on_disk(images, tmp_path)
    assert not list(tmp_path.iterdir())
    assert torch.equal(copy, images)
    mappings = Path('/proc/self/maps').read_text()
    assert f'{copy.data_ptr():x}-' in mappings
    assert re.search(r'\.images-\w+ \(deleted\)', mappings)


@pytest.mark.parametrize(
    ('place', 'memory_limit', 'mapped'),
    [('auto', 400, False), ('auto', 383, True), ('host', 400, False), ('device', 400, False), ('disk', 400, True)],
)
def test_images_lie_where_the_cache_has_room(tmp_path: Path, place: str, memory_limit: int, mapped: bool) -> None:
    images = allocate_images((4, 3, 2, 4), torch.zeros(1), place, tmp_path, memory_limit)
    assert (images.shape, images.dtype, images.is_shared()) == ((4, 3, 2, 4), torch.float32, mapped)
    assert (images_on_disk(images, tmp_path) is images) == mapped and not list(tmp_path.iterdir())


def test_images_have_no_room(tmp_path: Path) -> None:
    with pytest.raises(
        StorageError,
        match='expected room for 384 B of calibration images, but there are only 383 B on the host; use fewer '
        'calibration images or another cache',
    ):
        allocate_images((4, 3, 2, 4), torch.zeros(1), 'host', tmp_path, 383)


def test_no_room_for_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'posix_fallocate', full)
    with pytest.raises(StorageError, match='cannot hold 393 kB of images: .*No space left on device'):
        images_on_disk(torch.zeros(8, 3, 64, 64), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'posix_fallocate', full)
    cache = ActivationCache(CachePlan('disk', 0, 'u'), CPU, tmp_path)
    with pytest.raises(StorageError, match='cannot hold 8.39 MB of activations: .*No space left on device'):
        cache.allocate((2, 1024, 1024))
    assert not list(tmp_path.iterdir())
