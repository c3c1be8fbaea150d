"""Runs of the tools on the demo's classifier."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip('mmpretrain', reason='the tools are tried on a classifier of mmpretrain')

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / 'configs' / 'demo' / 'resnet_digits_w2a4.py'
SHORT = ('calibration.num_samples=64', 'reconstructor.weights.iterations=20', 'reconstructor.activations.iterations=10')
"""Options that leave a run everything but its length."""
LOG_FOLDER = re.compile(r'\d{8}_\d{6}')
"""mmengine makes a new folder of this name for the log of every run."""


Call = Callable[..., Any]


@dataclass(frozen=True)
class Finished:
    """A work dir that a run of the demo has left."""

    folder: Path
    outcome: Any

    def contents(self) -> dict[str, bytes]:
        """Bytes of every file but the logs, by its path."""
        files = (path for path in self.folder.rglob('*') if path.is_file())
        named = {str(path.relative_to(self.folder)): path.read_bytes() for path in files}
        return {name: data for name, data in named.items() if not LOG_FOLDER.match(name)}


@pytest.fixture(scope='session', autouse=True)
def _everywhere(environment: None) -> None:
    """The environment of all tests here."""


@pytest.fixture(scope='session')
def demo() -> Path:
    return DEMO


@pytest.fixture(scope='session')
def run(environment: None, outcome: Any) -> Call:
    """Runs a tool as a user does: ``run('ptq', CONFIG, '--help')``."""

    def start(name: str, *args: object) -> Any:
        command = [sys.executable, str(ROOT / 'tools' / f'{name}.py'), *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        return outcome(done.returncode, done.stdout, done.stderr)

    return start


@pytest.fixture(scope='session')
def demo_run(run: Call, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One whole run of the demo, to look at and not to change."""
    folder = tmp_path_factory.mktemp('demo') / 'work'
    (folder / 'deploy').mkdir(parents=True)
    (folder / 'deploy' / 'notes.txt').write_text('mine')
    (folder / 'notes.txt').write_text('mine')
    return Finished(folder, run('ptq', DEMO, '--work-dir', folder, '--cfg-options', *SHORT))


@pytest.fixture
def finished(demo_run: Finished, tmp_path: Path) -> Finished:
    """A copy of the run of the demo, for another run to go wrong in."""
    return Finished(shutil.copytree(demo_run.folder, tmp_path / 'finished'), demo_run.outcome)


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a config that inherits the demo's: ``config("seed = 1")``."""

    def write(text: str) -> Path:
        path = tmp_path / 'config.py'
        checkpoint = DEMO.parent / 'resnet_digits.pth'
        path.write_text(f"_base_ = ['{DEMO}']\nfloat_checkpoint = '{checkpoint}'\n{text}\n")
        return path

    return write


@pytest.fixture(scope='session')
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as files, ``train/<class>/<number>.png`` and ``val/<class>/<number>.png``; not to be changed."""
    sklearn = pytest.importorskip('sklearn.datasets', reason='the images are those of scikit-learn')
    root: Path = tmp_path_factory.mktemp('digits')
    pixels, labels = sklearn.load_digits(return_X_y=True)
    for index in range(120):
        file = root / ('val' if index % 3 else 'train') / str(labels[index]) / f'{index}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        image = np.round(pixels[index].reshape(8, 8, 1) * (255 / 16)).astype(np.uint8).repeat(3, axis=2)
        assert cv2.imwrite(str(file), image)
    return root


@pytest.fixture
def folder_config(digits_folder: Path, config: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path]:
    """A config that reads a copy of those files, and the copy."""
    root = shutil.copytree(digits_folder, tmp_path / 'digits')
    loader = (
        "dict(_delete_=True, batch_size=20, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), "
        f"dataset=dict(type='CustomDataset', data_root='{root}', data_prefix='%s', pipeline=files))"
    )
    text = f"""
files = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=32, interpolation='bilinear', backend='cv2'),
    dict(type='PackInputs'),
]
train_dataloader = {loader % 'train'}
val_dataloader = {loader % 'val'}
test_dataloader = val_dataloader
calibration = dict(num_samples=40, batch_size=20)
"""
    return config(text), root
