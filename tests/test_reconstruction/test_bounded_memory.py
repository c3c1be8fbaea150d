"""The limit of memory, enforced by the system on a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name('bounded_run.py')
LIMIT = 48 * 2**20
pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='limits are set and read as Linux has them')


def run(place: str, folder: Path) -> dict[str, Any]:
    # one thread and one arena: every further one reserves 64 MiB of address space for itself
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'MALLOC_ARENA_MAX': '1'}
    environment['PYTHONPATH'] = os.pathsep.join([str(SCRIPT.parents[2]), environment.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, SCRIPT, place, folder], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_activations_of_ten_times_the_limit_go_through_the_disk(tmp_path: Path) -> None:
    found = run('auto', tmp_path)
    assert (found['place'], found['units']) == ('disk', 4)
    assert found['cached'] > 10 * LIMIT
    assert found['working'] <= LIMIT
    assert found['grown'] <= found['working']
    # 64 images, whose work on the second layer alone takes more than the limit, are not observed at once
    assert found['observed'] < 64
    assert not list(tmp_path.iterdir())


def test_a_cache_that_breaks_the_limit_is_refused_before_the_work(tmp_path: Path) -> None:
    refused = run('host', tmp_path)['refused']
    assert refused.startswith('expected room for ')
    assert "of activations at unit 'backbone." in refused
    assert 'MB on host; use fewer calibration images' in refused
