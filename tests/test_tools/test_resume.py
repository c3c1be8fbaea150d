"""Runs that are killed and go on: they end where an uninterrupted one ends, or say why they do not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import TINY, kill_often, results

from mmbrecq.runs import identity


def test_a_run_that_is_killed_ends_bit_for_bit_where_another_ends(demo: Path, tmp_path: Path) -> None:
    lines = (
        'rehearsed', 'float: ', 'nearest: ', 'weights 1/10', 'weights 4/10', 'weights 9/10', 'weights 10/10',
        'weights: ', 'activations 1/10', 'activations 6/10', 'activations 10/10', 'quantized: ',
    )  # fmt: skip
    kill_often(demo, tmp_path, processes=1, iterations=(10, 5), lines=lines)


@pytest.fixture
def cut(finished: Any) -> Callable[[int], Path]:
    """The demo's work dir as a kill after so many units would have left it."""

    def make(count: int) -> Path:
        path = finished.folder / 'reconstruction.pth'
        saved = torch.load(path, weights_only=True)
        saved['units'] = saved['units'][:count]
        torch.save(saved, path)
        (finished.folder / 'quantized.pth').unlink()
        folder: Path = finished.folder
        return folder

    return make


SHORT = ('calibration.num_samples=64', 'reconstructor.weights.iterations=20', 'reconstructor.activations.iterations=10')


@pytest.mark.parametrize('count', [3, 17])
def test_what_is_done_is_not_done_again(
    run: Any, cut: Callable[[int], Path], demo: Path, demo_run: Any, count: int
) -> None:
    folder = cut(count)
    options = (*SHORT, 'exporters=[]', 'reconstructor.cache=disk')
    # in a process of its own, as the run that is gone on with: the number of threads changes last bits
    outcome = run('ptq', demo, '--resume', '--work-dir', folder, '--cfg-options', *options)
    assert outcome.status == 0, outcome.err
    assert f'resumed: {count} units are done' in outcome.out
    assert len(re.findall(r'\d+/10 \S+: loss', outcome.out)) == 20 - count
    state, summary = results(folder)
    expected, expected_summary = results(demo_run.folder)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    del expected_summary['metrics']['deployed'], summary['metrics']['deployed']
    assert summary == expected_summary


@pytest.mark.parametrize(
    ('option', 'said'),
    [
        ('quantizer.weight.bits=3', 'quantizer.weight.bits was 2 and is 3 now'),
        ('seed=1', 'seed was 0 and is 1 now'),
        ('calibration.num_samples=65', 'calibration.num_samples was 64 and is 65 now'),
        ('reconstructor.weights.lr=0.002', 'reconstructor.weights.lr was 0.003 and is 0.002 now'),
    ],
)
def test_another_run_is_refused(call: Any, cut: Callable[[int], Path], demo: Path, option: str, said: str) -> None:
    folder = cut(4)
    before = (folder / 'reconstruction.pth').read_bytes()
    outcome = call('ptq', demo, *SHORT, option, '--resume', work_dir=folder)
    assert outcome.status == 2
    assert outcome.error.startswith(f'{folder}/reconstruction.pth is of another run: {said}')
    assert (folder / 'reconstruction.pth').read_bytes() == before


def test_other_float_weights_are_refused(call: Any, cut: Callable[[int], Path], demo: Path, tmp_path: Path) -> None:
    folder = cut(4)
    checkpoint = torch.load(demo.parent / 'resnet_digits.pth', weights_only=True)
    checkpoint['state_dict']['head.fc.bias'][0] += 1e-6
    torch.save(checkpoint, tmp_path / 'other.pth')
    option = f'float_checkpoint={tmp_path / "other.pth"}'
    error = call('ptq', demo, *SHORT, option, '--resume', work_dir=folder).error
    assert error.startswith(f'{folder}/reconstruction.pth is of another run: float weights was ')


def test_other_kernels_are_refused(
    call: Any, cut: Callable[[int], Path], demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cut(4)
    monkeypatch.setattr(identity, 'kernel_state', lambda: 'another')
    error = call('ptq', demo, *SHORT, '--resume', work_dir=folder).error
    state = json.loads((folder / 'summary.json').read_text())['versions']['kernels']
    assert error.startswith(f'{folder}/reconstruction.pth is of another run: kernels was {state} and is another now; ')


def test_nothing_to_resume_is_a_new_run(call: Any, demo: Path, tmp_path: Path) -> None:
    options = (*TINY, 'reconstructor.weights.iterations=2', 'reconstructor.activations.iterations=2', 'evaluations=[]')
    outcome = call('ptq', demo, *options, '--resume', work_dir=tmp_path / 'new')
    assert outcome.status == 0, outcome.err
    assert 'nothing to resume: there is no ' in outcome.out
    shutil.rmtree(tmp_path / 'new')
