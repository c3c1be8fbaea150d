from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmbrecq.reconstruction.batches import Batches, takes_time
from mmbrecq.reconstruction.losses import MSELoss
from mmbrecq.reconstruction.unit_data import UnitData
from mmbrecq.reconstruction.values import FileValues, MemoryValues

CPU = torch.device('cpu')
COUNT, SIZE, STEPS = 12, 5, 6


def in_file(tensor: Tensor, folder: Path) -> FileValues:
    values = FileValues(folder / 'values.bin', tensor.shape, torch.float32, CPU)
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
            found.append(batch.tensors)
            torch.rand(3, generator=generator)
            batches.read_ahead()
    found.append([torch.rand(3, generator=generator)])
    return found


def same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize('fisher', [False, True])
@pytest.mark.parametrize('place', ['memory', 'file'])
def test_draws_in_the_order_of_the_steps(tmp_path: Path, place: str, fisher: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    data = data_of(None, fisher)
    values = [*data.quantized_inputs, *data.float_inputs, *data.targets, *(data.fisher or ())]
    expected = []
    for _ in range(STEPS):
        index = torch.randperm(COUNT, generator=generator)[:SIZE]
        expected.append([x.tensor[index] for x in values])  # type: ignore[attr-defined]
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


def test_what_takes_time(tmp_path: Path) -> None:
    plain = torch.zeros(COUNT, 2)
    away = MemoryValues(torch.zeros(COUNT, 2), torch.device('cuda'))
    assert not takes_time(UnitData([plain], [plain], [plain]))
    assert not takes_time(data_of(None))
    assert takes_time(UnitData([plain], [plain], [plain], [away]))
    assert takes_time(UnitData([plain], [plain], [in_file(plain, tmp_path)]))


@pytest.mark.parametrize('place', ['memory', 'file'])
def test_a_second_attempt_reads_anew(tmp_path: Path, place: str) -> None:
    data = data_of(tmp_path if place == 'file' else None)
    with Batches(data, SIZE, 1, torch.Generator().manual_seed(5), CPU, True) as batches:
        batches.begin()
        first = batches.current()
        expected = [tensor.clone() for tensor in first.tensors]
        first.quantized_inputs[0].zero_()
        assert same([batches.current().tensors], [expected])


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
    for whole, pieces in zip(batch.tensors, zip(*[part.tensors for part in parts], strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), whole)
    assert all(part.float_inputs[1] is part.quantized_inputs[1] for part in parts)
    outputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    total = sum(len(part) / 5 * part.loss([o], MSELoss()) for part, o in zip(parts, outputs.split(images), strict=True))
    torch.testing.assert_close(total, ((outputs - batch.targets[0]) ** 2).sum(1).mean())
