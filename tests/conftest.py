"""What tests of several parts share."""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# a tool imports some 4,000 modules, which takes 10 s where each process compiles them anew: whatever the shell says,
# tests keep what they compile, in this process, in pytest's workers and in the processes that tests start
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)
sys.dont_write_bytecode = False


@pytest.fixture(autouse=True)
def default_scope() -> Iterator[None]:
    """Undoes what a test makes the default scope of mmengine's registries: the next test's models come from another."""
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope('mmengine'):
        yield


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """``with full_disk(size)``: no file of this process grows beyond ``size`` bytes, writing fails as on a full disk.

    The limit ends with the block, not with the fixture: pytest prints a test's outcome before, maybe into a file.
    """

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # Python 3.11 keeps half of a compiled module where its disk is full, which no later import can read
        sys.dont_write_bytecode = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
            sys.dont_write_bytecode = False

    return limited


@dataclass(frozen=True)
class Outcome:
    """How a tool ended and what it said."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr of a tool that refused its input."""
        assert self.status == 2, (self.status, self.err)
        assert 'Traceback' not in self.out + self.err
        (line,) = self.err.splitlines()
        assert line.startswith('error: ')
        return line.removeprefix('error: ')


@pytest.fixture(scope='session')
def outcome() -> type[Outcome]:
    """The class, for fixtures that run tools in another way."""
    return Outcome


@pytest.fixture(scope='session')
def environment() -> Iterator[None]:
    """One thread, as the runs are short; no usage reports over the network, for which OpenVINO would wait."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (('CI', 'true'), ('OMP_NUM_THREADS', '1'), ('PYTHONPATH', str(ROOT))):
            patch.setenv(name, value)
        yield


@pytest.fixture
def call(
    environment: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., Outcome]]:
    """Runs a tool in this process: ``call('ptq', CONFIG, 'seed=1')``; what holds a ``=`` is a config option,
    but for ``--name=value``.

    Results go to ``tmp_path / 'work'`` unless ``work_dir`` says otherwise.
    """
    from mmengine.logging import MMLogger

    from mmbrecq.engine.config import run_tool

    def start(name: str, *args: object, work_dir: Path | None = None) -> Outcome:
        words = [str(arg) for arg in args]
        # mmengine keeps one logger for each experiment, and names experiments by the second
        given = [word for word in words if '=' in word and not word.startswith('--')]
        options = [*given, f'experiment_name=run{next(_NUMBERS)}']
        positional = [word for word in words if word not in given]
        folder = work_dir or tmp_path / 'work'
        monkeypatch.setattr(sys, 'argv', [name, *positional, '--work-dir', str(folder), '--cfg-options', *options])
        capsys.readouterr()
        try:
            status = run_tool(_load(name).main)
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    yield start
    for logger in MMLogger._instance_dict.values():
        # they write to this test's stdout, which closes now
        logger.handlers.clear()


_NUMBERS = iter(range(10**6))


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f'tools_{name}', ROOT / 'tools' / f'{name}.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
