"""Captured iterations read the batches, masks and numbers that eager ones would; graphs themselves need a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmbrecq.data.groups import Grouped
from mmbrecq.fake_quants.masks import RandomMasks
from mmbrecq.reconstruction import capture
from mmbrecq.reconstruction.batches import Batches, UnitData
from mmbrecq.reconstruction.capture import FEWEST, SWITCH, WARM_UP, Replay, can_capture
from mmbrecq.reconstruction.values import FileValues, MemoryValues

CPU, COUNT, STEPS = torch.device('cpu'), 20, 9


class Stream:
    """Work is done at once."""

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


class Iterations:
    """Notes what every iteration reads; while one is captured nothing is, and replaying it calls it again."""

    def __init__(self, batches: Batches, masks: RandomMasks) -> None:
        self.batches, self.masks, self.seen = batches, masks, []
        self.capturing, self.numbers = False, ()

    def __call__(self, *numbers: Any) -> Tensor:
        source, batch = self.batches.fixed, self.batches.current()
        masks = [self.masks.draw(x) for x in batch.quantized_inputs]
        if self.capturing:
            self.numbers, self.read = numbers, (source, masks)
        else:
            own = [float(number) for number in numbers if number is not None]
            self.seen.append([*(x.clone() for x in (*batch.values, *masks)), torch.tensor(own)])
            # as mixing does
            batch.quantized_inputs[0].zero_()
        self.batches.prefetch()
        return torch.zeros(())

    def replay(self) -> None:
        """Reads what the capture read, again."""
        self.batches.fixed, self.masks.fixed = self.read[0], iter(self.read[1])
        self(*self.numbers)
        self.batches.fixed = self.masks.fixed = None


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Iterations]]:
    """Takes the place of CUDA graphs: the iterations in the list are captured."""
    captured: list[Iterations] = []

    @contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        captured[0].capturing = True
        yield
        captured[0].capturing = False

    for name, value in (
        ('Stream', Stream),
        ('current_stream', Stream),
        ('stream', lambda _: nullcontext()),
        ('CUDAGraph', lambda: captured[0]),
        ('graph', graph),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    yield captured


def values(place: str, folder: Path, *shape: int) -> Any:
    tensor = torch.randn(COUNT, *shape, generator=torch.Generator().manual_seed(sum(shape)))
    if place == 'memory':
        return MemoryValues(tensor, CPU)
    found = FileValues(folder, tensor.shape, torch.float32, CPU)
    found.write(0, tensor)
    return found


def walk(folder: Path, place: str, graphs: list[Iterations] | None) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shared = values(place, folder, 4)
    data = UnitData([values(place, folder, 5, 7), shared], [values(place, folder, 7, 5), shared], [shared])
    masks = RandomMasks(0.5, generator)
    with Batches(data, 6, STEPS, generator, CPU, True) as batches:
        iterations: Any = Iterations(batches, masks)
        if graphs is not None:
            graphs[:] = [iterations]
        run = iterations if graphs is None else Replay('unit', iterations, batches, masks, CPU)
        for step in range(STEPS):
            batches.begin()
            run(1.0 + step, 0.5, 0.25 * step)
    return iterations.seen


@pytest.mark.parametrize('place', ['memory', 'file'])
def test_replays_read_what_eager_iterations_would(place: str, graphs: list[Iterations], tmp_path: Path) -> None:
    found, wanted = walk(tmp_path, place, graphs), walk(tmp_path, place, None)
    assert len(found) == len(wanted) == STEPS
    for one, other in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_warm_up_has_no_regulariser(graphs: list[Iterations], tmp_path: Path) -> None:
    data = UnitData([values('memory', tmp_path, 2)], [], [values('memory', tmp_path, 2)])
    with Batches(data, 6, STEPS, torch.Generator(), CPU, False) as batches:
        masks = RandomMasks(0.5, torch.Generator())
        iterations = Iterations(batches, masks)
        graphs[:] = [iterations]
        run = Replay('unit', iterations, batches, masks, CPU)
        for _ in range(WARM_UP + 1):
            batches.begin()
            run(None, 0.5, 0.25)
    # the weight of the regulariser alone switches it off there, since the graph stays the same
    assert iterations.seen[-1][-1].tolist() == [2.0, 0.0, 0.25]


def test_a_failed_capture_costs_no_draw(
    graphs: list[Iterations], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []
    monkeypatch.setattr(capture, 'print_log', lambda text, *_: told.append(text))

    @contextmanager
    def refuse(*_: Any, **__: Any) -> Iterator[None]:
        raise RuntimeError('operation not permitted when stream is capturing')
        yield

    monkeypatch.setattr(torch.cuda, 'graph', refuse)
    found, wanted = walk(tmp_path, 'file', graphs), walk(tmp_path, 'file', None)
    for one, other in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert told == [
        "unit 'unit' is launched operation by operation, for no CUDA graph can hold its iterations: "
        'operation not permitted when stream is capturing'
    ]


def test_what_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gpu = torch.zeros(4, 2), torch.device('cuda')
    one, several = UnitData([x], [], [x]), UnitData([x], [], [Grouped([x, x], [4, 8])])
    assert can_capture(one, FEWEST, gpu)
    assert not can_capture(one, FEWEST - 1, gpu) and not can_capture(one, FEWEST, CPU)
    assert not can_capture(several, FEWEST, gpu)
    monkeypatch.setattr(capture, 'process_count', lambda: 2)
    assert not can_capture(one, FEWEST, gpu)
    monkeypatch.undo()
    monkeypatch.setenv(SWITCH, '0')
    assert not can_capture(one, FEWEST, gpu)
