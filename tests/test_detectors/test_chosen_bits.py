"""Bits of the demo's detectors, chosen and reconstructed in one command."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from demo_runs import CONFIGS, QUICK, summary_of


@pytest.mark.parametrize(
    ('name', 'bitops', 'loss', 'kind'),
    [
        ('retinanet_scenes_w4a8', 0.05, 'fisher', 'Fisher-weighted error'),
        ('faster_rcnn_scenes_w4a8', 0.03, 'outputs', 'distance'),
    ],
)
def test_bits_are_chosen_in_one_command(
    call: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, bitops: float,
    loss: str, kind: str,
) -> None:  # fmt: skip
    """The layers of heads that read features of regions among them."""
    path, checkpoint = CONFIGS / f'{name}.py', CONFIGS / f'{name.removesuffix("_w4a8")}.pth'
    config, work = tmp_path / 'config.py', tmp_path / 'work'
    budgets = {'size': '0.2x', 'bitops': f'{bitops}x'}
    search = {'candidates': [2, 8], 'activation_candidates': [4, 8], 'pairs': False, 'loss': loss, 'budgets': budgets}
    config.write_text(f'_base_ = [{str(path)!r}]\nfloat_checkpoint = {str(checkpoint)!r}\nsearch = {search}\n')
    monkeypatch.chdir(folder)
    outcome = call('ptq', config, *QUICK, work_dir=work)
    assert outcome.status == 0, outcome.err
    summary = summary_of(work)
    chosen = summary['search']
    assert chosen['kind'] == kind
    assert set(chosen['bits'].values()) == {2, 8}
    assert set(chosen['activation_bits'].values()) == {4, 8}
    assert summary['model_size_bytes']['quantized'] == chosen['spent']['size'] <= chosen['budgets']['size']
    assert chosen['spent']['bitops'] <= chosen['budgets']['bitops']
    assert 0 < chosen['measured'] < math.inf
    if name.startswith('faster'):
        assert any('roi_head' in layer for layer in chosen['bits'])
    first = [unit['name'] for unit in summary['units'] if unit['stage'] == 'weights']
    searched = set(chosen['bits'])
    assert first, 'what the config fixes is reconstructed'
    assert not any(set(unit['layers']) & searched for unit in summary['units'] if unit['name'] in first)
