from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_detectors import build, data, predict, preprocess, same
from torch import Tensor, nn

from mmbrecq.calibration.calibrator import calibrate_activations, calibrate_weights
from mmbrecq.deploy.backends import DeployedModel, ONNXRuntimeBackend, as_forward, open_backend
from mmbrecq.deploy.exporters import ONNXExporter, OpenVINOExporter
from mmbrecq.errors import ExportError
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.quantizers import BRECQQuantizer, QuantizedModel

DETECTORS = ('retinanet', 'fcos', 'ssdlite', 'yolox', 'rtmdet')
OBSERVER = {'type': 'MinMaxObserver'}


def prepare(name: str, preset: str = 'academic', bits: int = 8) -> QuantizedModel:
    model = build(name)
    quantizer = BRECQQuantizer({'bits': bits, 'observer': OBSERVER}, {'bits': 8, 'observer': OBSERVER}, preset)
    prepared = quantizer.prepare(model, preprocess(model, data(2)))
    calibrate_weights(prepared)
    calibrate_activations(prepared, [preprocess(model, data())])
    return prepared


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize('name', DETECTORS)
def test_prepared_without_quantization_is_the_float_detector(name: str) -> None:
    model, batch = build(name), data(3, seed=1)
    images = preprocess(model, batch)
    with torch.no_grad():
        raw: Any = model(images, mode='tensor')
    # SSDHead of mmdet 3.3 has no loss_cls, for which its predict asks; boxes of a YOLOX of random weights are endless
    predicts = name in ('retinanet', 'fcos')
    wanted = predict(model, batch) if predicts else []
    prepared = BRECQQuantizer({'bits': 2}, {'bits': 4}).prepare(model, preprocess(model, data(2)))
    with torch.no_grad():
        found = flatten_outputs(prepared(images))
    for name_of_output, value in flatten_outputs(raw).items():
        assert relative_error(found[name_of_output], value) < 1e-5
    same(predict(model, batch) if predicts else [], wanted)
    weighted = {n for n, m in model.named_modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))}
    assert {layer.name for layer in prepared.layers if layer.unit and not layer.float_reason} == weighted


def test_compiled_operations_of_a_head_are_calls_of_their_own(tmp_path: Path) -> None:
    """VFNet writes into slices and calls a deformable convolution, which ONNX does not know."""
    model, batch = build('vfnet'), data(3, seed=1)
    images = preprocess(model, batch)
    with torch.no_grad():
        raw: Any = model(images, mode='tensor')
    wanted = predict(model, batch)
    prepared = BRECQQuantizer({'bits': 8}, {'bits': 8}).prepare(model, preprocess(model, data(2)))
    opaque = prepared.image_graph.traced.opaque
    assert set(opaque) == {'bbox_head.vfnet_reg_refine_dconv', 'bbox_head.vfnet_cls_dconv'}
    assert all('computes outside of what can be traced' in reason for reason in opaque.values())
    with torch.no_grad():
        found = flatten_outputs(prepared(images))
    for name, value in flatten_outputs(raw).items():
        assert relative_error(found[name], value) < 1e-5
    same(predict(model, batch), wanted)
    (unit,) = [u for u in prepared.image_graph.units if 'bbox_head.vfnet_cls' in u.layers]
    assert len(unit.inputs) == 5 and len(unit.outputs) == 10
    calibrate_weights(prepared)
    calibrate_activations(prepared, [images])
    with torch.no_grad(), prepared.quantization(weights=True, activations=True):
        quantized = flatten_outputs(prepared(images))
    moved = [relative_error(quantized[name], value) for name, value in flatten_outputs(raw).items()]
    assert 1e-3 < max(moved) < 0.2
    prepared.pack()
    with pytest.raises(ExportError, match="no standard operation does what 'mmcv.MMCVDeformConv2d'"):
        ONNXExporter().export_all(prepared, preprocess(model, data(2)), tmp_path)


def test_a_head_shared_over_levels_is_one_unit_with_an_input_per_level() -> None:
    prepared = prepare('retinanet')
    (unit,) = [u for u in prepared.image_graph.units if 'bbox_head.retina_cls' in u.layers]
    assert set(unit.layers) == {
        'bbox_head.cls_convs.0.conv', 'bbox_head.reg_convs.0.conv', 'bbox_head.retina_cls', 'bbox_head.retina_reg',
    }  # fmt: skip
    assert len(unit.inputs) == 5 and len(unit.outputs) == 10
    # one grid for each weight, and an activation quantizer for each tower on each level
    assert len([quantizer for quantizer in unit.quantizers if 'convs' in quantizer]) == 2 * 5


def moved_by_rounding(prepared: QuantizedModel, images: Tensor, place: str) -> float:
    """How far an output moves when what is quantized moves by less than a float32 sum does.

    A value on a rounding tie moves by a step then, and random weights carry that on.
    """
    generator = torch.Generator().manual_seed(0)

    def nudge(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        return args[0] * (1 + 1e-6 * torch.randn(args[0].shape, generator=generator))

    hooks = [module.register_forward_pre_hook(nudge) for module in prepared.image_graph.quantizers.values()]
    with torch.no_grad():
        moved = flatten_outputs(prepared(images))[place]
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        return relative_error(moved, flatten_outputs(prepared(images))[place])


@pytest.mark.parametrize('name', DETECTORS)
@pytest.mark.parametrize('preset', ['academic', 'openvino', 'tensorrt'])
def test_deployed_detectors_give_the_simulated_maps(preset: str, name: str, tmp_path: Path) -> None:
    prepared = prepare(name, preset)
    prepared.pack()
    exporter = OpenVINOExporter() if preset == 'openvino' else ONNXExporter()
    paths = exporter.export_all(prepared, preprocess(prepared.model, data(2)), tmp_path)
    # a size that the graph was not traced with
    images = preprocess(prepared.model, data(1, 96, 64, seed=2))
    with torch.no_grad():
        wanted = flatten_outputs(prepared(images))
    # the file as it is written; what an optimizer makes of it moves more
    backend = open_backend(paths[0]) if preset == 'openvino' else ONNXRuntimeBackend(paths[0], optimize=False)
    found = flatten_outputs(as_forward(backend)(images))
    assert found.keys() == wanted.keys()
    for place, value in wanted.items():
        tolerance = 3 * moved_by_rounding(prepared, images, place) + (0.02 if preset == 'openvino' else 1e-5)
        assert relative_error(found[place], value) < tolerance
    deployed = DeployedModel(prepared.model, paths[0])
    count = deployed.integer_kernels()
    assert count.quantized >= len(prepared.layers)
    assert preset != 'openvino' or count.integer == count.quantized
    deployed.attach()
    assert flatten_outputs(prepared.model(images, mode='tensor')).keys() == wanted.keys()
