"""Measures the reconstruction of a torchvision model on a GPU: correctness, speed, memory, kernels and waits.

    python benchmarks/gpu.py [--whole N]

takes two minutes without the whole recipe, and needs neither a network nor an OpenMMLab package but mmengine. On a
machine that has PyTorch's usual company (torch, torchvision, numpy, packaging, psutil, pyyaml, rich, matplotlib,
opencv), carry these wheels: mmengine, addict, termcolor, yapf, platformdirs. `MMBRECQ_GRAPHS=0`, which the script sets
itself where it compares, switches CUDA graphs off.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from mmbrecq import pipeline
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.quantizers import BRECQQuantizer, QuantizedModel
from mmbrecq.reconstruction import BRECQReconstructor, Task
from mmbrecq.reconstruction.batches import UnitData
from mmbrecq.reconstruction.cache import ActivationCache
from mmbrecq.reconstruction.callbacks import Callback
from mmbrecq.reconstruction.capture import SWITCH
from mmbrecq.reconstruction.losses import MSELoss
from mmbrecq.reconstruction.optimize import optimize_unit
from mmbrecq.reconstruction.stages import Stage
from mmbrecq.reconstruction.streams import Streams
from mmbrecq.reconstruction.values import MemoryValues

GPU = torch.device('cuda')
MODES = {'eager': '0', 'captured': '1'}
PLAIN = ('plain eager', 'plain captured', 'plain captured, channels last')


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet18', help='a classifier of torchvision')
    parser.add_argument('--images', type=int, default=1024)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--bits', type=int, nargs=2, default=(2, 4), help='of weights and of activations')
    parser.add_argument('--steps', type=int, default=100, help='steps per measurement')
    parser.add_argument('--autocast', help='dtype in which layers multiply while they are trained')
    parser.add_argument('--units', nargs='+', help='measure these alone')
    parser.add_argument('--profiled', default='layer2.0', help='unit whose kernels are listed')
    parser.add_argument('--whole', type=int, metavar='N', help='run the recipe with an N-th of its iterations, too')
    parser.add_argument('--commit', default='', help='commit of the code, to be printed')
    return parser.parse_args()


def make_images(count: int, size: int, device: torch.device) -> Tensor:
    """Returns random images whose neighbours and channels are alike, as in photographs; the same on every device."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 1, 8, 8, generator=generator).to(device)
    images = F.interpolate(coarse, size, mode='bilinear').repeat(1, 3, 1, 1)
    # the same noise for all
    return images.add_(0.2 * torch.randn(1, 3, size, size, generator=generator).to(device))


def make_model(name: str) -> nn.Module:
    """Returns a classifier with seeded weights, and with the statistics of random images in its normalisations."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).to(GPU).train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
            nn.init.uniform_(norm.weight, 0.5, 1.0)
    with torch.no_grad():
        for batch in make_images(256, 224, GPU).split(64):
            model(batch)
    return model.eval()


def make_task(model: nn.Module, images: Tensor, bits: tuple[int, int], folder: Path) -> Task:
    """Returns a copy of the model, prepared and calibrated."""
    builder = BRECQQuantizer({'bits': bits[0], 'rounding': {'type': 'AdaRound'}}, {'bits': bits[1]})
    prepared = pipeline.prepare(pipeline.copy_model(model), images, builder)
    task = Task(prepared, images, list, None, 0, folder)
    pipeline.calibrate(task)
    return task


def seconds(function: Callable[[], object]) -> float:
    """Returns the seconds that a function takes, the work that it leaves on the GPU included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def graphs(mode: str) -> Iterator[None]:
    """Switches CUDA graphs within the block."""
    os.environ[SWITCH] = MODES[mode]
    try:
        yield
    finally:
        del os.environ[SWITCH]


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
    found += [f'{w.filename}:{w.lineno}' for w in caught if 'synchroniz' in str(w.message)]


def learn(
    model: QuantizedModel, unit: ReconstructionUnit, data: UnitData[Any], stage: Stage, iterations: int
) -> list[float]:
    """Optimises a unit; returns its mean losses."""
    graph, told = model.image_graph, []
    stage = replace(stage, options=replace(stage.options, iterations=iterations))
    with graph.quantization(weights=True, activations=stage.quantizes_activations):
        optimize_unit(
            unit.name, unit.module, graph.unit_weights(unit), graph.unit_quantizers(unit), data, MSELoss(), stage,
            torch.Generator().manual_seed(0), data.targets[0].device, lambda _, loss: told.append(loss),
        )  # fmt: skip
    return told


def plain(
    model: QuantizedModel, unit: ReconstructionUnit, data: UnitData[Any], size: int, steps: int, mode: str
) -> float:
    """Returns the seconds of a float step: a random batch, the loss, and the gradients of the weights."""
    graph, loss = model.image_graph, MSELoss()
    if not mode.endswith('last'):
        # as torch has them
        inputs, targets = ([MemoryValues(x[:].contiguous(), GPU) for x in v] for v in (data.float_inputs, data.targets))
        data = UnitData(inputs, inputs, targets)
    parameters = [module.parametrizations.weight.original for module, _ in graph.unit_weights(unit)]
    index = partial(torch.randint, len(data), (size,), device=GPU)
    batch = data.read(index())

    def step() -> None:
        torch.autograd.grad(batch.loss(unit.module(*batch.float_inputs), loss), parameters)

    def read() -> None:
        for old, new in zip(batch.values, data.read(index()).values, strict=True):
            old.copy_(new)

    def run(work: Callable[[], None]) -> None:
        for _ in range(steps):
            read()
            work()

    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad(), graph.quantization(weights=False, activations=False):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            work: Callable[[], None] = step
            if 'captured' in mode:
                captured = torch.cuda.CUDAGraph()
                with torch.cuda.graph(captured, stream=stream):
                    step()
                work = captured.replay
            run(work)
            return min(seconds(partial(run, work)) for _ in range(2)) / steps
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def compare_with_cpu(model: nn.Module, bits: tuple[int, int], folder: Path) -> None:
    """Prints how far outputs and losses on the GPU are from those on the CPU, with and without TF32."""
    found: dict[str, tuple[Tensor, list[list[float]]]] = {}
    images = make_images(32, 96, torch.device('cpu'))
    for kind in ('cpu', 'gpu', 'gpu with TF32'):
        device = torch.device('cpu') if kind == 'cpu' else GPU
        torch.backends.cudnn.allow_tf32 = kind.endswith('TF32')
        task = make_task(model.to(device), images.to(device), bits, folder)
        graph, stages = task.model.image_graph, BRECQReconstructor().stages
        cache = ActivationCache(BRECQReconstructor().plan(task), device, folder)
        streams = Streams(graph, graph.units, cache.hold(images.to(device)), cache, 32)
        losses: list[list[float]] = []
        for number, unit in enumerate(graph.units[:4]):
            targets = streams.run(unit, streams.float_inputs(unit), weights=False, activations=False)
            if number == 3:
                data = UnitData(streams.quantized_inputs(unit), streams.float_inputs(unit), targets)
                losses = [learn(task.model, unit, data, stage, 60) for stage in stages]
            outputs = streams.run(unit, streams.quantized_inputs(unit), weights=True, activations=True)
            streams.advance(number, targets, outputs)
        with torch.no_grad(), graph.quantization(weights=True, activations=True):
            found[kind] = (torch.as_tensor(graph(images.to(device))).double().cpu(), losses)
    wanted, wanted_losses = found['cpu']
    for kind in ('gpu', 'gpu with TF32'):
        outputs, losses = found[kind]
        error = float((outputs - wanted).square().sum() / wanted.square().sum())
        off = [
            f'{n} {abs(a[-1] / b[-1] - 1):.1e}'
            for n, a, b in zip((s.name for s in stages), losses, wanted_losses, strict=True)
        ]
        print(f'{kind}: outputs are off the CPU by {error:.1e} of their power, losses of 60 steps by {", ".join(off)}')
    torch.backends.cudnn.allow_tf32 = True
    model.to(GPU)


def list_kernels(work: Callable[[], object], steps: int) -> None:
    """Prints the kernels in which most of the time is spent."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    print(f'{total / steps:.0f} us of kernels a step, {sum(event.count for event in events) / steps:.0f} kernels:')
    for event in events[:10]:
        share = event.self_device_time_total / total
        each, calls = event.self_device_time_total / steps, event.count / steps
        print(f'  {share:6.1%} {each:7.1f} us x{calls:4.1f} {event.key[:110]}')


def measure(args: argparse.Namespace, task: Task) -> None:
    """Prints a line for each unit, and what the whole recipe takes."""
    model, graph, options = task.model, task.model.image_graph, {'autocast': args.autocast}
    reconstructor = BRECQReconstructor(weights=options, activations=options)
    plan = reconstructor.plan(task)
    print(plan)
    cache = ActivationCache(plan, GPU, task.directory)
    size = reconstructor.stages[0].options.batch_size
    streams = Streams(graph, graph.units, cache.hold(task.images), cache, size)
    base, most = torch.cuda.memory_allocated(), 0.0
    columns = [f'{stage.name} {mode}' for stage in reconstructor.stages for mode in MODES]
    print('| unit | ' + ' | '.join(f'{c} it/s' for c in (*PLAIN, *columns)) + ' | ratios | GB |')
    print('| --- ' * (len(columns) + 6) + '|')
    recipe = dict.fromkeys(MODES, 0.0)
    ratios: dict[str, list[float]] = {column: [] for column in columns}
    for number, unit in enumerate(graph.units):
        start = time.perf_counter()
        targets = streams.run(unit, streams.float_inputs(unit), weights=False, activations=False)
        quantized = streams.run(unit, streams.quantized_inputs(unit), weights=True, activations=True)
        torch.cuda.synchronize()
        caching = 2 * (time.perf_counter() - start)
        if unit.layers and (args.units is None or unit.name in args.units):
            data = UnitData(streams.quantized_inputs(unit), streams.float_inputs(unit), targets)
            floats = {mode: plain(model, unit, data, size, args.steps, mode) for mode in PLAIN}
            torch.cuda.reset_peak_memory_stats()
            speeds: dict[str, float] = {}
            for stage in reconstructor.stages:
                for mode in MODES:
                    few = 60
                    with graphs(mode):
                        learn(model, unit, data, stage, 5)
                        one, all_of_them = (
                            min(seconds(partial(learn, model, unit, data, stage, n)) for _ in range(2))
                            for n in (few, few + args.steps)
                        )
                    step = max(all_of_them - one, 1e-9) / args.steps
                    recipe[mode] += caching + one + step * (stage.options.iterations - few)
                    speeds[f'{stage.name} {mode}'] = step
                    ratios[f'{stage.name} {mode}'].append(step / floats[f'plain {mode}'])
            rates = ' | '.join(f'{1 / t:.0f}' for t in (*floats.values(), *speeds.values()))
            own = ' '.join(f'{found[-1]:.2f}' for found in ratios.values())
            peak = (torch.cuda.max_memory_allocated() - base) / 1e9
            most = max(most, peak)
            print(f'| {unit.name} | {rates} | {own} | {peak:.2f} |', flush=True)
            if unit.name == args.profiled:
                inspect(model, unit, data, reconstructor)
        streams.advance(number, targets, quantized)
    means = ', '.join(f'{name} {math.exp(statistics.mean(map(math.log, v))):.2f}' for name, v in ratios.items())
    print(f'ratios to the plain step, geometric means: {means}')
    counts = ' + '.join(f'{stage.options.iterations:,}' for stage in reconstructor.stages)
    times = ', '.join(f'{mode} {spent:.0f} s' for mode, spent in recipe.items())
    print(f'the whole recipe, {counts} iterations with {len(task.images)} images, from these: {times}')
    room = (plan.peak_bytes + plan.working_bytes - task.images.nbytes) / 1e9
    print(f'peak memory {most:.2f} GB beside the model and the images, planned {room:.2f} GB')


def inspect(model: QuantizedModel, unit: ReconstructionUnit, data: UnitData[Any], recipe: BRECQReconstructor) -> None:
    """Prints the kernels of a unit's iterations, and how many of their operations wait for the GPU."""
    for stage in recipe.stages:
        for mode in MODES:
            counts = []
            with graphs(mode):
                for iterations in (60, 90):
                    with waits() as found:
                        learn(model, unit, data, stage, iterations)
                    counts.append(len(found))
            print(f'{stage.name} {mode}: {(counts[1] - counts[0]) / 30:.2f} waits a step, {counts[0]} beside the steps')
        print(f'{unit.name}, {stage.name}, captured: ', end='')
        list_kernels(partial(learn, model, unit, data, stage, 100), 100)


def run_whole(model: nn.Module, images: Tensor, bits: tuple[int, int], folder: Path, divisor: int) -> None:
    """Prints the time and the peak memory of the whole recipe with its iterations divided."""

    class Passes(Callback):
        def after_stage(self, stage: Stage) -> None:
            torch.cuda.synchronize()
            print(f'{stage.name}: done after {time.perf_counter() - start:.1f} s', flush=True)

    start = time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    task = make_task(model, images, bits, folder)
    torch.cuda.synchronize()
    print(f'prepared and calibrated after {time.perf_counter() - start:.1f} s')
    numbers = [stage.options.iterations // divisor for stage in BRECQReconstructor().stages]
    print(f'iterations: {numbers}')
    reconstructor = BRECQReconstructor(*({'iterations': number} for number in numbers))
    passes = pipeline.reconstruct(task, reconstructor, reconstructor.plan(task), Passes())
    results = [result for _, done in passes for result in done]
    for stage in reconstructor.stages:
        own = [result for result in results if result.stage == stage.name]
        before, after = (math.exp(statistics.mean(math.log(r.relative_losses[i]) for r in own)) for i in (0, 1))
        print(f'{stage.name}: relative loss {before:.2e} before, {after:.2e} after, geometric mean over units')
    print(f'peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB, model and images included')


def main() -> None:
    """Prints everything."""
    args = parse_args()
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, commit {args.commit or "unknown"}, {args.model}')
    bits = tuple(args.bits)
    with tempfile.TemporaryDirectory(prefix='mmbrecq-') as name:
        folder = Path(name)
        model = make_model(args.model)
        print(f'compared with the CPU in {seconds(partial(compare_with_cpu, model, bits, folder)):.0f} s')
        images = make_images(args.images, args.size, GPU)
        start = time.perf_counter()
        task = make_task(model, images, bits, folder)
        torch.cuda.synchronize()
        print(f'prepared and calibrated in {time.perf_counter() - start:.1f} s')
        measure(args, task)
        del task
        if args.whole:
            run_whole(model, images, bits, folder, args.whole)


if __name__ == '__main__':
    main()
