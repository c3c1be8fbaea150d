"""From a config file to a runner; what a tool says when something stops it."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config

from mmbrecq.engine import config as engine_config
from mmbrecq.engine.config import add_common_arguments, build_runner, load_config, resolve_checkpoint, run_tool
from mmbrecq.errors import ConfigError, DataError, StorageError

WHOLE = """
model = dict(type='Model')
test_dataloader = dict()
test_evaluator = dict()
float_checkpoint = 'float.pth'
quantizer = dict(type='BRECQQuantizer', weight=dict(bits=2))
reconstructor = dict()
calibration = dict()
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def write_config(text: str) -> str:
        path = tmp_path / 'some_config.py'
        path.write_text(text)
        return str(path)

    return write_config


def test_options_override_the_file(write: Callable[[str], str]) -> None:
    path = write(WHOLE + 'seed = 3')
    cfg = load_config(path, None, None)
    assert cfg.work_dir == str(Path('work_dirs') / 'some_config')
    assert (cfg.randomness, cfg.quantizer.weight.bits) == ({'seed': 3}, 2)
    cfg = load_config(path, {'quantizer.weight.bits': 4, 'seed': 5}, 'elsewhere')
    assert (cfg.work_dir, cfg.randomness, cfg.quantizer.weight.bits) == ('elsewhere', {'seed': 5}, 4)


@pytest.mark.parametrize(
    ('text', 'randomness'),
    [
        ('', {'seed': 0}),
        ('randomness = dict(seed=None, deterministic=False)', {'seed': 0, 'deterministic': False}),
        ('randomness = dict(seed=7, deterministic=True)', {'seed': 7, 'deterministic': True}),
        ('randomness = dict(seed=7, deterministic=True)\nseed = 3', {'seed': 3, 'deterministic': True}),
        ('randomness = dict(seed=7)\nseed = 0', {'seed': 0}),
    ],
)
def test_randomness_is_the_configs_but_seed_goes_first(
    write: Callable[[str], str], text: str, randomness: dict[str, Any]
) -> None:
    assert load_config(write(f'{WHOLE}\n{text}'), None, None).randomness == randomness


def test_all_processes_have_one_seed(write: Callable[[str], str]) -> None:
    with pytest.raises(ConfigError, match='expected randomness without diff_rank_seed: all processes of a run have on'):
        load_config(write(WHOLE + 'randomness = dict(diff_rank_seed=True)'), None, None)


def test_delete_may_stand_wherever_mmengine_reads_it(write: Callable[[str], str], tmp_path: Path) -> None:
    base = write(WHOLE)
    path = tmp_path / 'derived.py'
    path.write_text(
        f"_base_ = ['{base}']\n"
        "quantizer = dict(_delete_=True, type='Q', weight=dict(_delete_=True, bits=3), "
        'overrides=[dict(_delete_=True)])\n'
        'reconstructor = dict(loss=dict(_delete_=True, a=(dict(_delete_=True, b=1),)))\n'
    )
    cfg = load_config(str(path), {'calibration.pipeline': [{'_delete_': True}]}, None)
    assert cfg.quantizer == {'type': 'Q', 'weight': {'bits': 3}, 'overrides': [{}]}
    assert (cfg.reconstructor, cfg.calibration) == ({'loss': {'a': ({'b': 1},)}}, {'pipeline': [{}]})


@pytest.mark.parametrize('key', ['model', 'test_dataloader', 'test_evaluator', *engine_config.NEEDED])
def test_needed_keys(write: Callable[[str], str], key: str) -> None:
    path = write('\n'.join(line for line in WHOLE.splitlines() if not line.startswith(key)))
    with pytest.raises(ConfigError, match=f"^{path}: expected the key '{key}', but the config has none$"):
        load_config(path, None, None)


@pytest.mark.parametrize(('wrong', 'right'), [('quantiser', 'quantizer'), ('exporter', 'exporters'), ('sed', 'seed')])
def test_misspelt_keys(write: Callable[[str], str], wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{wrong}', did you mean '{right}'\\?$"):
        load_config(write(f'{WHOLE}\n{wrong} = 1'), None, None)


def test_keys_of_mmengine_and_of_the_user_pass(write: Callable[[str], str]) -> None:
    cfg = load_config(write(WHOLE + 'env_cfg = dict()\ndata_root = 1\nmy_words = 2'), None, None)
    assert cfg.my_words == 2


def options_of(*words: str) -> Any:
    parser = argparse.ArgumentParser()
    add_common_arguments(parser)
    return parser.parse_args(['--cfg-options', *words]).cfg_options


def test_command_line_values_have_types() -> None:
    assert options_of('a.b=1', 'c=[x,2.5]', 'd=None', 'e=(1,2)', 'f=name=x') == {
        'a.b': 1, 'c': ['x', 2.5], 'd': None, 'e': (1, 2), 'f': 'name=x',
    }  # fmt: skip


@pytest.mark.parametrize('word', ['a', 'a=[dict(b=1,c=2)]', 'a=[(1]'])
def test_command_line_values_that_do_not_parse(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options_of('seed=1', word)
    assert str(caught.value) == f"expected --cfg-options as KEY=VALUE or KEY=[A,B], but got '{word}'"


def test_a_checkpoint_lies_in_the_working_directory_or_beside_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / 'configs' / 'a.py'
    config.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint('x.pth', str(config)) == 'x.pth'
    (config.parent / 'x.pth').touch()
    assert resolve_checkpoint('x.pth', str(config)) == str(config.parent / 'x.pth')
    (tmp_path / 'x.pth').touch()
    assert resolve_checkpoint('x.pth', str(config)) == 'x.pth'
    url = 'https://example.org/x.pth'
    assert resolve_checkpoint(url, str(config)) == url


@pytest.mark.parametrize(
    ('error', 'kind', 'message'),
    [
        (
            OSError(errno.ENOSPC, 'No space left on device'),
            StorageError,
            'cannot write to {work}: No space left on devi',
        ),
        (FileNotFoundError(errno.ENOENT, 'no', '/data/x.txt'), DataError, '/data/x.txt'),
        (KeyError('invalid depth 19'), ConfigError, 'c.py: invalid depth 19'),
        (ConfigError('as it is'), ConfigError, 'as it is'),
    ],
)
def test_why_a_runner_is_not_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, kind: type[Exception], message: str
) -> None:
    def fail(cfg: Config) -> None:
        raise error

    monkeypatch.setattr(engine_config.ToolRunner, 'from_cfg', fail)
    work = tmp_path / 'work'
    with pytest.raises(kind) as caught:
        build_runner(Config({'work_dir': str(work), 'default_scope': 'mmengine'}), 'c.py', {})
    assert str(caught.value).startswith(message.format(work=work))
    assert type(caught.value) is kind


def failing(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ('error', 'status', 'said'),
    [
        (ConfigError('a sentence'), 2, 'error: a sentence\n'),
        (OSError(errno.EACCES, 'Permission denied', 'x.json'), 2, 'error: x.json cannot be used: Permission denied\n'),
        (OSError(errno.ENOSPC, 'No space left'), 2, 'error: a file cannot be used: No space left\n'),
        (TimeoutError('timed out'), 2, 'error: a file cannot be used: timed out\n'),
        (KeyboardInterrupt(), 130, 'interrupted: what was saved so far is in the work dir\n'),
    ],
)
def test_what_a_user_can_mend(capsys: pytest.CaptureFixture[str], error: BaseException, status: int, said: str) -> None:
    assert run_tool(failing(error)) == status
    assert capsys.readouterr() == ('', said)


def test_ctrl_c_that_a_library_turned_into_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        try:
            try:
                raise KeyboardInterrupt
            except BaseException:
                raise SyntaxError('cannot format') from None
        except SyntaxError as error:
            raise ConfigError('a sentence') from error

    assert run_tool(main) == 130
    assert capsys.readouterr().err.startswith('interrupted: ')


def test_debug_puts_the_traceback_before_the_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, 'argv', ['ptq.py', 'c.py', '--debug'])
    assert run_tool(failing(ConfigError('a sentence'))) == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ('Traceback (most recent call last):', 'error: a sentence')


@pytest.mark.parametrize('tool', ['ptq', 'test', 'analyze', 'search', 'verify', 'train_demo', 'make_digit_scenes'])
def test_every_tool_has_debug(tool: str) -> None:
    text = (Path(__file__).parents[2] / 'tools' / f'{tool}.py').read_text()
    assert 'run_tool(main' in text and ('add_common_arguments(parser)' in text or 'add_debug(parser)' in text)


def test_the_status_is_that_of_the_tool() -> None:
    assert run_tool(lambda: 1) == 1


def test_our_own_bugs_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_tool(failing(ZeroDivisionError()))


def test_success_and_the_warning_that_concerns_no_classifier(recwarn: pytest.WarningsRecorder) -> None:
    def main() -> None:
        warnings.warn('Fail to import ``MultiScaleDeformableAttention`` from mmcv.ops', stacklevel=1)
        warnings.warn('another one', stacklevel=1)

    assert run_tool(main) == 0
    assert [str(warning.message) for warning in recwarn] == ['another one']


def test_a_log_that_cannot_be_written_is_not_the_terminals_business(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import logging

    class FullDisk(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                self.handleError(record)

    logger = logging.Logger('test')
    logger.addHandler(FullDisk())
    logger.info('x')
    assert 'Logging error' in capsys.readouterr().err
    assert run_tool(lambda: logger.info('x')) == 0
    assert capsys.readouterr().err == ''
    assert logging.raiseExceptions


def test_threads_are_set_as_they_are_read() -> None:
    before = torch.get_num_threads()
    parser = argparse.ArgumentParser()
    add_common_arguments(parser)
    try:
        parser.parse_args(['--threads', str(before + 1)])
        assert torch.get_num_threads() == before + 1
        with pytest.raises(ConfigError, match='expected --threads of at least 1, but got 0'):
            parser.parse_args(['--threads', '0'])
    finally:
        torch.set_num_threads(before)
