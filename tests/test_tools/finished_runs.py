"""Compares two runs, and kills a run over and over."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

KILLER = Path(__file__).with_name('killing.py')
TINY = (
    'calibration.num_samples=32', 'calibration.batch_size=16', 'reconstructor.weights.batch_size=8',
    'reconstructor.activations.batch_size=8', 'exporters=[]',
)  # fmt: skip


def results(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what the run has learned, and what it reports but for times and memory."""
    state = torch.load(folder / 'quantized.pth', weights_only=True)['state_dict']
    summary = json.loads((folder / 'summary.json').read_text())
    for unit in summary['units']:
        del unit['seconds']
    return state, {key: summary[key] for key in ('metrics', 'units', 'bits', 'warnings', 'float_layers')}


def assert_same(folder: Path, other: Path) -> None:
    (state, summary), (expected, expected_summary) = results(folder), results(other)
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert summary == expected_summary


def kill_often(demo: Path, folder: Path, processes: int, iterations: tuple[int, int], kills: int) -> None:
    """Kills the demo at random moments until it was killed so often; it ends as a run that is left alone."""
    first, second = iterations
    # without exporters most of a run is its reconstruction
    steps = (f'reconstructor.weights.iterations={first}', f'reconstructor.activations.iterations={second}')
    command = [sys.executable, KILLER, processes, kills, folder / 'killed', demo, '--cfg-options', *TINY, *steps]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    assert f'killed {kills} times' in done.stdout
    taken_up = {int(count) for count in re.findall(r'resumed: (\d+) units are done', done.stdout)}
    assert len(taken_up - {0}) > 2, 'the moments did not lie within the reconstruction'
    assert_same(folder / 'killed', folder / 'killed-whole')
