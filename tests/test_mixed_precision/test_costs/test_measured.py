"""Latencies that runtimes measure: the timed graphs against torch, the file against what may be wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch.nn import functional as F

from mmbrecq.building import build
from mmbrecq.deploy.backends import BaseBackend, ONNXRuntimeBackend, OpenVINOBackend
from mmbrecq.deploy.exporters.openvino import convert
from mmbrecq.errors import ConfigError, TableError
from mmbrecq.mixed_precision.costs.measured import (
    COPIES,
    MeasuredLatency,
    copies_of,
    cpu_name,
    layer_graph,
    shape_key,
)
from mmbrecq.mixed_precision.costs.models import BaseCostModel, Bits, Call, LayerShape
from mmbrecq.registry import COST_MODELS

CONV = LayerShape(
    'stem', 'Conv2d', (16, 8, 3, 3), (Call((8, 9, 9), (16, 5, 5)),), (8, 8), 16, True,
    (('stride', (2, 2)), ('padding', (1, 1)), ('dilation', (1, 1)), ('groups', 1)),
)  # fmt: skip
DEPTHWISE = LayerShape(
    'depthwise', 'Conv2d', (8, 1, 3, 3), (Call((8, 9, 9), (8, 9, 9)),), (8, 8), 8, True,
    (('stride', (1, 1)), ('padding', 'same'), ('dilation', (1, 1)), ('groups', 8)),
)  # fmt: skip
UP = LayerShape(
    'up', 'ConvTranspose2d', (8, 6, 2, 2), (Call((8, 5, 5), (6, 10, 10)),), (8, 8), 6, True,
    (('stride', (2, 2)), ('padding', (0, 0)), ('dilation', (1, 1)), ('groups', 1)),
)  # fmt: skip
LINEAR = LayerShape('fc', 'Linear', (10, 32), (Call((32,), (10,), 3),), (8, 8), 10, True)
TOKENS = LayerShape('tokens', 'Linear', (10, 32), (Call((7, 32), (7, 10)),), (8, 8), 10, True)
LAYERS = [CONV, DEPTHWISE, UP, LINEAR, TOKENS]


def costs(model: BaseCostModel, layers: Sequence[LayerShape], candidates: Sequence[Bits]) -> np.ndarray:
    """Costs of all layers at all candidates, ``(layers, candidates)``."""
    model.prepare(layers)
    return np.array([[model.cost(layer, bits) for bits in candidates] for layer in layers])


def reference(layer: LayerShape, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The layer as torch computes it."""
    options = dict(layer.options)
    if layer.kind == 'Linear':
        return F.linear(x, weight)
    if layer.kind == 'ConvTranspose2d':
        return F.conv_transpose2d(x, weight, stride=options['stride'])
    return F.conv2d(x, weight, None, options['stride'], options['padding'], options['dilation'], options['groups'])


def inputs_of(layer: LayerShape) -> torch.Tensor:
    call = layer.calls[0]
    return torch.randn(call.times, *call.inputs, generator=torch.Generator().manual_seed(1))


def weight_in(model: Any, layer: LayerShape, name: str) -> torch.Tensor:
    values = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)
    weight = torch.from_numpy(values.astype(np.float32))
    return weight if tuple(weight.shape) == layer.weight else weight.T


@pytest.mark.parametrize('layer', LAYERS, ids=[layer.name for layer in LAYERS])
def test_the_timed_graph_computes_the_layer(layer: LayerShape, tmp_path: Path) -> None:
    x = inputs_of(layer)
    for integer in (False, True):
        model = layer_graph(layer, layer.calls[0], integer)
        onnx.save(model, str(tmp_path / 'layer.onnx'))
        outputs = ONNXRuntimeBackend(tmp_path / 'layer.onnx', optimize=False)(x)
        assert len(outputs) == copies_of(layer, layer.calls[0]) == COPIES
        if not integer:
            wanted = reference(layer, weight_in(model, layer, 'weight3'), x)
            torch.testing.assert_close(outputs[3], wanted, rtol=1e-4, atol=1e-5)
            continue
        # 128 is zero in the files' grids, whose steps are 0.02, 0.01 and 0.05
        codes = torch.clamp(torch.round(x / 0.02) + 128, 0, 255) - 128
        wanted = reference(layer, weight_in(model, layer, 'codes3'), codes) * (0.02 * 0.01)
        steps = torch.clamp(torch.round(wanted / 0.05) + 128, 0, 255)
        assert (outputs[3] - steps).abs().max() <= 1
        assert steps.std() > 5


@pytest.mark.parametrize('layer', [CONV, LINEAR], ids=['conv', 'linear'])
def test_the_runtimes_take_integer_kernels(layer: LayerShape, tmp_path: Path) -> None:
    import openvino

    path = tmp_path / 'layer.onnx'
    onnx.save(layer_graph(layer, layer.calls[0], True), str(path))
    openvino.save_model(convert(path), path.with_suffix('.xml'), compress_to_fp16=False)
    for backend in (ONNXRuntimeBackend(path), OpenVINOBackend(path.with_suffix('.xml'))):
        count = backend.integer_kernels()
        assert (count.quantized, count.integer) == (COPIES, COPIES), backend.name


def test_large_layers_have_fewer_copies() -> None:
    wide = LayerShape('wide', 'Linear', (4096, 4096), (Call((4096,), (4096,)),), (8, 8), 4096, True)
    assert copies_of(wide, wide.calls[0]) == 1
    half = LayerShape('half', 'Linear', (2048, 2048), (Call((2048,), (2048,)),), (8, 8), 2048, True)
    assert copies_of(half, half.calls[0]) == 3


@pytest.mark.parametrize('runtime', ['openvino', 'onnxruntime'])
def test_more_work_takes_more_time(runtime: str, tmp_path: Path) -> None:
    small = replace(CONV, calls=(Call((8, 16, 16), (16, 8, 8)),))
    large = replace(CONV, calls=(Call((8, 256, 256), (16, 128, 128)),))
    both = replace(CONV, calls=small.calls + large.calls)
    model = MeasuredLatency(runtime, str(tmp_path / 'latency.json'), rounds=3)
    table = costs(model, [small, large, both], [(8, 8), (2, 4), (None, None), (8, None)])
    assert (table[1] > 4 * table[0]).all(), '256 times the work'
    np.testing.assert_allclose(table[2], table[0] + table[1])
    np.testing.assert_array_equal(table[:, 0], table[:, 1])
    np.testing.assert_array_equal(table[:, 2], table[:, 3])
    assert table[1, 0] != table[1, 2], "each has a kernel of its own; which is faster is the machine's business"


def test_the_round_least_disturbed_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy neighbour makes rounds slower, for both kinds of kernels in turn: 3, 9, 2, 8, ... ms for 16 copies."""
    spent = iter([3e-3, 9e-3, 2e-3, 8e-3, 5e-3, 10e-3])
    monkeypatch.setattr(ONNXRuntimeBackend, 'seconds', lambda *_: next(spent))
    table = costs(
        MeasuredLatency('onnxruntime', str(tmp_path / 'latency.json'), rounds=3), [LINEAR], [(8, 8), (None, None)]
    )
    np.testing.assert_allclose(table[0], [8 / 16, 2 / 16])


def test_a_figure_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / 'latency.json'
    first = costs(MeasuredLatency('onnxruntime', str(path), rounds=1), [CONV, LINEAR], [(8, 8), (None, None)])
    content = json.loads(path.read_text())
    shapes = [shape_key(layer, layer.calls[0]) for layer in (CONV, LINEAR)]
    measured_on = f'in ONNX Runtime {onnxruntime.__version__} on {cpu_name()}, threads: 1'
    assert set(content) == {f'{shape}, {measured_on}' for shape in shapes}

    def refuse(self: BaseBackend, *inputs: torch.Tensor) -> float:
        raise AssertionError('measured again')

    monkeypatch.setattr(BaseBackend, 'seconds', refuse)
    # another network with a layer of the same shape
    again = costs(
        MeasuredLatency('onnxruntime', str(path)), [replace(CONV, name='other'), LINEAR], [(8, 8), (None, None)]
    )
    np.testing.assert_array_equal(again, first)
    with pytest.raises(AssertionError, match='measured again'):
        costs(MeasuredLatency('onnxruntime', str(path)), [UP], [(8, 8)])


def test_without_a_path_figures_are_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('MMBRECQ_CACHE', str(tmp_path))
    costs(MeasuredLatency('onnxruntime', rounds=1), [LINEAR], [(8, 8)])
    assert [file.name for file in tmp_path.iterdir()] == ['latency.json']


@pytest.mark.parametrize('options', [{'num_threads': 2}, {'runtime': 'openvino'}])
def test_figures_of_another_setting_stand_beside(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file keeps both, and the first are read again."""
    path, spent = tmp_path / 'latency.json', iter([1.6, 3.2, 16.0, 32.0])
    monkeypatch.setattr(BaseBackend, 'seconds', lambda *_: next(spent))
    first: dict[str, Any] = {'runtime': 'onnxruntime', 'rounds': 1, 'path': str(path)}
    assert costs(MeasuredLatency(**first), [LINEAR], [(8, 8), (None, None)]).tolist() == [[200, 100]]
    other = {**first, **options}
    assert costs(MeasuredLatency(**other), [LINEAR], [(8, 8), (None, None)]).tolist() == [[2000, 1000]]
    assert costs(MeasuredLatency(**first), [LINEAR], [(8, 8), (None, None)]).tolist() == [[200, 100]]


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ([1.0], 'expected what MeasuredLatency writes, but it is not: '),
        ({'a shape': {'float': 1.0, 'int8': -1}}, "expected the int8 latency of 'a shape' to be >= 0, but got -1"),
        ({'a shape': {'float': float('nan'), 'int8': 1}}, 'to be >= 0, but got nan'),
        ({'a shape': {'float': True, 'int8': 1}}, 'expected float, but got True'),
    ],
)
def test_bad_files_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / 'latency.json'
    path.write_text(json.dumps(content))
    with pytest.raises(TableError, match=re.escape(message)) as raised:
        MeasuredLatency('onnxruntime', str(path))
    assert str(raised.value).startswith(f'{path}: ')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'runtime': 'tensorrt'}, "runtime of MeasuredLatency to be one of ['onnxruntime', 'openvino'], but got"),
        ({'rounds': 0}, 'expected rounds of MeasuredLatency to be an integer >= 1, but got 0'),
        ({'num_threads': 1.5}, 'expected num_threads of MeasuredLatency to be an integer >= 1, but got 1.5'),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(COST_MODELS, {'type': 'MeasuredLatency', **options})
