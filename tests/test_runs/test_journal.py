"""The file by which an interrupted run goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmbrecq.errors import CheckpointError
from mmbrecq.reconstruction.callbacks import Progress
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.reconstruction.stages import Stage, StageOptions
from mmbrecq.runs import run_files as module
from mmbrecq.runs.run_files import Journal

IDENTITY = {'quantizer.weight.bits': '2', 'seed': '3', 'float weights': 'abc'}


MODEL: Any = object()
STAGE: Any = Stage('weights', StageOptions(), True, False)


def result(name: str) -> UnitResult:
    return UnitResult(name, 'weights', ('a', 'b'), 2.0, 0.1, 50, 0.25, False, 4.0)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A journal of two units and a metric."""
    monkeypatch.setattr(module, 'unit_state', lambda model, unit: {f'{unit.name}.scale': torch.tensor([1 / 3])})
    path = tmp_path / 'reconstruction.pth'
    journal = Journal(path, MODEL, IDENTITY, 'seed = 3')
    journal.metrics['float'] = {'accuracy/top1': 100 / 3}
    journal.observed = 16
    for name in ('first', 'second'):
        unit: Any = SimpleNamespace(name=name)
        journal.after_unit(STAGE, unit, result(name), Progress(1, 1))
    return path


def test_everything_comes_back(written: Path) -> None:
    journal = Journal(written, MODEL, IDENTITY, '')
    assert journal.load()
    assert list(journal.units) == [('weights', 'first'), ('weights', 'second')]
    assert journal.units['weights', 'second'].result == result('second')
    assert torch.equal(journal.units['weights', 'first'].state['first.scale'], torch.tensor([1 / 3]))
    assert journal.metrics == {'float': {'accuracy/top1': 100 / 3}}
    assert journal.observed == 16


def test_units_are_added_to_those_of_the_interrupted_run(written: Path) -> None:
    journal = Journal(written, MODEL, IDENTITY, '')
    journal.load()
    unit: Any = SimpleNamespace(name='third')
    journal.after_unit(STAGE, unit, result('third'), Progress(1, 1))
    again = Journal(written, MODEL, IDENTITY, '')
    assert again.load() and [name for _, name in again.units] == ['first', 'second', 'third']


def test_nothing_to_take_up(tmp_path: Path) -> None:
    journal = Journal(tmp_path / 'none.pth', MODEL, IDENTITY, '')
    assert not journal.load() and not journal.units


def test_what_a_killed_process_left_half_written_goes(written: Path) -> None:
    partial, other = written.with_name('.reconstruction.pth.17.partial'), written.with_name('.other.17.partial')
    for path in (partial, other):
        path.write_bytes(b'half')
    assert Journal(written, MODEL, IDENTITY, '').load()
    assert not partial.exists() and other.exists()


@pytest.mark.parametrize(
    ('changed', 'said'),
    [
        ({'seed': '4'}, 'seed was 3 and is 4 now'),
        ({'float weights': 'abd'}, 'float weights was abc and is abd now'),
        ({'quantizer.weight.bits': '4'}, 'quantizer.weight.bits was 2 and is 4 now'),
        ({'reconstructor.mirror': 'True'}, 'reconstructor.mirror was not set and is True now'),
    ],
)
def test_another_run_is_refused_by_name(written: Path, changed: dict[str, str], said: str) -> None:
    before = written.read_bytes()
    journal = Journal(written, MODEL, {**IDENTITY, **changed}, '')
    with pytest.raises(CheckpointError) as error:
        journal.load()
    assert str(error.value) == (
        f'{written} is of another run: {said}; go on as it was begun, or start again without --resume'
    )
    assert not journal.units and written.read_bytes() == before


@pytest.mark.parametrize('content', [b'', b'no checkpoint'])
def test_a_broken_file_is_refused(written: Path, content: bytes) -> None:
    written.write_bytes(content)
    with pytest.raises(CheckpointError, match='expected the state of an interrupted run, but it cannot be read'):
        Journal(written, MODEL, IDENTITY, '').load()


def test_another_checkpoint_is_refused(written: Path) -> None:
    torch.save({'state_dict': {}, 'meta': {}}, written)
    with pytest.raises(CheckpointError, match='cannot be read'):
        Journal(written, MODEL, IDENTITY, '').load()
