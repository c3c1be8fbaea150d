"""tools/ptq.py under torchrun, on the digits demo."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finished_runs import kill_often

ROOT = Path(__file__).resolve().parents[2]
STEPS = ('weights.iterations=100', 'activations.iterations=50')


def options(batch_size: int) -> list[str]:
    """Every step takes all images, so that one process and two take the same steps."""
    sizes = (f'{stage}.batch_size={batch_size}' for stage in ('weights', 'activations'))
    return ['calibration.num_samples=32', 'exporters=[]', *(f'reconstructor.{text}' for text in (*STEPS, *sizes))]


@pytest.fixture(scope='module')
def torchrun(tmp_path_factory: pytest.TempPathFactory, environment: None) -> Callable[..., Any]:
    """Runs a tool in two processes."""

    def start(name: str, *args: object) -> subprocess.CompletedProcess[str]:
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={port}']
        tool = [str(ROOT / 'tools' / f'{name}.py'), *map(str, args)]
        return subprocess.run([*command, *tool], capture_output=True, text=True, check=False, timeout=300)

    return start


@pytest.fixture(scope='module')
def work(torchrun: Any, run: Any, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work dirs of a run in two processes, and of one in one."""
    folder = tmp_path_factory.mktemp('processes')
    done = torchrun('ptq', demo, '--launcher', 'pytorch', '--work-dir', folder / 'two', '--cfg-options', *options(16))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('| BRECQ full') == 1
    outcome = run('ptq', demo, '--work-dir', folder / 'one', '--cfg-options', *options(32))
    assert outcome.status == 0, outcome.err
    return folder


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / 'summary.json').read_text())
    return summary


def test_two_processes_reach_what_one_does(work: Path) -> None:
    one, two = (summary_of(work / name) for name in ('one', 'two'))
    for name in ('weights', 'quantized'):
        found, expected = (summary['metrics'][name]['accuracy/top1'] for summary in (two, one))
        assert abs(found - expected) <= 0.3, name
    assert two['metrics']['quantized']['accuracy/top1'] > two['metrics']['nearest']['accuracy/top1'] + 10


def test_sharded_evaluation_gives_the_metric_of_one_process_exactly(work: Path) -> None:
    one, two = (summary_of(work / name)['metrics'] for name in ('one', 'two'))
    # nothing is learned yet: the same model, to the last bit of its grids
    assert two['float'] == one['float'] and two['nearest'] == one['nearest']


def test_the_checkpoint_is_measured_in_two_processes_and_in_one(
    torchrun: Any, call: Any, demo: Path, work: Path
) -> None:
    checkpoint = work / 'two' / 'quantized.pth'
    done = torchrun('test', demo, checkpoint, '--launcher', 'pytorch', '--work-dir', work / 'test')
    assert done.returncode == 0, done.stderr
    alone = call('test', demo, checkpoint)
    expected = summary_of(work / 'two')['metrics']['quantized']['accuracy/top1']
    for said in (done.stdout, alone.out):
        assert f'accuracy/top1: {expected!r}' in said


def test_a_run_of_one_process_does_not_go_on_in_two(
    call: Any, demo: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('mmbrecq.engine.ptq_loop.process_count', lambda: 2)
    error = call('ptq', demo, *options(32), '--resume', work_dir=work / 'one').error
    assert 'is of another run: number of processes was 1 and is 2 now' in error


def test_two_processes_that_are_killed_end_bit_for_bit_where_others_end(demo: Path, tmp_path: Path) -> None:
    lines = ('rehearsed', 'weights 3/10', 'weights 10/10', 'weights: ', 'activations 5/10', 'quantized: ')
    kill_often(demo, tmp_path, processes=2, iterations=(6, 3), lines=lines)


def test_a_choice_of_bits_is_made_in_one_process(call: Any, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mmbrecq.engine.bit_search.process_count', lambda: 2)
    assert call('analyze', demo).error.startswith('expected one process to choose bits, but got 2: run ')
