"""What a run on a folder of images shows on a terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pty = pytest.importorskip('pty', reason='the system has no pseudo-terminals')

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = (
    'evaluations=[float,quantized]', 'exporters=[]', 'reconstructor.weights.iterations=2',
    'reconstructor.activations.iterations=2', 'reconstructor.weights.batch_size=8',
)  # fmt: skip


def on_terminal(command: list[str]) -> tuple[int, str]:
    """Status of a command whose three streams are a terminal, and all that it wrote there."""
    master, slave = pty.openpty()
    environment = {**os.environ, 'TERM': 'xterm', 'COLUMNS': '160', 'LINES': '40'}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        written = bytearray()
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # Linux says so when the last writer is gone
                break
            if not part:
                break
            written += part
    os.close(master)
    return process.returncode, written.decode()


def test_bars_for_calibration_evaluation_and_every_unit(folder_config: tuple[Path, Path], tmp_path: Path) -> None:
    path, root = folder_config
    work = tmp_path / 'work'
    tool = [sys.executable, str(ROOT / 'tools' / 'ptq.py'), str(path), '--work-dir', str(work)]
    status, shown = on_terminal([*tool, '--cfg-options', *OPTIONS])
    assert status == 0, shown
    plain = re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', shown)
    drawn = [line.strip() for line in re.split(r'[\r\n]+', plain) if '━' in line]
    titles = ('calibration images', 'calibration', 'evaluation: float', 'evaluation: quantized', 'weights head.fc')
    for title in (*titles, 'weights backbone.layer4.1', 'activations backbone.conv1'):
        assert any(re.match(rf'{re.escape(title)} ━+ ', line) for line in drawn), title
    # steps done, time spent, time left, loss
    unit = r'weights backbone\.layer\d\.\d ━+ +2/2 \d+:\d\d:\d\d left \d+:\d\d:\d\d loss \S+'
    assert any(re.match(unit, line) for line in drawn), drawn
    # a bar is taken away before a line of the log is written
    lines = [line for line in plain.splitlines() if ' - INFO - ' in line]
    assert lines and not any('━' in line.rpartition('\r')[2] for line in lines)
    assert shown.rindex('\x1b[?25h') > shown.rindex('\x1b[?25l'), 'the cursor stays hidden'

    assert json.loads((work / 'summary.json').read_text())['metrics']['float']['accuracy/top1'] > 90
    ids = (work / 'calibration_ids.txt').read_text().split()
    assert sorted(ids) == sorted(str(file.relative_to(root)) for file in root.glob('train/*/*.png'))


def test_an_error_is_seen_after_the_bar_is_gone(folder_config: tuple[Path, Path], tmp_path: Path) -> None:
    path, root = folder_config
    file = sorted((root / 'val').glob('*/*.png'))[-1]
    file.write_bytes(b'no image')
    tool = [sys.executable, str(ROOT / 'tools' / 'ptq.py'), str(path), '--work-dir', str(tmp_path / 'work')]
    status, shown = on_terminal(tool)
    assert status == 2
    last = re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', shown).strip().splitlines()[-1]
    assert last.startswith('error: ') and str(file) in last.replace('\r', '')
    assert '\x1b[?25l' in shown, 'there was no bar'
    assert shown.rindex('\x1b[?25h') < shown.rindex('error: '), 'the bar is taken away after the message'
