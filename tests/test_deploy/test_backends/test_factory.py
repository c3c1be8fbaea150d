from __future__ import annotations

from pathlib import Path

import pytest

from mmbrecq.deploy.backends import ONNXRuntimeBackend, OpenVINOBackend, open_backend
from mmbrecq.errors import BackendError
from mmbrecq.registry import BACKENDS


def test_runtimes_are_registered() -> None:
    assert BACKENDS.get('ONNXRuntimeBackend') is ONNXRuntimeBackend
    assert BACKENDS.get('OpenVINOBackend') is OpenVINOBackend


@pytest.mark.parametrize(('suffix', 'runtime'), [('.onnx', 'ONNX Runtime'), ('.xml', 'OpenVINO')])
def test_suffix_chooses_the_runtime(tmp_path: Path, suffix: str, runtime: str) -> None:
    with pytest.raises(BackendError, match=f'^{runtime} cannot open'):
        open_backend(tmp_path / f'none{suffix}')


def test_unknown_suffix_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r'expected a file ending in \.onnx or \.xml, but got .*model\.engine'):
        open_backend(tmp_path / 'model.engine')
