from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.logging import MMLogger
from torch import Tensor

from mmbrecq.errors import StorageError
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction import QDropReconstructor, Task
from mmbrecq.reconstruction.batches import Batches, MicroBatches, UnitData, is_slow
from mmbrecq.reconstruction.cache import ActivationCache
from mmbrecq.reconstruction.losses import MSELoss
from mmbrecq.reconstruction.streams import Streams
from mmbrecq.reconstruction.values import FileValues, MemoryValues

CPU = torch.device('cpu')
COUNT, SIZE, STEPS = 12, 5, 6


def in_file(tensor: Tensor, folder: Path) -> FileValues:
    values = FileValues(folder, tensor.shape, torch.float32, CPU)
    values.write(0, tensor)
    return values


def data_of(folder: Path | None, fisher: bool = False) -> UnitData:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(COUNT, *shape, generator=generator) for shape in ((3, 2), (3, 2), (4,), (4,))]
    quantized, floats, targets, weights = (
        MemoryValues(x, CPU) if folder is None else in_file(x, folder) for x in tensors
    )
    # the second input is the same in both streams
    return UnitData([quantized, targets], [floats, targets], [targets], [weights] if fisher else None)


def walk(data: UnitData, floats: bool = True) -> list[list[Tensor]]:
    """The batches of all steps, with other draws in between, as masks are."""
    generator = torch.Generator().manual_seed(5)
    found = []
    with Batches(data, SIZE, STEPS, generator, CPU, floats) as batches:
        for _ in range(STEPS):
            batches.begin()
            batch = batches.current()
            found.append(batch.values)
            torch.rand(3, generator=generator)
            batches.prefetch()
    found.append([torch.rand(3, generator=generator)])
    return found


def same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize('fisher', [False, True])
@pytest.mark.parametrize('place', ['memory', 'file'])
def test_draws_in_the_order_of_the_steps(tmp_path: Path, place: str, fisher: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    data = data_of(None, fisher)
    expected = []
    for _ in range(STEPS):
        index = torch.randperm(COUNT, generator=generator)[:SIZE]
        expected.append([x.tensor[index] for x in data.values])
        torch.rand(3, generator=generator)
    # no more is drawn than is used
    expected.append([torch.rand(3, generator=generator)])
    assert same(walk(data_of(tmp_path if place == 'file' else None, fisher)), expected)


def test_float_inputs_are_read_where_they_are_wanted(tmp_path: Path) -> None:
    data = data_of(None)
    batch = data.read(torch.tensor([3, 1]), floats=True)
    assert batch.float_inputs[1] is batch.quantized_inputs[1]
    assert batch.float_inputs[0] is not batch.quantized_inputs[0]
    assert data.read(torch.tensor([3, 1]), floats=False).float_inputs == []


def test_files_are_read_by_a_thread_while_a_step_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    read = UnitData.read

    def noted(self: UnitData, *args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return read(self, *args)

    monkeypatch.setattr(UnitData, 'read', noted)
    walk(data_of(tmp_path))
    assert len(threads) == STEPS
    assert all(name.startswith('batches') for name in threads)
    assert not [t for t in threading.enumerate() if t.name.startswith('batches')]
    threads.clear()
    # in memory nothing would be gained
    walk(data_of(None))
    assert set(threads) == {threading.main_thread().name}


def test_what_is_slow(tmp_path: Path) -> None:
    plain = torch.zeros(COUNT, 2)
    away = MemoryValues(torch.zeros(COUNT, 2), torch.device('cuda'))
    assert not is_slow(UnitData([plain], [plain], [plain]))
    assert not is_slow(data_of(None))
    assert is_slow(UnitData([plain], [plain], [plain], [away]))
    assert is_slow(UnitData([plain], [plain], [in_file(plain, tmp_path)]))


@pytest.mark.parametrize('place', ['memory', 'file'])
def test_a_second_attempt_reads_anew(tmp_path: Path, place: str) -> None:
    data = data_of(tmp_path if place == 'file' else None)
    with Batches(data, SIZE, 1, torch.Generator().manual_seed(5), CPU, True) as batches:
        batches.begin()
        first = batches.current()
        expected = [tensor.clone() for tensor in first.values]
        first.quantized_inputs[0].zero_()
        assert same([batches.current().values], [expected])


def test_an_error_of_the_thread_is_raised(tmp_path: Path) -> None:
    data = data_of(tmp_path)
    generator = torch.Generator().manual_seed(5)
    with (
        pytest.raises(IndexError),
        Batches(UnitData([torch.zeros(1, 2)], [], data.targets), SIZE, 2, generator, CPU, False) as batches,
    ):
        batches.begin()
        batches.current()


@pytest.mark.parametrize('images', [1, 2, 4, 5, 9])
def test_parts_make_up_the_batch(images: int) -> None:
    batch = data_of(None, fisher=True).read(torch.tensor([3, 1, 0, 7, 11]), floats=True)
    parts = list(batch.parts(images))
    assert [len(part) for part in parts] == [min(images, 5 - start) for start in range(0, 5, images)]
    for whole, pieces in zip(batch.values, zip(*[part.values for part in parts], strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), whole)
    assert all(part.float_inputs[1] is part.quantized_inputs[1] for part in parts)
    outputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    total = sum(len(part) / 5 * part.loss([o], MSELoss()) for part, o in zip(parts, outputs.split(images), strict=True))
    torch.testing.assert_close(total, ((outputs - batch.targets[0]) ** 2).sum(1).mean())


Prepare = Callable[..., QuantizedModel]
MakeTask = Callable[..., Task]
OPTIONS: dict[str, Any] = {'iterations': 20, 'batch_size': 10, 'lr': 1e-2}


class Silent:
    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


@contextmanager
def small_gpu(model: QuantizedModel, path: str, most: int, training: bool = False) -> Iterator[list[int]]:
    """A module that runs out of memory above so many images; gives the batches that it had room for."""
    sizes: list[int] = []

    def check(module: Any, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > most and (torch.is_grad_enabled() or not training):
            raise torch.cuda.OutOfMemoryError('CUDA out of memory')
        sizes.append(len(args[0]))

    handle = model.model.get_submodule(path).register_forward_pre_hook(check)
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.fixture
def log() -> Iterator[list[str]]:
    """Warnings that the run's logger got."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = MMLogger.get_instance('memory')
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_half_as_many_until_it_fits(log: list[str]) -> None:
    tried = []

    def work(images: int) -> str:
        tried.append(images)
        if images > 3:
            raise torch.cuda.OutOfMemoryError
        return 'done'

    fitting = MicroBatches('layer1', 25)
    assert fitting.run(work) == 'done'
    assert tried == [25, 13, 7, 4, 2]
    assert (fitting.images, fitting.split) == (2, True)
    # what it has learned is kept
    fitting.run(work)
    assert tried[5:] == [2]
    assert log[-1] == "the GPU has no room for a batch of unit 'layer1': it takes 2 images at once now"
    assert len(log) == 4


def test_a_single_image_that_does_not_fit() -> None:
    def work(images: int) -> None:
        raise torch.cuda.OutOfMemoryError

    with pytest.raises(StorageError, match=r"^expected room on the GPU for the work on unit 'layer1', but a single"):
        MicroBatches('layer1', 2).run(work)


def test_other_errors_pass() -> None:
    def work(images: int) -> None:
        raise RuntimeError('of another kind')

    fitting = MicroBatches('layer1', 2)
    with pytest.raises(RuntimeError, match='of another kind'):
        fitting.run(work)
    assert not fitting.split


def test_a_failed_attempt_leaves_nothing_behind() -> None:
    left: list[weakref.ref[Tensor]] = []

    def work(images: int) -> int:
        gc.collect()
        assert not [tensor for tensor in left if tensor() is not None]
        activations = torch.zeros(images)
        left.append(weakref.ref(activations))
        if images > 1:
            raise torch.cuda.OutOfMemoryError
        return 0

    MicroBatches('layer1', 8).run(work)
    assert len(left) == 4


def test_a_pass_gives_the_same(prepared: Prepare, images: Tensor, host: ActivationCache) -> None:
    model = prepared()
    results = []
    for most in (24, 4):
        streams = Streams(model.image_graph, model.image_graph.units, host.hold(images), host, 10)
        with small_gpu(model, 'backbone.stem', most) as sizes:
            (output,) = streams.run(model.image_graph.units[0], [images], weights=True, activations=False)
        results.append((output[:], sizes, streams.micro_batches(model.image_graph.units[0]).split))
    (expected, whole, not_split), (got, parts, split) = results
    torch.testing.assert_close(got, expected)
    assert (whole, not_split) == ([10, 10, 4], False)
    assert (parts, split) == ([3, 3, 3, 1, 3, 3, 3, 1, 3, 1], True)


def test_a_training_in_parts_takes_the_same_steps(prepared: Prepare, task: MakeTask) -> None:
    """Without masks, whose draws depend on the parts, only the order of sums differs."""
    found = []
    for most in (24, 3):
        work = task(prepared())
        with small_gpu(work.model, 'backbone.second.conv1', most, training=True) as sizes:
            found.append(run(QDropReconstructor({**OPTIONS, 'drop_prob': 0.0}), work))
    whole, parts = found
    assert [r.images_at_once for r in whole] == [None] * 4
    assert [r.images_at_once for r in parts] == [None, None, 3, None]
    assert {1, 3, 10} <= set(sizes)
    for expected, result in zip(whole, parts, strict=True):
        assert result.loss_after == pytest.approx(expected.loss_after, rel=1e-3)


def run(reconstructor: QDropReconstructor, work: Task) -> Any:
    return reconstructor.run(work, reconstructor.plan(work), Silent())


@pytest.mark.parametrize('place', ['host', 'disk'])
def test_dropping_goes_on(prepared: Prepare, task: MakeTask, place: str) -> None:
    work = task(prepared())
    reconstructor = QDropReconstructor({**OPTIONS, 'lr': 4e-2, 'iterations': 60, 'round_weight': 0.05}, cache=place)
    with small_gpu(work.model, 'backbone.first.conv2', 4):
        results = run(reconstructor, work)
    assert [r.images_at_once for r in results] == [None, 3, None, None]
    assert results[1].loss_after < results[1].loss_before
