from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmbrecq.deploy.backends import KernelCount, ONNXRuntimeBackend
from mmbrecq.errors import BackendError, DependencyError


@pytest.mark.parametrize('optimize', [True, False])
@pytest.mark.parametrize('limit', [127, 63])
def test_equals_integer_arithmetic(
    tmp_path: Path, problem, save_classifier, classify, optimize: bool, limit: int
) -> None:
    x, conv_weight, fc_weight = problem(limit)
    path = save_classifier(tmp_path / 'm.onnx', conv_weight, fc_weight)
    backend = ONNXRuntimeBackend(path, num_threads=1, optimize=optimize)
    logits, features = backend(torch.from_numpy(x)[:, :, None, None])
    expected_logits, expected_features = classify(x, conv_weight, fc_weight)
    assert ((expected_features > 0) & (expected_features < 510)).mean() > 0.1  # neither ReLU nor Q hides the sum
    np.testing.assert_array_equal(features.numpy(), expected_features)
    np.testing.assert_array_equal(logits.numpy(), expected_logits)


def test_names_and_any_batch(tmp_path: Path, problem, save_classifier) -> None:
    _, conv_weight, fc_weight = problem(63)
    backend = ONNXRuntimeBackend(save_classifier(tmp_path / 'm.onnx', conv_weight, fc_weight), num_threads=1)
    assert (backend.input_names, backend.output_names) == (['x'], ['logits', 'features'])
    for batch in (1, 5):
        outputs = backend(torch.zeros(batch, 32, 1, 1))
        assert [tuple(out.shape) for out in outputs] == [(batch, 10), (batch, 16, 1, 1)]


def test_all_layers_run_in_integers(tmp_path: Path, problem, save_classifier) -> None:
    _, conv_weight, fc_weight = problem(127)
    path = save_classifier(tmp_path / 'm.onnx', conv_weight, fc_weight)
    assert ONNXRuntimeBackend(path, num_threads=1).integer_kernels() == KernelCount(2, 2)


@pytest.mark.parametrize(('named', 'name'), [(True, 'fc'), (False, 'Gemm_9')])
def test_float_bias_leaves_the_last_gemm_in_float(
    tmp_path: Path, problem, save_classifier, named: bool, name: str
) -> None:
    _, conv_weight, fc_weight = problem(127)
    path = save_classifier(tmp_path / 'm.onnx', conv_weight, fc_weight, fc_bias='gemm', named=named)
    assert ONNXRuntimeBackend(path, num_threads=1).integer_kernels() == KernelCount(
        2, 1, {name: 'its bias is not added apart from a result in float'}
    )


def test_nothing_runs_in_integers_without_optimization(tmp_path: Path, problem, save_classifier) -> None:
    _, conv_weight, fc_weight = problem(127)
    path = save_classifier(tmp_path / 'm.onnx', conv_weight, fc_weight)
    count = ONNXRuntimeBackend(path, num_threads=1, optimize=False).integer_kernels()
    assert count == KernelCount(2, 0, dict.fromkeys(['conv', 'fc'], 'graph optimization is off'))


def test_corrupt_file(tmp_path: Path) -> None:
    path = tmp_path / 'broken.onnx'
    path.write_bytes(b'not a model')
    with pytest.raises(BackendError, match=r'ONNX Runtime refuses .*broken\.onnx: Error parsing message'):
        ONNXRuntimeBackend(path)


def test_wrong_input_shape(tmp_path: Path, problem, save_classifier) -> None:
    _, conv_weight, fc_weight = problem(63)
    backend = ONNXRuntimeBackend(save_classifier(tmp_path / 'm.onnx', conv_weight, fc_weight), num_threads=1)
    with pytest.raises(BackendError, match=r'cannot run .*m\.onnx on x \[2, 3, 1, 1\]: '):
        backend(torch.zeros(2, 3, 1, 1))


def test_runtime_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'm.onnx'
    path.touch()
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(DependencyError, match='onnxruntime is not installed; install it with: pip install '):
        ONNXRuntimeBackend(path)
