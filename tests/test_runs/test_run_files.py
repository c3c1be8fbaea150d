"""The grids that a checkpoint names, and the bytes that a model is said to take."""

from __future__ import annotations

import platform
import resource
from typing import Any

import pytest
import torch

from mmbrecq.errors import CheckpointError
from mmbrecq.runs.checkpoint import check_grids, grids_of
from mmbrecq.runs.run_files import model_size, peak_memory, versions
from mmbrecq.version import __version__

WEIGHTS = {'backbone.conv1': (8, 3 * 7 * 7, 8), 'head.fc': (10, 8, 8)}
"""Output channels, inputs of each, and bits; both are first or last layers."""


@pytest.fixture
def prepared() -> Any:
    """A small classifier with W3A5: two layers of 8 bits around the blocks."""
    pytest.importorskip('mmpretrain', reason='the model is one of mmpretrain')
    from mmengine.registry import init_default_scope
    from mmpretrain.registry import MODELS

    from mmbrecq.building import build
    from mmbrecq.registry import QUANTIZERS

    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    backbone = {
        'type': 'ResNet', 'depth': 18, 'num_stages': 1, 'out_indices': (0,), 'strides': (1,), 'dilations': (1,),
        'stem_channels': 8, 'base_channels': 8,
    }  # fmt: skip
    head = {'type': 'LinearClsHead', 'num_classes': 10, 'in_channels': 8}
    neck = {'type': 'GlobalAveragePooling'}
    model = MODELS.build({'type': 'ImageClassifier', 'backbone': backbone, 'neck': neck, 'head': head})
    options = {'type': 'BRECQQuantizer', 'weight': {'bits': 3}, 'activation': {'bits': 5}}
    return build(QUANTIZERS, options).prepare(model, torch.randn(2, 3, 32, 32))


def test_model_size_counts_packed_bits_scales_and_zero_points(prepared: Any) -> None:
    blocks = {f'backbone.layer1.{i}.conv{j}': (8, 8 * 9, 3) for i in (0, 1) for j in (1, 2)}
    shapes = {**WEIGHTS, **blocks}
    assert {layer.name for layer in prepared.layers} == set(shapes)
    floats = sum(32 * channels * (inputs + 1) for channels, inputs, _ in shapes.values())
    # a float bias, a float scale and a zero-point for every output channel
    packed = sum(channels * (inputs * bits + 32 + 32 + bits) for channels, inputs, bits in shapes.values())
    size = model_size(prepared)
    assert size.float == floats // 8
    assert size.quantized == round(packed / 8)


def test_grids_of_a_packed_model(prepared: Any) -> None:
    prepared.pack()
    grids = grids_of(prepared.model)
    assert grids['backbone.layer1.0.conv2'] == '0..7 along axis 0'
    assert grids['backbone.conv1'] == grids['head.fc'] == '0..255 along axis 0'
    activations = [grid for name, grid in grids.items() if name.startswith('activation_quantizers.')]
    assert len(grids) == 6 + len(activations) and set(activations) == {'0..31', '0..255'}
    check_grids(prepared.model, grids, 'a.pth')


def test_other_grids_are_refused(prepared: Any) -> None:
    prepared.pack()
    grids = grids_of(prepared.model)
    grids['backbone.layer1.0.conv1'] = '0..3 along axis 0'
    del grids['head.fc']
    expected = (
        rf'^a\.pth does not fit the quantizer of the config: 2 of {len(grids) + 1} grids differ '
        r"\(first: 'backbone\.layer1\.0\.conv1' expected 0\.\.7 along axis 0 but got 0\.\.3 along axis 0\)$"
    )
    with pytest.raises(CheckpointError, match=expected):
        check_grids(prepared.model, grids, 'a.pth')


def test_versions_of_what_is_installed() -> None:
    found = versions()
    assert (found['mmbrecq'], found['python']) == (__version__, platform.python_version())
    assert torch.__version__.startswith(found['torch'].split('+')[0])
    assert not [name for name, version in found.items() if not version]


@pytest.mark.skipif(platform.system() != 'Linux', reason='the unit of ru_maxrss is that of Linux')
def test_peak_memory_is_in_bytes() -> None:
    before = peak_memory().host
    block = torch.ones(50_000_000)
    grown = peak_memory().host
    assert before is not None and grown is not None
    assert grown == 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # less where the process was larger once than it is now
    assert before <= grown < before + 2 * block.nbytes
