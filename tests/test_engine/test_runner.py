"""The runner of the tools: quiet at its start, and no file of its own in the work dir."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mmengine.config import Config
from torch import nn

from mmbrecq.engine.runner import ToolRunner


@pytest.fixture
def runner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[ToolRunner]:
    (tmp_path / 'config.py').write_text('seed = 1')
    cfg = Config({'marker': 'in the config'}, cfg_text='marker', filename='elsewhere/config.py')
    made = ToolRunner(nn.Linear(1, 1), work_dir=str(tmp_path), experiment_name=f'runner_{tmp_path.name}', cfg=cfg)
    yield made
    # it writes to this test's stdout, which closes now
    made.logger.handlers.clear()


def test_the_long_account_goes_to_the_log_file(
    runner: ToolRunner, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runner.logger.info('before speaking')
    runner.logger.warning('a warning')
    runner.speak()
    runner.logger.info('after speaking')
    shown = capsys.readouterr().out
    assert 'a warning' in shown and 'after speaking' in shown
    (log,) = tmp_path.glob('*/*.log')
    for text in ('System environment', 'in the config', 'Hooks will be executed', 'before speaking'):
        assert text not in shown and text in log.read_text()


def test_a_config_in_the_work_dir_stays(runner: ToolRunner, tmp_path: Path) -> None:
    assert (tmp_path / 'config.py').read_text() == 'seed = 1'
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ['config.py']
