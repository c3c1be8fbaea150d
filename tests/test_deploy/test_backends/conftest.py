from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

SCALE = np.float32(2.0)  # of the convolution's output


def _save_classifier(
    path: Path,
    conv_weight: np.ndarray,
    fc_weight: np.ndarray,
    fc_bias: str = 'add',
    named: bool = True,
) -> Path:
    """Input Q/DQ (scale 1) -> 1x1 conv ``conv`` -> ReLU -> Q/DQ (SCALE) -> Reshape -> ``fc``.

    Args:
        conv_weight: int8, ``(C_out, C_in)``, scale 1.
        fc_weight: int8, ``(classes, C_out)``, scale 1.
        fc_bias: 'add' puts the bias (a half) in an Add behind the Gemm, 'gemm' gives it to the Gemm.
        named: Gives names to the nodes.
    """
    channels, classes = conv_weight.shape[0], fc_weight.shape[0]
    constants = {
        'one': np.float32(1), 'scale': SCALE, 'zero': np.uint8(0), 'shape': np.array([0, -1]),
        'conv_w': conv_weight[:, :, None, None], 'conv_s': np.ones(channels, np.float32),
        'conv_z': np.zeros(channels, np.int8), 'fc_w': fc_weight, 'fc_s': np.ones(classes, np.float32),
        'fc_z': np.zeros(classes, np.int8), 'bias': np.full(classes, 0.5, np.float32),
    }  # fmt: skip
    node = helper.make_node
    nodes = [
        node('QuantizeLinear', ['x', 'one', 'zero'], ['x_q']),
        node('DequantizeLinear', ['x_q', 'one', 'zero'], ['x_dq']),
        node('DequantizeLinear', ['conv_w', 'conv_s', 'conv_z'], ['conv_dq'], axis=0),
        node('Conv', ['x_dq', 'conv_dq'], ['conv_out'], name='conv' if named else ''),
        node('Relu', ['conv_out'], ['relu_out']),
        node('QuantizeLinear', ['relu_out', 'scale', 'zero'], ['feat_q']),
        node('DequantizeLinear', ['feat_q', 'scale', 'zero'], ['features']),
        node('Reshape', ['features', 'shape'], ['flat']),
        node('DequantizeLinear', ['fc_w', 'fc_s', 'fc_z'], ['fc_dq'], axis=0),
    ]
    if fc_bias == 'add':
        nodes += [node('Gemm', ['flat', 'fc_dq'], ['fc_out'], name='fc' if named else '', transB=1)]
        nodes += [node('Add', ['fc_out', 'bias'], ['logits'])]
    else:
        nodes += [node('Gemm', ['flat', 'fc_dq', 'bias'], ['logits'], name='fc' if named else '', transB=1)]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        'classifier',
        [value('x', TensorProto.FLOAT, ['batch', conv_weight.shape[1], 1, 1])],
        [
            value('logits', TensorProto.FLOAT, ['batch', classes]),
            value('features', TensorProto.FLOAT, ['batch', channels, 1, 1]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def _classify(x: np.ndarray, conv_weight: np.ndarray, fc_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The graph's two outputs by integer arithmetic; ``x`` holds integers, ``(N, C_in)``."""
    accumulated = np.maximum(x.astype(np.int64) @ conv_weight.astype(np.int64).T, 0)
    features = np.clip(np.round(accumulated / SCALE), 0, 255).astype(np.int64)
    logits = features @ fc_weight.astype(np.int64).T * SCALE + 0.5
    return logits.astype(np.float32), (features * SCALE).astype(np.float32)[:, :, None, None]


@pytest.fixture
def problem() -> Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """``problem(limit)``: pixels ``(6, 32)`` near 255, and weights of conv and fc that reach +-``limit``.

    Neighbouring weights share their sign, so that pairs of products overflow 16 bits when ``limit`` is 127, and each
    row sums up to a small value, so that the output does not saturate.
    """

    def make(limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        x = rng.integers(250, 256, (6, 32)).astype(np.float32)
        signs = np.tile([1, 1, 1, 1, -1, -1, -1, -1], 4)
        conv_weight = (signs * limit * np.ones((16, 1))).astype(np.int8)
        conv_weight[:, :8] -= (signs[:8] * rng.integers(0, 3, (16, 8))).astype(np.int8)
        return x, conv_weight, rng.integers(-limit, limit + 1, (10, 16)).astype(np.int8)

    return make


@pytest.fixture
def save_classifier() -> Callable[..., Path]:
    return _save_classifier


@pytest.fixture
def classify() -> Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    return _classify
