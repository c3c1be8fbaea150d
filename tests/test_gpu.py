"""Tests compare a GPU with the CPU; `-m gpu` selects them, and they skip where there is no GPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmbrecq
from mmbrecq import pipeline
from mmbrecq.data.groups import Grouped
from mmbrecq.fake_quants import LSQ, AdaRound
from mmbrecq.fake_quants.masks import RandomMasks, mix_
from mmbrecq.fake_quants.ops import OutputGradient, fake_quantize
from mmbrecq.functional import affine_from_range
from mmbrecq.kernels import native
from mmbrecq.observers import build_observer
from mmbrecq.observers.base import SharedZeroPointObserver
from mmbrecq.qtype import QType
from mmbrecq.quantizers import BRECQQuantizer, QuantizedModel
from mmbrecq.reconstruction import Stage, StageOptions, Task, capture, optimize
from mmbrecq.reconstruction.batches import UnitData
from mmbrecq.reconstruction.cache import ActivationCache, CachePlan
from mmbrecq.reconstruction.losses import FisherLoss, MSELoss, output_fisher
from mmbrecq.reconstruction.optimize import optimize_unit
from mmbrecq.reconstruction.results import unit_state
from mmbrecq.reconstruction.soft_rounding import SoftRounding
from mmbrecq.reconstruction.streams import Streams
from mmbrecq.reconstruction.values import CachedValues, MemoryValues, MirroredValues, laid_out
from mmbrecq.reconstruction.variables import Adam

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU: torch.cuda is not available'),
]

CPU, GPU = torch.device('cpu'), torch.device('cuda')
COUNT, SIZE = 32, 16

Learned = tuple[list[float], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _same_arithmetic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products in float32, not TF32, and torch's operations on the CPU, too."""
    monkeypatch.setattr(native, 'DISABLED', set(native.OPERATIONS))
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Any, wanted: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """The first is on the GPU, the second on the CPU."""
    assert found.is_cuda and not wanted.is_cuda
    torch.testing.assert_close(found.cpu(), wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize('rectifier', [None, (0.0, 6.0)], ids=['plain', 'rectified'])
@pytest.mark.parametrize('dropping', [False, True], ids=['all', 'dropping'])
@pytest.mark.parametrize(
    'qtype',
    [
        QType(4, symmetric=False, signed=False),
        QType(8, symmetric=True, signed=True),
        QType(4, symmetric=False, signed=False, ch_axis=1),
    ],
    ids=['asymmetric', 'symmetric', 'per-channel'],
)
def test_fake_quantization_and_its_gradients(qtype: QType, dropping: bool, rectifier: Any) -> None:
    size = () if qtype.ch_axis is None else (6,)
    keep = RandomMasks(0.5, torch.Generator().manual_seed(3)).draw(torch.empty(4, 6, 9, 9)) if dropping else None
    found = []
    for device in (GPU, CPU):
        x = (2 * rand(4, 6, 9, 9)).to(device).requires_grad_()
        scale = (0.2 + 0.01 * torch.arange(6)[: size[0]] if size else torch.tensor(0.2)).to(device).requires_grad_()
        zero_point = torch.full(size, 0 if qtype.symmetric else 7, dtype=qtype.container, device=device)
        out = fake_quantize(x, scale, zero_point, qtype, None, None if keep is None else keep.to(device), rectifier)
        out.backward(rand(4, 6, 9, 9, seed=2).to(device))
        found.append((out.detach(), x.grad, scale.grad))
    for gpu, cpu in zip(*found, strict=True):
        # the gradient of a scale is a sum of terms that cancel each other
        close(gpu, cpu, rtol=1e-3)


@pytest.mark.parametrize('batches', [1, 3])
@pytest.mark.parametrize('bits', [4, 8])
@pytest.mark.parametrize(
    'name', ['MinMaxObserver', 'MovingAverageObserver', 'PercentileObserver', 'HistogramObserver', 'MSEObserver']
)
def test_observers(name: str, bits: int, batches: int) -> None:
    found = []
    for device in (GPU, CPU):
        observer = build_observer({'type': name}, QType(bits, symmetric=False, signed=False))
        for seed in range(batches):
            observer.observe(F.relu(rand(8, 6, 20, 20, seed=seed) + 0.3).to(device))
        found.append(observer.compute())
    (scale, zero_point), (wanted, wanted_zero) = found
    # the search compares sums whose last bits differ
    close(scale, wanted, rtol=1e-2 if name == 'MSEObserver' else 1e-5)
    close(zero_point, wanted_zero, atol=1 if name == 'MSEObserver' else 0)


@pytest.mark.parametrize('name', ['MinMaxObserver', 'PercentileObserver', 'MSEObserver', 'shared'])
def test_observers_of_channels(name: str) -> None:
    found = []
    for device in (GPU, CPU):
        qtype = QType(4, symmetric=False, signed=False, ch_axis=0)
        observer = SharedZeroPointObserver(qtype) if name == 'shared' else build_observer({'type': name}, qtype)
        observer.observe((rand(6, 40, 3, 3) + 0.3).to(device))
        found.append(observer.compute())
    (scale, zero_point), (wanted, wanted_zero) = found
    close(scale, wanted, rtol=1e-2 if name == 'MSEObserver' else 1e-5)
    close(zero_point, wanted_zero, atol=1 if name == 'MSEObserver' else 0)


@pytest.mark.parametrize('beta', [None, 8.0, 2.0])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels-last'])
def test_a_step_of_the_rounding(layout: torch.memory_format, beta: float | None) -> None:
    found = []
    for device in (GPU, CPU):
        weight = rand(6, 4, 3, 3).to(device)
        rounding = AdaRound(QType(3, symmetric=True, signed=True, ch_axis=0), weight.shape).to(device)
        rounding.calibrate(weight, *affine_from_range(*torch.aminmax(weight.flatten(1), dim=1), rounding.qtype))
        soft = SoftRounding(rounding, weight, layout)
        gain = nn.Parameter(torch.full((6, 1, 1, 1), 1.1, device=device))
        adam = Adam([([soft.alpha], 1e-2, lambda t: 1.0), ([gain], 1e-3, lambda t: 1 - t)])
        for step in range(5):
            soft.update(gain)
            with torch.no_grad():
                soft.collect(rand(6, 4, 3, 3, seed=step).to(device), gain, beta, 0.1)
            adam.step(step / 5)
        soft.update(gain)
        soft.finish()
        found.append((soft.alpha.detach(), gain.detach(), soft.weight, rounding.codes))
    for gpu, cpu in zip(*found, strict=True):
        close(gpu, cpu)


def test_steps_of_a_learned_step_size() -> None:
    found = []
    for device in (GPU, CPU):
        quantizer = LSQ(QType(4, symmetric=False, signed=False)).to(device)
        quantizer.set_grid(torch.tensor(0.3), torch.tensor(7))
        quantizer.enabled = True
        quantizer.scale.requires_grad_()
        adam = Adam([([quantizer.scale], 1e-2, lambda t: 1.0)])
        x = rand(16, 50).to(device)
        for _ in range(10):
            quantizer.scale.grad = None
            F.mse_loss(quantizer(x), x).backward()
            adam.step(0.0)
        found.append(quantizer.scale.detach())
    close(*found)


@pytest.mark.parametrize('layouts', [(0, 0), (1, 1), (0, 1)], ids=['contiguous', 'channels-last', 'mixed'])
@pytest.mark.parametrize('shape', [(4, 6, 5, 7), (3, 9, 6), (8, 6)], ids=['images', 'tokens', 'vectors'])
def test_gradients_of_scale_and_bias_from_the_output(shape: tuple[int, ...], layouts: tuple[int, int]) -> None:
    found, axis = [], 1 if len(shape) == 4 else -1
    orders = [torch.channels_last if last else torch.contiguous_format for last in layouts]
    for device in (GPU, CPU):
        output, grad = (laid_out(rand(*shape, seed=i).to(device), order) for i, order in enumerate(orders))
        gain, offset = (torch.full((6,), value, device=device).requires_grad_() for value in (1.1, 0.0))
        OutputGradient.apply(output, gain, offset, rand(6, seed=2).to(device), axis).backward(grad)
        found.append((gain.grad, offset.grad))
    for gpu, cpu in zip(*found, strict=True):
        close(gpu, cpu, rtol=1e-3)


def test_masks_are_the_same_draws() -> None:
    found = []
    for device in (GPU, CPU):
        masks = RandomMasks(0.7, torch.Generator().manual_seed(5))
        x, other = rand(3, 5, 7, 7).to(device), rand(3, 5, 7, 7, seed=1).to(device)
        drawn = [masks.draw(x), masks.draw(x[:2])]
        mix_(x, other, drawn[0])
        found.append((*drawn, x))
    for gpu, cpu in zip(*found, strict=True):
        close(gpu, cpu, rtol=0, atol=0)


@pytest.mark.parametrize('loss', [MSELoss(), FisherLoss(), FisherLoss(0.3)])
def test_losses_and_their_gradients(loss: Any) -> None:
    found = []
    for device in (GPU, CPU):
        output = rand(4, 6, 5, 5).to(device).requires_grad_()
        value = loss(output, rand(4, 6, 5, 5, seed=1).to(device), rand(4, 6, 5, 5, seed=2).abs().to(device))
        value.backward()
        found.append((value.detach(), output.grad))
    for gpu, cpu in zip(*found, strict=True):
        close(gpu, cpu)


def cached(place: str, folder: Path, dtype: torch.dtype, layout: torch.memory_format, x: Tensor) -> CachedValues:
    cache = ActivationCache(CachePlan(place, 0, '', dtype), GPU, folder)
    values = cache.allocate(x.shape, layout)
    for start in range(0, len(x), 5):
        values.write(start, x[start : start + 5].to(GPU))
    return values


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels-last'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('place', ['device', 'host', 'disk'])
def test_caches(place: str, dtype: torch.dtype, layout: torch.memory_format, tmp_path: Path) -> None:
    x = rand(12, 3, 4, 5)
    values, wanted = cached(place, tmp_path, dtype, layout, x), x.to(dtype).float()
    index = torch.tensor([7, 0, 11, 3])
    for found, part in ((values[index], wanted[index]), (values[2:9], wanted[2:9])):
        assert found.dtype == torch.float32 and found.is_contiguous(memory_format=layout)
        close(found, part, rtol=0, atol=0)


def test_mirrored_and_grouped_images() -> None:
    x, index = rand(6, 3, 4, 5), torch.tensor([7, 0, 11, 3])
    wanted = torch.cat([x, x.flip(-1)])
    values = MirroredValues(MemoryValues(x.to(GPU), GPU))
    close(values[index], wanted[index], rtol=0, atol=0)
    close(values[index.to(GPU)], wanted[index], rtol=0, atol=0)
    close(values[4:8], wanted[4:8], rtol=0, atol=0)
    groups = Grouped([MemoryValues(part.to(GPU), GPU) for part in (x, x[:4, :, :2])], [6, 10])
    close(groups[torch.tensor([8, 6])], x[[2, 0], :, :2], rtol=0, atol=0)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(x + y)


class Residual(nn.Module):
    """A stem, two blocks, one of them depthwise, and a classifier."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, width, 3, stride=2, padding=1), Block(width)
        self.deep = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.wide = nn.Conv2d(width, 2 * width, 1)
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(F.relu(self.stem(x)))
        x = F.relu(self.wide(F.relu6(self.deep(x))))
        return self.fc(x.mean((2, 3)))


def transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=SIZE, patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight, std=0.2)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {'residual': Residual, 'transformer': transformer}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name]().train()
    with torch.no_grad():
        # statistics of normalisations
        model(images())
    return model.eval()


def images(count: int = COUNT, seed: int = 7) -> Tensor:
    """Neighbours and channels are alike, as in photographs."""
    coarse = F.interpolate(rand(count, 1, 4, 4, seed=seed), SIZE, mode='bilinear')
    return coarse + 0.2 * rand(count, 3, SIZE, SIZE, seed=seed + 1)


def prepared(device: torch.device, folder: Path) -> QuantizedModel:
    rounding, minmax = {'type': 'AdaRound'}, {'type': 'MinMaxObserver'}
    builder = BRECQQuantizer(
        {'bits': 3, 'rounding': rounding, 'observer': minmax}, {'bits': 4, 'observer': minmax}, first_last_8bit=False
    )
    model = pipeline.prepare(make('residual').to(device), images().to(device), builder)
    pipeline.calibrate(Task(model, images().to(device), list, None, 0, folder))
    return model


def options(**more: Any) -> StageOptions:
    return StageOptions(
        **{'iterations': 60, 'batch_size': 8, 'lr': 1e-2, 'bias_lr': 1e-3, 'activation_lr': 1e-3, **more}
    )


STAGES = {
    'weights': Stage('weights', options(), True, False),
    'activations': Stage('activations', options(), False, True),
    'joint': Stage('joint', options(drop_prob=0.5), True, True),
}


def learn(
    device: torch.device, folder: Path, stage: Stage, place: str = 'host', fisher: bool = False, loss: Any = None
) -> Learned:
    """Trains the block of the network; returns the mean loss of every ten iterations, and what was learned."""
    model = prepared(device, folder)
    graph = model.image_graph
    cache = ActivationCache(CachePlan(place, 0, ''), device, folder)
    x = cache.hold(images().to(device))
    unit = next(unit for unit in graph.units if 'block.conv1' in unit.layers)
    weights = output_fisher(graph, x, x, cache, 16).of(unit.outputs)[0] if fisher else None
    streams = Streams(graph, graph.units, x, cache, 8)
    for index, before in enumerate(graph.units):
        floats = streams.run(before, streams.float_inputs(before), weights=False, activations=False)
        if before is unit:
            break
        outputs = streams.run(before, streams.quantized_inputs(before), True, stage.quantizes_activations)
        streams.advance(index, floats, outputs)
    told: list[float] = []
    with graph.quantization(True, stage.quantizes_activations):
        optimize_unit(
            unit.name, unit.module, graph.unit_weights(unit), graph.unit_quantizers(unit),
            UnitData(streams.quantized_inputs(unit), streams.float_inputs(unit), floats, weights),
            loss or (FisherLoss() if fisher else MSELoss()), stage, torch.Generator().manual_seed(0), device,
            lambda count, mean: told.append(mean),
        )  # fmt: skip
    return told, unit_state(model.model, unit)


@pytest.fixture
def short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks often, and has tensors in the same order in memory on both devices, as masks then are the same."""
    monkeypatch.setattr(optimize, 'CHECK_INTERVAL', 10)
    monkeypatch.setattr(optimize, 'memory_format', lambda _: torch.channels_last)


def alike(found: Learned, wanted: Learned, rtol: float = 2e-2) -> None:
    """Losses are the same but for rounding, and so is what was learned."""
    assert len(found[0]) == len(wanted[0]) > 0
    assert found[0] == pytest.approx(wanted[0], rel=rtol)
    # before roundings have flipped
    assert found[0][0] == pytest.approx(wanted[0][0], rel=rtol / 10)
    for name, tensor in wanted[1].items():
        other = found[1][name]
        if tensor.dtype in (torch.int8, torch.uint8):
            assert float((tensor != other).double().mean()) <= rtol / 2, name
        else:
            torch.testing.assert_close(other, tensor, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize('stage', STAGES.values(), ids=STAGES)
@pytest.mark.parametrize('place', ['device', 'host', 'disk'])
def test_iterations_of_a_unit(stage: Stage, place: str, short_looks: None, tmp_path: Path) -> None:
    alike(learn(GPU, tmp_path, stage, place), learn(CPU, tmp_path, stage))


def test_iterations_with_fisher_weights(short_looks: None, tmp_path: Path) -> None:
    alike(*(learn(device, tmp_path, STAGES['weights'], fisher=True) for device in (GPU, CPU)))


@pytest.mark.parametrize('place', ['device', 'host'])
@pytest.mark.parametrize('stage', STAGES.values(), ids=STAGES)
def test_captured_iterations_are_eager_ones(
    stage: Stage, place: str, short_looks: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replays: list[None] = []
    replay = torch.cuda.CUDAGraph.replay

    def noted(graph: torch.cuda.CUDAGraph) -> None:
        replays.append(None)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, 'replay', noted)
    captured = learn(GPU, tmp_path, stage, place)
    assert len(replays) == stage.options.iterations - capture.WARM_UP
    monkeypatch.setenv(capture.SWITCH, '0')
    alike(captured, learn(GPU, tmp_path, stage, place), rtol=1e-3)
    assert len(replays) == stage.options.iterations - capture.WARM_UP


def test_what_cannot_be_captured_is_done_eagerly(
    short_looks: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []
    monkeypatch.setattr(capture, 'print_log', lambda text, *_: told.append(text))

    def waiting(output: Tensor, target: Tensor, fisher: Tensor | None) -> Tensor:
        assert float(output.detach().sum()) < float('inf')
        return MSELoss()(output, target)

    found = learn(GPU, tmp_path, STAGES['joint'], loss=waiting)
    (line,) = told
    assert line.startswith(
        "unit 'block' is launched operation by operation, for no CUDA graph can hold its iterations: "
    )
    assert 'stream is capturing' in line
    # nothing is drawn for it, and the next one works
    alike(found, learn(CPU, tmp_path, STAGES['joint']))
    alike(learn(GPU, tmp_path, STAGES['weights']), learn(CPU, tmp_path, STAGES['weights']))


@pytest.mark.parametrize('graphs', ['0', '1'], ids=['eager', 'captured'])
@pytest.mark.parametrize('place', ['device', 'host'])
@pytest.mark.parametrize('stage', STAGES.values(), ids=STAGES)
def test_no_iteration_waits_for_the_gpu(
    stage: Stage, place: str, graphs: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A long run has as many operations that wait as a short one."""
    monkeypatch.setenv(capture.SWITCH, graphs)
    counts = []
    for iterations in (60, 90):
        with waits() as found:
            learn(GPU, tmp_path, replace(stage, options=replace(stage.options, iterations=iterations)), place)
        counts.append(len(found))
    assert counts[0] == counts[1] > 0


@contextmanager
def waits() -> Iterator[list[str]]:
    """Lists the operations within the block that wait for the GPU."""
    found: list[str] = []
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            yield found
    finally:
        torch.cuda.set_sync_debug_mode('default')
    found += [str(warning.message) for warning in caught if 'synchroniz' in str(warning.message)]


@pytest.mark.parametrize('method', ['nearest', 'brecq', 'qdrop'])
@pytest.mark.parametrize('network', NETWORKS)
def test_a_whole_quantization(network: str, method: str) -> None:
    model, x = make(network), images()
    with torch.no_grad():
        wanted = model(x)
    found = []
    for device in (GPU, CPU):
        quantized = mmbrecq.quantize(
            copy.deepcopy(model).to(device), x, preset='onnxruntime', weight_bits=4, method=method, iterations=80
        )
        found.append(quantized(x.to(device)).cpu())
    power = wanted.var(0).mean()
    apart = float((found[0] - found[1]).square().mean() / power)
    gpu, cpu = (float((output - wanted).square().mean() / power) for output in found)
    # what is learned may go another way after one rounding that flips, to a place as good
    assert apart <= (0.05 if method == 'nearest' else 1) * cpu and gpu == pytest.approx(cpu, rel=0.3), (apart, gpu, cpu)


@pytest.fixture(scope='module')
def quantized() -> Any:
    return mmbrecq.quantize(make('residual').to(GPU), images(), preset='onnxruntime', method='nearest')


def test_export_of_a_model_on_the_gpu(quantized: Any, tmp_path: Path) -> None:
    assert quantized.export(tmp_path / 'net.onnx') == [tmp_path / 'net.onnx']
    assert [deviation.batch for deviation in quantized.deviations] == [1, 3]
    assert all(deviation.error < 1e-3 for deviation in quantized.deviations)


def test_a_deep_network_is_prepared_where_tf32_is_allowed() -> None:
    from torchvision.models import resnet50

    torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    x = F.interpolate(images(8), 64).to(GPU)
    model = resnet50().to(GPU).train()
    with torch.no_grad():
        model(x)
    pipeline.prepare(model.eval(), x, BRECQQuantizer({'bits': 8}, {'bits': 8}))
    assert torch.backends.cudnn.allow_tf32


def test_checkpoints_go_from_device_to_device(quantized: Any, tmp_path: Path) -> None:
    x = images(5, seed=3)
    quantized.save(tmp_path / 'gpu.pth')
    here = mmbrecq.load(tmp_path / 'gpu.pth', make('residual'))
    close(quantized(x.to(GPU)), here(x), rtol=1e-3, atol=1e-3)
    here.save(tmp_path / 'cpu.pth')
    back = mmbrecq.load(tmp_path / 'cpu.pth', make('residual').to(GPU))
    torch.testing.assert_close(back(x.to(GPU)), quantized(x.to(GPU)))
