"""Two processes that share the images find what one finds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name('sharing.py')
ROOT = SCRIPT.parents[2]
Found = dict[str, Any]


@pytest.fixture(scope='module')
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found, Found]:
    """What one process has found, and each of two."""
    folder = tmp_path_factory.mktemp('sharing')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    together = {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    running = []
    for rank, extra in ((None, {}), ('0', together), ('1', together)):
        own = {} if rank is None else {**extra, 'RANK': rank, 'LOCAL_RANK': rank}
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **own}
        name = 'alone' if rank is None else 'shared'
        command = [sys.executable, str(SCRIPT), str(folder / name)]
        running.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    alone, first, second = (torch.load(folder / name, weights_only=False) for name in ('alone0', 'shared0', 'shared1'))
    return alone, first, second


def test_every_image_belongs_to_one_process(found: tuple[Found, Found, Found]) -> None:
    assert [part['share'] for part in found] == [(0, 24), (0, 12), (12, 24)]


@pytest.mark.parametrize(
    'name', ['MinMaxObserver', 'MovingAverageObserver', 'PercentileObserver', 'MSEObserver', 'HistogramObserver']
)
def test_the_scales_are_those_of_one_process(found: tuple[Found, Found, Found], name: str) -> None:
    alone, *shared = (part[name] for part in found)
    tolerance = 0.0 if name == 'MinMaxObserver' else 1e-6
    for scales in shared:
        assert scales.keys() == alone.keys() and len(scales) > 3
        for path, scale in scales.items():
            torch.testing.assert_close(scale, alone[path], rtol=tolerance, atol=0)


def test_channels_are_equalised_alike(found: tuple[Found, Found, Found]) -> None:
    alone, *shared = (part['equalized'] for part in found)
    for state in shared:
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-6, atol=1e-7)
    untouched = found[0]['MSELoss']
    assert untouched is not None


@pytest.mark.parametrize('loss', ['MSELoss', 'FisherLoss', 'FisherLowRankLoss'])
def test_steps_over_all_images_learn_the_same(found: tuple[Found, Found, Found], loss: str) -> None:
    alone, first, second = (part[loss] for part in found)
    assert first['losses'] == second['losses'] and first['digest'] == second['digest']
    assert first['distance'] == second['distance']
    assert len(alone['losses']) == len(first['losses']) > 4
    for (before, after), (expected_before, expected_after) in zip(first['losses'], alone['losses'], strict=True):
        # the first unit starts alike; from then on sums in another order may round a weight the other way
        assert before == pytest.approx(expected_before, rel=0.05)
        assert after == pytest.approx(expected_after, rel=0.05)
    assert first['losses'][0] == pytest.approx(alone['losses'][0], rel=1e-4)
    assert first['distance'] == pytest.approx(alone['distance'], rel=0.1)
    assert any(after < 0.9 * before for before, after in alone['losses'])


def test_an_error_in_the_first_process_reaches_all(found: tuple[Found, Found, Found]) -> None:
    assert {part['refusals']['on main'] for part in found} == {'expected this from process 0'}


def test_models_that_differ_are_refused(found: tuple[Found, Found, Found]) -> None:
    alone, first, second = (part['refusals'] for part in found)
    assert 'bits' not in alone
    assert first['bits'] == 'expected the same model in all processes, but 0 and 1 differ'
    assert second['bits'] == 'expected the same model in all processes, but 1 and 0 differ'


def test_groups_are_calibrated_as_by_one_process_and_learned_in_step(found: tuple[Found, Found, Found]) -> None:
    """The first process has images of one group, the second of both."""
    alone, first, second = (part['groups'] for part in found)
    assert [part['groups'] for part in (alone, first, second)] == [2, 1, 2]
    for part in (first, second):
        for name, tensor in part['calibrated'].items():
            torch.testing.assert_close(tensor, alone['calibrated'][name], rtol=1e-6, atol=1e-7)
    assert first['losses'] == second['losses'] and first['digest'] == second['digest']
    # what the distance of outputs weighs by depends on the batch
    assert first['losses'][0][0] == pytest.approx(alone['losses'][0][0], rel=0.05)
    assert sum(after < before for before, after in first['losses']) >= 4
