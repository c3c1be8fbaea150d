"""The presets against what their targets demand."""

from __future__ import annotations

import pytest
import torch

from mmbrecq.errors import ConfigError
from mmbrecq.presets import PRESETS, get_preset
from mmbrecq.qtype import QType

DEPLOYED = ['onnxruntime', 'openvino', 'tensorrt']


def weight(name: str, bits: int = 8, symmetric: bool | None = None, per_channel: bool = True) -> QType:
    return get_preset(name).weight_qtype(bits, per_channel, 0, symmetric)


def activation(name: str, bits: int, non_negative: bool, symmetric: bool | None = None) -> QType:
    return get_preset(name).activation_qtype(bits, non_negative, symmetric, per_channel=False)


def test_the_presets_by_name() -> None:
    assert sorted(PRESETS) == ['academic', 'onnxruntime', 'openvino', 'tensorrt']
    assert all(get_preset(name).name == name for name in PRESETS)


def test_an_unknown_preset() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^expected preset to be one of \['academic', 'onnxruntime', 'openvino', 'tensorrt'\], but got 'tvm'$",
    ):
        get_preset('tvm')


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_the_papers_setting(bits: int) -> None:
    """Weights per channel and asymmetric, activations per tensor and asymmetric: from 0 where none is negative."""
    expected = QType(bits, symmetric=False, signed=False, ch_axis=0)
    assert weight('academic', bits) == expected
    for non_negative in (True, False):
        assert activation('academic', bits, non_negative) == QType(bits, symmetric=non_negative, signed=False)
    assert weight('academic', bits, symmetric=True) == QType(bits, symmetric=True, signed=True, ch_axis=0)


@pytest.mark.parametrize('name', DEPLOYED)
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_weights_of_a_runtime_are_signed_with_zero_point_zero(name: str, bits: int) -> None:
    qtype = weight(name, bits)
    assert qtype.symmetric
    assert qtype.container == torch.int8
    assert qtype.ch_axis == 0
    assert weight(name, bits, symmetric=True) == qtype
    assert weight(name, bits, per_channel=False).ch_axis is None
    assert get_preset(name).weight_qtype(bits, True, 1, None).ch_axis == 1


@pytest.mark.parametrize('name', DEPLOYED)
def test_no_asymmetric_weights_for_a_runtime(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^expected symmetric weights for the preset '{name}', but got symmetric=False$"
    ):
        weight(name, symmetric=False)


@pytest.mark.parametrize('name', ['onnxruntime', 'openvino'])
def test_weights_that_cannot_overflow_16_bits(name: str) -> None:
    """Two products of a uint8 and the largest weight, added by a kernel without VNNI."""
    qtype = weight(name, 8)
    assert 2 * 255 * max(-qtype.quant_min, qtype.quant_max) < 2**15
    # smaller grids need no spare bit
    assert weight(name, 7).levels == 128
    assert weight(name, 4).levels == 16


def test_tensorrt_uses_all_8_bits() -> None:
    assert weight('tensorrt', 8).levels == 256


@pytest.mark.parametrize('name', ['onnxruntime', 'openvino'])
@pytest.mark.parametrize('bits', [4, 8])
def test_activations_of_runtimes_on_cpus_are_uint8(name: str, bits: int) -> None:
    assert activation(name, bits, non_negative=True) == QType(bits, symmetric=True, signed=False)
    assert activation(name, bits, non_negative=False) == QType(bits, symmetric=False, signed=False)
    # asked to be symmetric, values that can be negative get a signed grid
    assert activation(name, bits, False, symmetric=True) == QType(bits, symmetric=True, signed=True)
    assert activation(name, bits, True, symmetric=False) == QType(bits, symmetric=True, signed=False)


@pytest.mark.parametrize('non_negative', [True, False])
@pytest.mark.parametrize('bits', [2, 4, 7, 8])
def test_activations_of_tensorrt_are_int8_with_zero_point_zero(bits: int, non_negative: bool) -> None:
    qtype = activation('tensorrt', bits, non_negative)
    assert qtype.symmetric
    assert qtype.container == torch.int8
    assert torch.iinfo(torch.int8).min <= qtype.quant_min
    assert qtype.quant_max <= torch.iinfo(torch.int8).max
    # an int8 container has room for all levels of an unsigned grid below 8 bits
    assert qtype.quant_min == (0 if non_negative and bits < 8 else -(2 ** (bits - 1)))
    assert qtype.levels == 2**bits


def test_no_asymmetric_activations_of_tensorrt() -> None:
    with pytest.raises(
        ConfigError, match="^expected symmetric activations for the preset 'tensorrt', but got symmetric=False$"
    ):
        activation('tensorrt', 8, False, symmetric=False)


@pytest.mark.parametrize('name', DEPLOYED)
def test_activations_per_channel_are_only_simulated(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^expected activations per tensor for the preset '{name}', but got per_channel=True$"
    ):
        get_preset(name).activation_qtype(8, True, None, per_channel=True)
    assert get_preset('academic').activation_qtype(8, True, None, per_channel=True).ch_axis == 1
