from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13

from mmbrecq.deploy.backends import KernelCount, OpenVINOBackend
from mmbrecq.errors import BackendError, DependencyError


def convert(onnx_path: Path) -> Path:
    path = onnx_path.with_suffix('.xml')
    openvino.save_model(openvino.convert_model(onnx_path), path, compress_to_fp16=False)
    return path


def save_conv(path: Path, levels: int) -> Path:
    """A 1x1 conv ``conv`` of eight channels whose constant weight passes a FakeQuantize of ``levels`` levels."""
    x = opset13.parameter([-1, 8, 4, 4], np.float32, name='image')
    low, high = np.float32(-(levels // 2)), np.float32((levels - 1) // 2)
    weight = np.random.default_rng(0).integers(-3, 4, (8, 8, 1, 1)).astype(np.float32)
    quantized = opset13.fake_quantize(opset13.constant(weight), low, high, low, high, levels)
    pixels = opset13.fake_quantize(x, np.float32(0), np.float32(255), np.float32(0), np.float32(255), 256)
    conv = opset13.convolution(pixels, quantized, [1, 1], [0, 0], [0, 0], [1, 1], name='conv')
    openvino.save_model(openvino.Model([opset13.relu(conv)], [x], 'm'), path, compress_to_fp16=False)
    return path


def test_equals_integer_arithmetic(tmp_path: Path, problem, save_classifier, classify) -> None:
    # 63 keeps pairs of products within 16 bits, which kernels without VNNI need
    x, conv_weight, fc_weight = problem(63)
    backend = OpenVINOBackend(convert(save_classifier(tmp_path / 'm.onnx', conv_weight, fc_weight)), num_threads=1)
    logits, features = backend(torch.from_numpy(x)[:, :, None, None])
    expected_logits, expected_features = classify(x, conv_weight, fc_weight)
    np.testing.assert_array_equal(features.numpy(), expected_features)
    np.testing.assert_array_equal(logits.numpy(), expected_logits)


def test_names_and_any_batch(tmp_path: Path, problem, save_classifier) -> None:
    _, conv_weight, fc_weight = problem(63)
    backend = OpenVINOBackend(convert(save_classifier(tmp_path / 'm.onnx', conv_weight, fc_weight)), num_threads=1)
    assert (backend.input_names, backend.output_names) == (['x'], ['logits', 'features'])
    for batch in (1, 5):
        outputs = backend(torch.zeros(batch, 32, 1, 1))
        assert [tuple(out.shape) for out in outputs] == [(batch, 10), (batch, 16, 1, 1)]


def test_outputs_survive_the_next_call(tmp_path: Path) -> None:
    backend = OpenVINOBackend(save_conv(tmp_path / 'm.xml', 256), num_threads=1)
    (first,) = backend(torch.full((1, 8, 4, 4), 3.0))
    kept = first.clone()
    backend(torch.full((1, 8, 4, 4), 9.0))
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


@pytest.mark.parametrize('fc_bias', ['add', 'gemm'])
def test_all_layers_run_in_integers(tmp_path: Path, problem, save_classifier, fc_bias: str) -> None:
    _, conv_weight, fc_weight = problem(127)
    path = convert(save_classifier(tmp_path / 'm.onnx', conv_weight, fc_weight, fc_bias=fc_bias))
    assert OpenVINOBackend(path, num_threads=1).integer_kernels() == KernelCount(2, 2)


@pytest.mark.parametrize(
    ('levels', 'count'),
    [
        (256, KernelCount(1, 1)),
        (255, KernelCount(1, 1)),
        (16, KernelCount(1, 0, {'conv': 'OpenVINO computes it in f32'})),
    ],
)
def test_levels_decide_the_kernel(tmp_path: Path, levels: int, count: KernelCount) -> None:
    assert OpenVINOBackend(save_conv(tmp_path / 'm.xml', levels), num_threads=1).integer_kernels() == count


def test_rest_runs_in_float32(tmp_path: Path) -> None:
    backend = OpenVINOBackend(save_conv(tmp_path / 'm.xml', 256), num_threads=1)
    assert backend._compiled.get_property('INFERENCE_PRECISION_HINT') == openvino.Type.f32


def test_unnamed_tensors_take_their_nodes_name(tmp_path: Path) -> None:
    assert OpenVINOBackend(save_conv(tmp_path / 'm.xml', 256), num_threads=1).input_names == ['image']


TWO_FILES = """
import os, signal, sys
from mmbrecq.deploy.backends import OpenVINOBackend
first, second = (OpenVINOBackend(sys.argv[1], num_threads=1) for _ in range(2))
del first
del second
signal.signal(signal.SIGUSR1, lambda *_: print('handled'))
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_is_handled_after_several_files_were_open(tmp_path: Path) -> None:
    # the plugin of a core of its own would have left the signal a stack that is unmapped
    path = save_conv(tmp_path / 'm.xml', 256)
    done = subprocess.run([sys.executable, '-c', TWO_FILES, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, 'handled\n'), done.stderr


def test_corrupt_file(tmp_path: Path) -> None:
    path = tmp_path / 'broken.xml'
    path.write_text('<net')
    path.with_suffix('.bin').touch()
    with pytest.raises(BackendError, match=r'^OpenVINO refuses \S*broken\.xml: .*\w'):
        OpenVINOBackend(path)


def test_missing_weights_file(tmp_path: Path) -> None:
    path = tmp_path / 'lonely.xml'
    path.write_text('<net/>')
    with pytest.raises(BackendError, match=r'lonely\.xml: its weights file .*lonely\.bin does not exist'):
        OpenVINOBackend(path)


def test_wrong_input_shape(tmp_path: Path) -> None:
    backend = OpenVINOBackend(save_conv(tmp_path / 'm.xml', 256), num_threads=1)
    with pytest.raises(BackendError, match=r'cannot run .*m\.xml on image \[2, 3, 4, 4\]: '):
        backend(torch.zeros(2, 3, 4, 4))


def test_runtime_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'm.xml'
    path.touch()
    path.with_suffix('.bin').touch()
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(DependencyError, match='openvino is not installed; install it with: pip install '):
        OpenVINOBackend(path)
