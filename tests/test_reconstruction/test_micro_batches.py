from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from mmengine.logging import MMLogger
from torch import Tensor

from mmbrecq.errors import StorageError
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction import QDropReconstructor, Task
from mmbrecq.reconstruction.cache import ActivationCache
from mmbrecq.reconstruction.micro_batches import MicroBatches
from mmbrecq.reconstruction.streams import Streams

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
