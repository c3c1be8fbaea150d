"""The sequence of the work: what it checks before time is spent, and what it finds at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbrecq import pipeline
from mmbrecq.deploy import comparison
from mmbrecq.deploy.exporters import ONNXExporter, OpenVINOExporter
from mmbrecq.errors import ExportError, GraphError, MMBrecqError
from mmbrecq.quantizers import BRECQQuantizer, QuantizedModel
from mmbrecq.reconstruction import BRECQReconstructor, Task
from mmbrecq.reconstruction.callbacks import Callback
from mmbrecq.reconstruction.methods import NearestReconstructor
from mmbrecq.rehearsal import rehearse


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.last(F.relu(self.stem(x)) + 2)).mean((2, 3)))


def make() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def images(count: int = 8) -> Tensor:
    return torch.rand(count, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def quantizer(preset: str = 'onnxruntime', bits: int = 8) -> BRECQQuantizer:
    return BRECQQuantizer({'bits': bits}, {'bits': 8}, preset, first_last_8bit=False)


def nearest(tmp_path: Path, bits: int, correct: bool) -> QuantizedModel:
    model = pipeline.prepare(make(), images(), quantizer(bits=bits))
    task = Task(model, images(), list, None, 0, tmp_path)
    pipeline.calibrate(task)
    if correct:
        reconstructor = NearestReconstructor()
        assert list(pipeline.reconstruct(task, reconstructor, reconstructor.plan(task), Callback())) == []
    pipeline.pack(model)
    return model


def test_a_graph_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = BRECQQuantizer.prepare

    def broken(self: BRECQQuantizer, model: Any, example: Tensor) -> QuantizedModel:
        model.last.bias.data += 0.1
        return prepare(self, model, example)

    monkeypatch.setattr(BRECQQuantizer, 'prepare', broken)
    with pytest.raises(GraphError, match='to compute what Net does.*after last, in what fc reads'):
        pipeline.prepare(make(), images(), quantizer())


@pytest.mark.parametrize(('preset', 'exporter'), [('onnxruntime', ONNXExporter), ('openvino', OpenVINOExporter)])
def test_a_rehearsal_leaves_the_model_and_forecasts_the_work(preset: str, exporter: Any) -> None:
    model, before = make(), make().state_dict()
    reconstructor = BRECQReconstructor({'iterations': 1000}, {'iterations': 500})
    found = rehearse(model, images(), quantizer(preset), [exporter()], reconstructor)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [d.batch for d in found.deviations] == [1, 3] and all(d.error < 1e-4 for d in found.deviations)
    (count,) = found.kernels.values()
    assert count.quantized == 3 and found.plan is not None
    assert found.seconds is not None and 0.1 < found.seconds < 10_000


def test_what_a_file_cannot_hold_is_told_by_the_rehearsal() -> None:
    class Inverse(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigh(F.relu(self.stem(x))[..., :8, :8]).eigenvalues

    with pytest.raises(MMBrecqError, match='cannot be written as ONNX'):
        rehearse(Inverse().eval(), images(), quantizer(), [ONNXExporter()])


def test_a_file_of_another_network_is_noticed(tmp_path: Path) -> None:
    first, other = nearest(tmp_path, 8, False), nearest(tmp_path, 8, False)
    other.model.fc.bias.data += 1  # type: ignore[union-attr, operator]
    paths = pipeline.export(first, ONNXExporter(), images(), tmp_path)
    assert max(d.error for d in comparison.compare(first, paths, images())) < 1e-6
    with pytest.raises(ExportError, match=r'expected model.onnx in ONNX Runtime to compute what is simulated.*off by'):
        comparison.compare(other, paths, images())


@pytest.mark.parametrize(('gain', 'passes'), [(1e6, True), (1e3, False)])
def test_what_float32_rounds_apart_is_told_and_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float, passes: bool
) -> None:
    """A phase of some tenths: either what last bits make of the network, or another bias."""

    class Wave(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(gain * super().forward(x))

    def made(shift: float) -> QuantizedModel:
        torch.manual_seed(0)
        model = pipeline.prepare(Wave().eval(), images(), quantizer('academic'))
        pipeline.calibrate(Task(model, images(), list, None, 0, tmp_path))
        pipeline.pack(model)
        model.model.fc.bias.data += shift  # type: ignore[union-attr, operator]
        return model

    lines: list[str] = []
    monkeypatch.setattr(comparison, 'print_log', lambda text, *_: lines.append(text))
    paths = pipeline.export(made(0.0), ONNXExporter(), images(), tmp_path)
    if passes:
        found = comparison.compare(made(0.4 / gain), paths, images())
        assert 0.05 < max(d.error for d in found) < 0.5
        assert 'noise of 1e-06 in its layers moves the simulation itself by' in lines[0]
    else:
        with pytest.raises(ExportError, match='to compute what is simulated, but for a batch of 1 its outputs are off'):
            comparison.compare(made(0.4 / gain), paths, images())


def test_corrected_biases_have_the_mean_of_the_float_model(tmp_path: Path) -> None:
    """At 3 bits an input far from zero moves every output; layers in float tell the mean."""
    with torch.no_grad():
        wanted = make()(images()).mean(0)
    plain, corrected = (nearest(tmp_path, 3, correct)(images()).mean(0) for correct in (False, True))  # type: ignore[attr-defined]
    assert float((corrected - wanted).abs().max()) < 0.3 * float((plain - wanted).abs().max())


def test_a_mean_error_is_that_of_a_layer_by_hand(tmp_path: Path) -> None:
    model = pipeline.prepare(nn.Sequential(nn.Linear(6, 5)), torch.rand(9, 6) + 1, quantizer('academic', 2))
    x = torch.rand(9, 6, generator=torch.Generator().manual_seed(2)) + 1
    task = Task(model, x, list, None, 0, tmp_path)
    pipeline.calibrate(task)
    layer: Any = model.model.get_submodule('0')
    weight, original = layer.parametrizations.weight[0], layer.parametrizations.weight.original.detach()
    weight.enabled = True
    expected = ((original - layer.weight) @ x.T).mean(1).detach()
    weight.enabled = False
    reconstructor = NearestReconstructor()
    list(reconstructor.passes(task, reconstructor.plan(task), Callback()))
    torch.testing.assert_close(layer.parametrizations.bias[0].offset.detach(), expected, rtol=1e-4, atol=1e-6)


def test_a_diagnosis_looks_at_fewer_images_where_they_take_more(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(20, 3, 8, 8)
    traced = pipeline.prepare(
        nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU()), images, BRECQQuantizer({'bits': 8})
    ).image_graph.traced
    # the input, what the convolution and what the ReLU makes of it
    assert traced.volume == (3 + 16 + 16) * 64
    assert len(pipeline.few_of(images, 16, traced)) == 16
    for limits, count in (((10 * 64, 2**29), 10), ((2**21, 5 * 35 * 64), 5), ((1, 1), 2)):
        monkeypatch.setattr(pipeline, 'LOOKED_AT', limits)
        assert torch.equal(pipeline.few_of(images, 16, traced), images[:count])
