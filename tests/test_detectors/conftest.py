"""Lets the tests of this folder import their helpers, for the folders are no packages, and runs the tools for them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from demo_runs import ROOT, VALIDATION


@pytest.fixture(scope='module')
def run(environment: None, outcome: Any) -> Callable[..., Any]:
    """``run(name, folder, *args)``: runs ``tools/NAME.py`` in ``folder``, in a process of its own."""

    def start(name: str, folder: Path, *args: object) -> Any:
        command = [sys.executable, str(ROOT / 'tools' / f'{name}.py'), *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert 'annotations into memory' not in done.stdout, 'what COCO prints of its own is not for the user'
        return outcome(done.returncode, done.stdout, done.stderr)

    return start


@pytest.fixture(scope='module')
def folder(run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the scenes in it."""
    root: Path = tmp_path_factory.mktemp('detectors')
    run('make_digit_scenes', root, '--train', 24, '--val', VALIDATION)
    return root
