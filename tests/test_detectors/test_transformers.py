from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.structures import InstanceData
from small_detectors import TRANSFORMERS, build, data, predict, preprocess, same
from torch import Tensor

from mmbrecq.calibration.calibrator import calibrate_activations, calibrate_weights
from mmbrecq.deploy.backends import ONNXRuntimeBackend, as_forward, open_backend
from mmbrecq.deploy.exporters import ONNXExporter, OpenVINOExporter
from mmbrecq.errors import DataError
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.pipeline import prepare as prepare_checked
from mmbrecq.quantizers import BRECQQuantizer, QuantizedModel
from mmbrecq.reconstruction import QDropReconstructor, Task
from mmbrecq.reconstruction.callbacks import Callback

OBSERVER = {'type': 'MinMaxObserver'}


def prepare(name: str, preset: str = 'openvino', bits: int = 8, rounding: str = 'AdaRound') -> QuantizedModel:
    model = build(name)
    options = {'bits': bits, 'observer': OBSERVER}
    quantizer = BRECQQuantizer({**options, 'rounding': {'type': rounding}}, options, preset)
    prepared = prepare_checked(model, preprocess(model, data(2)), quantizer)
    calibrate_weights(prepared)
    calibrate_activations(prepared, [preprocess(model, data())])
    return prepared


@pytest.mark.parametrize('name', TRANSFORMERS)
def test_prepared_without_quantization_predicts_what_the_float_detector_does(name: str) -> None:
    model = build(name)
    # the second size gives the coarsest level of a pyramid another height and another width
    batches = [data(3, 64, 64, seed=1), data(2, 160, 96, seed=2)]
    wanted = [predict(model, copy.deepcopy(batch)) for batch in batches]
    prepared = prepare_checked(model, preprocess(model, data(2)), BRECQQuantizer({'bits': 2}, {'bits': 4}, 'openvino'))
    assert prepared.image_graph.traced.free_size and not prepared.image_graph.traced.opaque
    with prepared.quantization(False, False):
        for batch, results in zip(batches, wanted, strict=True):
            same(predict(model, batch), results)


def test_padding_that_a_transformer_masks_is_refused() -> None:
    prepared, batch = prepare('detr'), data(2)
    small = data(1, 64, 64)
    for key, values in batch.items():
        values += small[key]
    with pytest.raises(DataError, match='without padding, which DETR masks .* one of 64 x 64 in a batch of 64 x 96;'):
        predict(prepared.model, batch)


def test_the_loss_is_that_of_the_last_layer() -> None:
    model, batch = build('detr'), data(2)
    for sample in batch['data_samples']:
        boxes, labels = torch.tensor([[4.0, 8.0, 40.0, 50.0]]), torch.tensor([1])
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
    batch = model.data_preprocessor(batch, False)  # type: ignore[operator]

    def loss() -> dict[str, Tensor]:
        found: Any = model(batch['inputs'], batch['data_samples'], mode='loss')
        return dict(found)

    wanted = loss()
    prepared = prepare_checked(model, batch['inputs'], BRECQQuantizer({'bits': 8}))
    with prepared.quantization(False, False):
        found = loss()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)
    assert set(found) == {'loss_cls', 'loss_bbox', 'loss_iou'}


@pytest.mark.parametrize('name', ['detr', 'deformable'])
def test_layers_of_encoder_and_decoder_are_units_and_learn(name: str, tmp_path: Path) -> None:
    prepared = prepare(name, bits=4, rounding='StraightThrough')
    units = {unit.name: unit for unit in prepared.image_graph.units}
    assert len(units['encoder.layers.0'].layers) == 6 and len(units['decoder.layers.0'].layers) == 10
    images = preprocess(prepared.model, data())
    task = Task(prepared, images, list, None, 0, tmp_path)
    reconstructor = QDropReconstructor({'iterations': 60, 'batch_size': 4, 'lr': 1e-2, 'drop_prob': 0.0})
    results = reconstructor.run(task, reconstructor.plan(task), Callback())
    better = {result.name for result in results if result.loss_after < result.loss_before}
    assert {'encoder.layers.0', 'decoder.layers.0'} <= better


@pytest.mark.parametrize('preset', ['openvino', 'onnxruntime'])
@pytest.mark.parametrize('name', ['detr', 'deformable', 'dino'])
def test_deployed_detectors_give_what_is_simulated(name: str, preset: str, tmp_path: Path) -> None:
    prepared = prepare(name, preset)
    prepared.pack()
    exporter = OpenVINOExporter() if preset == 'openvino' else ONNXExporter()
    (path,) = exporter.export_all(prepared, preprocess(prepared.model, data(2)), tmp_path)
    # the file as it is written; what an optimizer makes of it moves more
    backend = open_backend(path) if preset == 'openvino' else ONNXRuntimeBackend(path, optimize=False)
    # a size that the graph was not traced with
    images = preprocess(prepared.model, data(1, 160, 96, seed=2))
    with torch.no_grad():
        wanted = flatten_outputs(prepared(images))
        draw = torch.Generator().manual_seed(0)
        noise = [1 + 1e-5 * torch.randn(images.shape, generator=draw) for _ in range(4)]
        noisy = [flatten_outputs(prepared(images * factor)) for factor in noise]
    for place, found in flatten_outputs(as_forward(backend)(images)).items():
        power = wanted[place].square().sum()
        # where two scores are as good as alike, either is selected
        moved = max((other[place] - wanted[place]).square().sum() for other in noisy)
        assert (found - wanted[place]).square().sum() < 1e-3 * power + 10 * moved
    assert backend.integer_kernels().quantized >= sum(layer.weight_bits is not None for layer in prepared.layers)
