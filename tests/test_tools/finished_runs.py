"""Compares two runs, and kills a run in each of its phases."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
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


def kill_often(demo: Path, folder: Path, processes: int, iterations: tuple[int, int], lines: Sequence[str]) -> None:
    """Kills the demo a random moment after each of these lines of its log; it ends as a run that is left alone."""
    first, second = iterations
    steps = (f'reconstructor.weights.iterations={first}', f'reconstructor.activations.iterations={second}')
    options = [demo, '--cfg-options', *TINY, *steps]
    command = [sys.executable, KILLER, processes, folder / 'killed', ';'.join(lines), *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    resumed = [int(count) for count in re.findall(r'resumed: (\d+) units are done', done.stdout)]
    assert resumed == sorted(resumed) and resumed[-1] == 20
    assert len(set(resumed)) > len(lines) // 3, 'the moments did not lie within the reconstruction'
    assert_same(folder / 'killed', folder / 'killed-whole')
