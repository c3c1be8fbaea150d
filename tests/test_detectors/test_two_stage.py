from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_detectors import build, data, predict, preprocess, same
from torch import nn

from mmbrecq.calibration.calibrator import calibrate_activations, calibrate_regions, calibrate_weights
from mmbrecq.calibration.regions import REGIONS_PER_IMAGE, RegionCapture
from mmbrecq.deploy.backends import DeployedModel
from mmbrecq.deploy.exporters import ONNXExporter, OpenVINOExporter
from mmbrecq.errors import BackendError, DataError, GraphError
from mmbrecq.quantizers import BRECQQuantizer, QuantizedModel
from mmbrecq.reconstruction import QDropReconstructor, Task
from mmbrecq.reconstruction.callbacks import Callback

HEADS = {'faster_rcnn': ['bbox_head'], 'mask_rcnn': ['bbox_head', 'mask_head']}
OBSERVER = {'type': 'MinMaxObserver'}


def capture(model: QuantizedModel, batch: dict[str, Any]) -> RegionCapture:
    return RegionCapture(model, preprocess(model.model, batch), lambda: [batch], seed=0)


def prepare(model: nn.Module, weight_bits: int = 8, activation_bits: int = 8) -> QuantizedModel:
    quantizer = BRECQQuantizer(
        {'bits': weight_bits, 'observer': OBSERVER}, {'bits': activation_bits, 'observer': OBSERVER}
    )
    prepared = quantizer.prepare(model, preprocess(model, data(2)))
    calibrate_weights(prepared)
    batch = data()
    calibrate_activations(prepared, [preprocess(model, batch)])
    calibrate_regions(prepared, capture(prepared, batch))
    return prepared


@pytest.mark.parametrize('name', HEADS)
def test_prepared_without_quantization_predicts_what_the_float_model_does(name: str) -> None:
    model, batch = build(name), data(3, seed=1)
    wanted = predict(model, batch)
    prepared = prepare(model, 4, 4)
    with prepared.quantization(False, False):
        same(predict(model, batch), wanted)
    assert [head.path for head in prepared.region_graphs] == [f'roi_head.{head}' for head in HEADS[name]]


def test_every_layer_is_quantized_and_the_last_of_each_head_at_8_bits() -> None:
    prepared = prepare(build('mask_rcnn'), 2, 4)
    bits = {layer.name: (layer.weight_bits, layer.activation_bits) for layer in prepared.layers}
    weighted = {n for n, m in prepared.model.named_modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))}
    assert set(bits) == weighted and all(layer.unit for layer in prepared.layers)
    at_8 = {name for name, pair in bits.items() if pair == (8, 8)}
    last = {'rpn_head.rpn_cls', 'rpn_head.rpn_reg', 'roi_head.bbox_head.fc_cls', 'roi_head.bbox_head.fc_reg'}
    # the extra levels of the pyramid leave the network as features alone
    assert at_8 == {'backbone.conv1', *last, 'roi_head.mask_head.conv_logits'}
    assert bits['roi_head.bbox_head.shared_fcs.0'] == (2, 4)


def test_both_streams_of_a_head_are_about_the_same_regions() -> None:
    prepared, batch = prepare(build('faster_rcnn'), 8, 8), data()
    regions = capture(prepared, batch)
    floats, alike = regions.pairs(prepared.region_graphs[0], weights=False, activations=False)
    assert floats.shape == alike.shape and floats.shape[1:] == (8, 7, 7)
    assert 0 < len(floats) <= REGIONS_PER_IMAGE * 4
    torch.testing.assert_close(floats, alike)
    floats, quantized = regions.pairs(prepared.region_graphs[0], weights=True, activations=True)
    assert floats.shape == quantized.shape
    error = float((floats - quantized).norm() / floats.norm())
    shuffled = float((floats - quantized.roll(1, 0)).norm() / floats.norm())
    assert 0 < error < 0.5 * shuffled
    again = regions.pairs(prepared.region_graphs[0], weights=True, activations=True)
    assert torch.equal(floats, again[0]) and torch.equal(quantized, again[1])


def test_heads_are_reconstructed_too(tmp_path: Path) -> None:
    prepared, batch = prepare(build('mask_rcnn'), 2, 4), data()
    images = preprocess(prepared.model, batch)
    task = Task(prepared, images, lambda: [batch], lambda *_: torch.zeros(()), 0, tmp_path)
    options = {'iterations': 30, 'batch_size': 2, 'lr': 3e-2, 'drop_prob': 0.0}
    reconstructor = QDropReconstructor(options)
    results = reconstructor.run(task, reconstructor.plan(task), Callback())
    of_heads = [result for result in results if result.name.startswith('roi_head')]
    assert [r.name for r in of_heads][:2] == ['roi_head.bbox_head.shared_fcs.0', 'roi_head.bbox_head.shared_fcs.1']
    assert sum(result.loss_after < result.loss_before for result in of_heads) >= len(of_heads) - 1


@pytest.mark.parametrize('exporter', [ONNXExporter, OpenVINOExporter])
def test_deployed_files_predict_what_the_simulation_does(exporter: Any, tmp_path: Path) -> None:
    prepared = prepare(build('mask_rcnn'))
    prepared.pack()
    paths = exporter().export_all(prepared, preprocess(prepared.model, data(2)), tmp_path)
    suffix = exporter.suffix
    assert [p.name for p in paths] == [
        f'model{end}{suffix}' for end in ('', '.roi_head.bbox_head', '.roi_head.mask_head')
    ]
    deployed = DeployedModel(prepared.model, paths[0])
    # a size that the graphs were not traced with
    batch = data(2, 96, 64, seed=2)
    wanted = predict(prepared.model, batch)
    deployed.attach()
    found = predict(prepared.model, batch)
    for a, b in zip(found, wanted, strict=True):
        assert len(a['scores']) == len(b['scores']) > 0
        torch.testing.assert_close(a['scores'], b['scores'], rtol=0, atol=0.02)
    count = deployed.integer_kernels()
    assert count.quantized == sum(layer.weight_bits is not None for layer in prepared.layers) + 3 * 4


def test_the_file_of_a_head_is_missing(tmp_path: Path) -> None:
    prepared = prepare(build('faster_rcnn'))
    prepared.pack()
    paths = ONNXExporter().export_all(prepared, preprocess(prepared.model, data(2)), tmp_path)
    paths[1].unlink()
    with pytest.raises(BackendError, match=r'model\.roi_head\.bbox_head\.onnx: no such file'):
        DeployedModel(prepared.model, paths[0])


def test_an_rpn_that_proposes_nothing() -> None:
    model = build('faster_rcnn')
    model.rpn_head.test_cfg['min_bbox_size'] = 10_000  # type: ignore[index, union-attr, operator]
    with pytest.raises(DataError, match=r"regions for 'roi_head\.bbox_head', but the detector proposes none"):
        prepare(model)


def test_a_shared_head_is_refused() -> None:
    model: Any = build('faster_rcnn')
    model.roi_head.shared_head = nn.Identity()
    with pytest.raises(GraphError, match=r'roi_head\.shared_head comes before'):
        BRECQQuantizer({'bits': 8}).prepare(model, preprocess(model, data(2)))


def test_features_that_are_changed_before_the_head_are_refused() -> None:
    prepared, batch = prepare(build('faster_rcnn')), data()
    extractor: Any = prepared.model.get_submodule('roi_head.bbox_roi_extractor')
    extractor.register_forward_hook(lambda module, args, features: 2 * features)
    with pytest.raises(GraphError, match=r"expected 'roi_head\.bbox_head' to read features as they are cut out"):
        capture(prepared, batch).pairs(prepared.region_graphs[0], weights=True, activations=True)
