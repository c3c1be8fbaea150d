"""Quantization in Python, of models that are no OpenMMLab config."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmbrecq
from mmbrecq import api
from mmbrecq.errors import CheckpointError, ConfigError, DataError, ExportError, GraphError, NonFiniteError
from mmbrecq.reconstruction.callbacks import Callback

ROOT = Path(__file__).resolve().parents[1]


class Net(nn.Module):
    """Two branches and a classifier; not of OpenMMLab's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.fc((x + F.relu(self.side(x))).mean((2, 3)))


def make() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def images(count: int = 16) -> Tensor:
    return torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def quantized() -> api.Quantized:
    return mmbrecq.quantize(make(), images(), preset='onnxruntime', method='nearest')


def test_the_model_handed_over_stays_as_it_is() -> None:
    model = make().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mmbrecq.quantize(model, images(), preset='academic', method='nearest')
    assert model.training and [type(m) for m in model.modules()] == [type(m) for m in make().modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_eight_bits_are_close_to_the_model(quantized: api.Quantized) -> None:
    with torch.no_grad():
        wanted = make()(images())
    assert float((quantized(images()) - wanted).square().mean() / wanted.var(0).mean()) < 0.01


def test_the_exported_file_computes_what_is_simulated(quantized: api.Quantized, tmp_path: Path) -> None:
    (path,) = quantized.export(tmp_path / 'net.onnx', images())
    assert path == tmp_path / 'net.onnx' and [d.batch for d in quantized.deviations] == [1, 3]
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    (found,) = session.run(None, {session.get_inputs()[0].name: images(5).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), quantized(images(5)), rtol=1e-4, atol=1e-4)


def test_what_is_saved_comes_back(quantized: api.Quantized, tmp_path: Path) -> None:
    quantized.save(tmp_path / 'q.pth')
    again = mmbrecq.load(tmp_path / 'q.pth', Net())
    assert torch.equal(again(images()), quantized(images()))
    with pytest.raises(CheckpointError, match='does not fit'):
        mmbrecq.load(tmp_path / 'q.pth', nn.Sequential(nn.Conv2d(3, 8, 3)))


def test_threads_compute_what_one_does(quantized: api.Quantized) -> None:
    batches = [images(3) + offset for offset in range(4)]
    wanted = [quantized(batch) for batch in batches]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(8):
            for index, batch in enumerate(batches):
                # through the model, too, whose forward the graph stands in for
                run = quantized if index % 2 else quantized.model.model
                if not torch.equal(run(batch), wanted[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(('method', 'passes'), [('brecq', {'weights', 'activations'}), ('qdrop', {'joint'})])
def test_methods_reconstruct_and_tell_of_every_unit(method: str, passes: set[str]) -> None:
    told: list[str] = []

    class Notes(Callback):
        def after_unit(self, stage: Any, unit: Any, result: Any, progress: Any) -> None:
            told.append(unit.name)

    options: dict[str, Any] = {'preset': 'academic', 'weight_bits': 2, 'quantizer': {'first_last_8bit': False}}
    found = mmbrecq.quantize(make(), images(), method=method, iterations=60, callbacks=[Notes()], **options)
    assert {result.stage for result in found.results} == passes
    assert told == [result.name for result in found.results]
    assert all(result.loss_after <= result.loss_before for result in found.results)
    assert {layer.weight_bits for layer in found.layers} == {2}


def test_batches_of_a_loader_are_images() -> None:
    loader = [(images()[:10], torch.zeros(10)), (images()[10:], torch.zeros(6))]
    torch.testing.assert_close(api.collect(loader, torch.device('cpu')), images(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        ({'method': 'magic'}, ConfigError, r"method to be one of \['brecq', 'qdrop', 'nearest'\], but got 'magic'"),
        ({'preset': 'tpu'}, ConfigError, "preset to be one of .*, but got 'tpu'"),
        ({'weight_bits': 9}, ConfigError, 'quantizer.weight.bits'),
        ({'quantizer': {'colour': 1}}, ConfigError, "unknown option 'colour'"),
        ({'reconstructor': {'colour': 1}}, ConfigError, "unknown option 'colour'"),
        ({'images': []}, DataError, 'expected calibration images, but got none'),
        (
            {'images': [images(), images()[..., 1:]]},
            DataError,
            r'of one size, \(N, C, H, W\), but got \(16, 3, 12, 11\)',
        ),
        ({'images': ['a']}, DataError, 'but got a str'),
        ({'images': images() * float('nan')}, NonFiniteError, 'finite pixels'),
    ],
)
def test_bad_input_is_refused_in_a_sentence(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mmbrecq.quantize(make(), options.pop('images', images()), **options)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.mean() > 0 else x


class Dict(Net):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return {'logits': logits, 'scores': [logits.softmax(1)]}


class Text(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), 'logits'


@pytest.mark.parametrize(
    ('model', 'error', 'message'),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), Branch()), ExportError, "expected '1' to compute alike for all inputs"),
        (Text(), GraphError, 'expected the outputs of the network to be real tensors, but output_1 is a str'),
        (nn.Sequential(nn.ReLU()), GraphError, 'to have a convolution or linear layer, but found none'),
    ],
)
def test_a_model_that_the_target_cannot_have_is_refused_at_once(
    model: nn.Module, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        mmbrecq.quantize(model, images(), preset='onnxruntime', iterations=10**9)


def test_outputs_in_a_dict_keep_their_keys(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Dict().eval()
    quantized = mmbrecq.quantize(model, images(), preset='onnxruntime', iterations=2)
    simulated, computed = quantized(images(2)), model(images(2))
    assert list(simulated) == ['logits', 'scores']
    torch.testing.assert_close(simulated['scores'][0], computed['scores'][0], rtol=0, atol=0.01)
    torch.testing.assert_close(simulated['logits'], computed['logits'], rtol=0, atol=0.05)
    (path,) = quantized.export(tmp_path / 'net.onnx')
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    assert {output.name for output in session.get_outputs()} == {'output_logits', 'output_scores_0'}


class Scaled(Net):
    """OpenVINO computes the factor before the mean, and gives the output the names of both."""

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.fc(F.gelu(self.stem(x)).flatten(2).transpose(1, 2)).mean(1)


def test_an_output_keeps_its_name_where_the_runtime_moves_operations(tmp_path: Path) -> None:
    quantized = mmbrecq.quantize(Scaled().eval(), images(), method='nearest')
    quantized.export(tmp_path / 'model.xml')
    assert max(deviation.error for deviation in quantized.deviations) < 1e-6


@dataclass
class Result:
    """Stands for the outputs of a model that nobody here made."""

    scores: Tensor
    features: Tensor
    loss: Tensor | None = None


class WithResult(Net):
    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.stem(x)))
        return Result(self.fc((x + F.relu(self.side(x))).mean((2, 3))), x)


def test_outputs_are_of_the_class_that_the_model_returns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WithResult().eval()
    # outputs lie on no grid, though a layer reads them on one
    quantized = mmbrecq.quantize(model, images(), method='nearest')
    found, wanted = quantized(images(2)), model(images(2))
    assert type(found) is Result and found.loss is None
    torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=0.02)
    quantized.export(tmp_path / 'model.xml')
    quantized.save(tmp_path / 'model.pth')
    loaded = mmbrecq.load(tmp_path / 'model.pth', model)(images(2))
    assert type(loaded) is Result and torch.equal(loaded.features, found.features)


def test_a_model_is_quantized_without_the_wrapper_of_a_compiler(tmp_path: Path) -> None:
    model = make()
    model.side = torch.compile(model.side, backend='eager')  # type: ignore[assignment]
    quantized = mmbrecq.quantize(torch.compile(model, backend='eager'), images(), preset='academic', method='nearest')  # type: ignore[arg-type]
    assert [layer.name for layer in quantized.layers] == ['stem', 'side', 'fc']
    quantized.save(tmp_path / 'model.pth')
    loaded = mmbrecq.load(tmp_path / 'model.pth', make())
    torch.testing.assert_close(loaded(images(2)), quantized(images(2)), rtol=0, atol=0)


def test_scores_of_a_convolution_leave_the_network_flat(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.Flatten())
    quantized = mmbrecq.quantize(model, images(), preset='onnxruntime', method='nearest')
    quantized.export(tmp_path / 'model.onnx')
    assert max(deviation.error for deviation in quantized.deviations) < 1e-6


def test_hooks_that_change_outputs_count_once() -> None:
    model = make()
    model.register_forward_hook(lambda module, args, result: result * 2.0)
    quantized = mmbrecq.quantize(model, images(), preset='academic', method='nearest')
    for found in (quantized(images(2)), quantized.model.model(images(2))):
        torch.testing.assert_close(found, model(images(2)), rtol=0.05, atol=0.05)


def test_an_unknown_format_is_refused(quantized: api.Quantized, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match='expected a file ending in .onnx or .xml'):
        quantized.export(tmp_path / 'net.tflite')


def test_no_package_of_openmmlab_is_imported_but_mmengine() -> None:
    code = (
        'import sys, mmbrecq; assert "torch" not in sys.modules; import torch; '
        'mmbrecq.quantize(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), torch.rand(4, 3, 8, 8), method="nearest"); '
        'found = {"mmcv", "mmpretrain", "mmdet"} & set(sys.modules); assert not found, found'
    )
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ('name', 'least'),
    [
        ('docs/python_api.md', 5),
        ('mmbrecq.api', 5),
        ('mmbrecq.pipeline', 5),
        ('mmbrecq.quantizers.brecq', 4),
        ('mmbrecq.presets', 1),
        ('mmbrecq.distributed', 1),
    ],
)
def test_examples_run(name: str, least: int) -> None:
    torch.manual_seed(0)
    if name.endswith('.md'):
        result = doctest.testfile(str(ROOT / name), module_relative=False, optionflags=doctest.ELLIPSIS)
    else:
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted >= least and not result.failed
