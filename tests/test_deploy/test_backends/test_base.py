from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from mmbrecq.deploy.backends.base import BaseBackend, KernelCount
from mmbrecq.errors import BackendError, DependencyError


class Doubling(BaseBackend):
    """Doubles its input, returns it with its negative; a stand-in for a runtime."""

    name, suffix, package = 'Doubling', '.dbl', 'math'
    failure: Exception | None = None

    def _load(self) -> None:
        if self.failure is not None:
            raise self.failure
        self.input_names, self.output_names = ['x'], ['double', 'negative']

    def _run(self, arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        (x,) = arrays
        assert x.dtype == np.float32 and x.flags['C_CONTIGUOUS']
        if x.ndim != 2:
            raise RuntimeError('rank must be 2\nsecond line')
        return [2 * x, -x]

    def integer_kernels(self) -> KernelCount:
        return KernelCount(0, 0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / 'model.dbl'
    path.touch()
    return path


def test_call_takes_any_layout_and_dtype(file: Path) -> None:
    x = torch.arange(6, dtype=torch.float64, requires_grad=True).reshape(2, 3).t()
    double, negative = Doubling(file)(x)
    assert double.dtype == torch.float32 and not double.requires_grad
    torch.testing.assert_close(double, 2 * x.detach().float())
    torch.testing.assert_close(negative, -x.detach().float())


def test_wrong_number_of_inputs(file: Path) -> None:
    with pytest.raises(BackendError, match=r'model\.dbl expected 1 inputs \(x\), but got 2'):
        Doubling(file)(torch.ones(1), torch.ones(1))


def test_refused_shape_names_file_and_shape(file: Path) -> None:
    with pytest.raises(BackendError, match=r'Doubling cannot run .*model\.dbl on x \[3\]: rank must be 2$'):
        Doubling(file)(torch.ones(3))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r'cannot open .*none\.dbl: no such file'):
        Doubling(tmp_path / 'none.dbl')


def test_wrong_suffix(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r'expected a file ending in \.dbl, but got .*model\.onnx'):
        Doubling(tmp_path / 'model.onnx')


def test_threads_below_one(file: Path) -> None:
    with pytest.raises(BackendError, match='expected num_threads of at least 1 or None, but got 0'):
        Doubling(file, num_threads=0)


def test_missing_runtime_says_how_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Doubling, 'package', 'doubling')
    with pytest.raises(DependencyError, match='but doubling is not installed; install it with: pip install doubling$'):
        Doubling(file)


def test_refused_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Doubling, 'failure', RuntimeError('bad magic.'))
    with pytest.raises(BackendError, match=r'Doubling refuses .*model\.dbl: bad magic$'):
        Doubling(file)
