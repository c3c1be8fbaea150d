"""Bars: on a terminal, and nowhere else."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from rich.console import Console

from mmbrecq import progress
from mmbrecq.progress import ProgressBar, track


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to stderr, which is a terminal of 120 columns now."""
    written = io.StringIO()

    def console(**_: Any) -> Console:
        return Console(file=written, force_terminal=True, width=120, color_system=None)

    monkeypatch.setattr(progress, 'Console', console)
    return written


def test_nothing_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ('FORCE_COLOR', 'TTY_COMPATIBLE'):
        monkeypatch.delenv(variable, raising=False)
    assert list(track([1, 2, 3], 'work')) == [1, 2, 3]
    with ProgressBar('work', 2) as bar:
        bar.show(1, 'half')
    assert capsys.readouterr() == ('', '')


def test_title_steps_and_message(terminal: io.StringIO) -> None:
    with ProgressBar('weights layer1', 40) as bar:
        bar.show(10, 'loss 0.5')
    drawn = terminal.getvalue()
    for part in ('weights layer1', '10/40', 'left', 'loss 0.5'):
        assert part in drawn


def test_track_counts_to_its_total(terminal: io.StringIO) -> None:
    assert list(track(iter('ab'), 'images', total=2)) == ['a', 'b']
    assert '2/2' in terminal.getvalue()


def test_a_bar_is_taken_away_however_its_block_ends(terminal: io.StringIO) -> None:
    stderr = sys.stderr
    with pytest.raises(KeyboardInterrupt), ProgressBar('work', 2):
        raise KeyboardInterrupt
    written = terminal.getvalue()
    assert written.rindex('\x1b[?25h') > written.rindex('\x1b[?25l')
    assert sys.stderr is stderr
