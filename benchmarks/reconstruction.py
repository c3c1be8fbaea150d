"""Prints, per unit and stage, the speed of the reconstruction and what it costs beside plain float training.

A ratio is the time of an iteration over that of the unit's plain float forward and backward pass on the same
batch of the same cached inputs: loss and gradients of the weights, no optimizer, tensors in torch's own order. Both
run in turn, each several times, and the shortest time of each counts: whatever else a machine does only adds to it.
Steps are timed without what a stage does once, before the first and after the last one: that is its set-up, in
milliseconds. Caching is the passes over all calibration images that a stage needs, as a share of its time at the
iterations of the config.

    python benchmarks/reconstruction.py configs/brecq/resnet/brecq_w2a4_resnet18_cifar10.py
"""

from __future__ import annotations

import argparse
import math
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmbrecq import pipeline
from mmbrecq.building import build
from mmbrecq.data import build_calibration_set
from mmbrecq.data.images import collect_images
from mmbrecq.engine.config import add_cfg_options, build_runner, load_config, resolve_checkpoint, run_tool
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction import QDropReconstructor, Task
from mmbrecq.reconstruction.batches import UnitData
from mmbrecq.reconstruction.cache import ActivationCache, CachePlan
from mmbrecq.reconstruction.losses import MSELoss
from mmbrecq.reconstruction.optimize import optimize_unit
from mmbrecq.reconstruction.stages import Stage
from mmbrecq.reconstruction.streams import Streams
from mmbrecq.reconstruction.values import MemoryValues
from mmbrecq.registry import QUANTIZERS, RECONSTRUCTORS
from mmbrecq.runs.checkpoint import load_float_checkpoint


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--steps', type=int, default=50, help='steps per measurement')
    parser.add_argument(
        '--repeats', type=int, default=5, help='measurements of each kind, in turn; the shortest counts'
    )
    parser.add_argument('--images', type=int, default=256, help='calibration images')
    parser.add_argument('--units', nargs='+', help='measure these alone')
    add_cfg_options(parser)
    return parser.parse_args()


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Args:
        model: The model of a config, calibrated.
        images (Tensor): Its calibration images, on its device.
        stages: Of the config's reconstructor, and the joint one in addition.
        samples: Calibration images of the config.
    """

    model: QuantizedModel
    images: Tensor
    stages: Sequence[Stage]
    samples: int


@dataclass(frozen=True)
class Speed:
    """Of one stage of one unit.

    Args:
        seconds: Per iteration.
        ratio: To the plain step.
        setup: Seconds before the first and after the last one.
        caching: Share of caching in the time of the stage.
    """

    seconds: float
    ratio: float
    setup: float
    caching: float


def prepare(config: str, images: int, options: dict[str, Any] | None = None) -> Subject:
    """The model of a config, calibrated, and its calibration images."""
    cfg = load_config(config, options, 'work_dirs/reconstruction')
    samples = int(cfg.calibration.get('num_samples', 1024))
    cfg.calibration.num_samples = images
    loop = {'type': 'mmbrecq.QuantizedTestLoop', 'checkpoint': '', 'quantizer': cfg.quantizer}
    # puts the model on the device that mmengine finds
    runner = build_runner(cfg, config, loop)
    load_float_checkpoint(runner.model, resolve_checkpoint(cfg.float_checkpoint, config))
    drawn = build_calibration_set(cfg, dict(cfg.calibration))
    batch, drawn = collect_images(runner.model, drawn)
    model = pipeline.prepare(runner.model, batch, build(QUANTIZERS, dict(cfg.quantizer)))
    pipeline.calibrate(Task(model, batch, drawn.batches, None, 0, Path(cfg.work_dir)))
    stages = [s for s in build(RECONSTRUCTORS, dict(cfg.reconstructor)).stages if s.granularity is None]
    if all(stage.name != 'joint' for stage in stages):
        # as many images in a step, and bits in its products, as the other stages have
        first = stages[0].options
        stages += QDropReconstructor({'batch_size': first.batch_size, 'autocast': first.autocast}).stages
    return Subject(model, batch, stages, samples)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that a function takes, the work that it leaves on the device included."""
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def in_torchs_order(data: UnitData, device: torch.device) -> UnitData:
    """The float inputs and targets of a unit in the order that torch gives them, which may not be the cached one."""
    inputs, targets = (
        [MemoryValues(x[:].contiguous(), device) for x in values] for values in (data.float_inputs, data.targets)
    )
    return UnitData(inputs, inputs, targets)


def plain_steps(
    unit: ReconstructionUnit, parameters: list[Tensor], data: UnitData, batch_size: int, steps: int
) -> None:
    """Float forward and backward passes on random batches."""
    loss = MSELoss()
    for parameter in parameters:
        parameter.requires_grad_(True)
    for _ in range(steps):
        index = torch.randperm(len(data.targets[0]))[:batch_size]
        batch = data.read(index)
        torch.autograd.grad(batch.loss(unit.module(*batch.float_inputs), loss), parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)


def measure(
    subject: Subject, unit: ReconstructionUnit, data: UnitData, passes: float, steps: int, repeats: int
) -> tuple[float, dict[str, Speed]]:
    """Seconds of a plain step, and the speed of every stage.

    Args:
        subject: The model and its stages.
        unit: One of its units.
        data: What the unit is trained on.
        passes: Seconds of one pass over the images.
        steps: Steps per measurement.
        repeats: Measurements of each kind.
    """
    model, device = subject.model.image_graph, subject.images.device
    floats = in_torchs_order(data, device)
    weights, quantizers = model.unit_weights(unit), model.unit_quantizers(unit)
    parameters = [module.parametrizations.weight.original for module, _ in weights]

    def optimise(stage: Stage, iterations: int) -> None:
        stage = replace(stage, options=replace(stage.options, iterations=iterations))
        with model.quantization(weights=True, activations=stage.quantizes_activations):
            optimize_unit(
                unit.name, unit.module, weights, quantizers, data, MSELoss(), stage, torch.Generator().manual_seed(0),
                device, lambda step, loss: None,
            )  # fmt: skip

    def plain() -> None:
        with model.quantization(weights=False, activations=False):
            plain_steps(unit, parameters, floats, subject.stages[0].options.batch_size, steps)

    plain_times: list[float] = []
    # with one step, and with so many more
    times: dict[str, tuple[list[float], list[float]]] = {stage.name: ([], []) for stage in subject.stages}
    plain()
    for _ in range(repeats):
        plain_times.append(seconds(plain, device) / steps)
        for stage in subject.stages:
            for iterations, found in zip((1, 1 + steps), times[stage.name], strict=True):
                found.append(seconds(partial(optimise, stage, iterations), device))
    speeds, plain_step = {}, min(plain_times)
    for stage in subject.stages:
        one, all_of_them = (min(found) for found in times[stage.name])
        # a few steps may seem to take no time at all
        step = max(all_of_them - one, 1e-9) / steps
        setup = max(one - step, 0.0)
        # the float outputs, the quantized ones before and after, and those that step sizes are found from
        caching = (3 + stage.quantizes_activations) * passes * subject.samples / len(subject.images)
        share = caching / (caching + setup + step * stage.options.iterations)
        speeds[stage.name] = Speed(step, step / plain_step, setup, share)
    return plain_step, speeds


class PeakMemory:
    """The most memory in use since the last look: of the device, or of this process on the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        """Begins anew; where the system does not offer that, the peak is that of the whole process."""
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path('/proc/self/clear_refs').write_text('5')
        except OSError:
            return

    def read(self) -> int:
        """Bytes."""
        if self.device.type == 'cuda':
            return torch.cuda.max_memory_allocated(self.device)
        status = Path('/proc/self/status')
        found = re.search(r'^VmHWM:\s+(\d+) kB', status.read_text(), re.MULTILINE) if status.exists() else None
        return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    """Prints a line per unit and the geometric means."""
    args = parse_args()
    subject = prepare(args.config, args.images, args.cfg_options)
    model, device = subject.model.image_graph, subject.images.device
    names = [stage.name for stage in subject.stages]
    for head in subject.model.region_graphs:
        print(f'{head.path} reads regions and is left out')
    cells = [f'{name} {what}' for name in names for what in ('it/s', 'ratio', 'set-up ms', 'caching')]
    print(f'on {device}, {args.steps} steps, {args.repeats} times')
    print('| unit | plain it/s | ' + ' | '.join(cells) + ' | peak MB |')
    print('| --- ' * (len(cells) + 3) + '|')
    ratios: dict[str, list[float]] = {name: [] for name in names}
    memory = PeakMemory(device)
    place = 'host' if device.type == 'cpu' else 'device'
    cache = ActivationCache(CachePlan(place, 0, ''), device, Path('.'))
    streams = Streams(model, model.units, cache.hold(subject.images), cache, subject.stages[0].options.batch_size)
    for index, unit in enumerate(model.units):
        memory.reset()
        start = time.perf_counter()
        targets = streams.run(unit, streams.float_inputs(unit), weights=False, activations=False)
        quantized = streams.run(unit, streams.quantized_inputs(unit), weights=True, activations=True)
        wait(device)
        passes = (time.perf_counter() - start) / 2
        if unit.layers and (args.units is None or unit.name in args.units):
            data = UnitData(streams.quantized_inputs(unit), streams.float_inputs(unit), targets)
            plain, speeds = measure(subject, unit, data, passes, args.steps, args.repeats)
            line = []
            for name, speed in speeds.items():
                ratios[name].append(speed.ratio)
                line += [f'{1 / speed.seconds:.0f}', f'{speed.ratio:.2f}']
                line += [f'{1e3 * speed.setup:.0f}', f'{100 * speed.caching:.1f} %']
            print(f'| {unit.name} | {1 / plain:.0f} | {" | ".join(line)} | {memory.read() / 1e6:.0f} |', flush=True)
        streams.advance(index, targets, quantized)
    means = [math.exp(statistics.mean(map(math.log, values))) for values in ratios.values()]
    print('| geometric mean | | ' + ' | '.join(f' | {mean:.2f} | | ' for mean in means) + ' | |')


if __name__ == '__main__':
    sys.exit(run_tool(main))
