"""The runner of the tools: quiet at its start, and no file of its own in the work dir."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger
from torch import nn

from mmbrecq.engine.config import ToolRunner


def make_runner(folder: Path) -> ToolRunner:
    (folder / 'config.py').write_text('seed = 1')
    cfg = Config({'marker': 'in the config'}, cfg_text='marker', filename='elsewhere/config.py')
    return ToolRunner(nn.Linear(1, 1), work_dir=str(folder), experiment_name=f'runner_{folder.name}', cfg=cfg)


@pytest.fixture(autouse=True)
def closed_logs() -> Iterator[None]:
    yield
    for logger in MMLogger._instance_dict.values():
        # they write to this test's stdout, which closes now
        logger.handlers.clear()


def test_the_long_account_goes_to_the_log_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    runner.logger.info('before speaking')
    runner.logger.warning('a warning')
    runner.log_environment()
    runner.logger.info('after speaking')
    shown = capsys.readouterr().out
    assert 'a warning' in shown and 'after speaking' in shown
    (log,) = tmp_path.glob('*/*.log')
    for text in ('System environment', 'in the config', 'Hooks will be executed', 'before speaking'):
        assert text not in shown and text in log.read_text()


def test_a_config_in_the_work_dir_stays(tmp_path: Path) -> None:
    make_runner(tmp_path)
    assert (tmp_path / 'config.py').read_text() == 'seed = 1'
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ['config.py']
