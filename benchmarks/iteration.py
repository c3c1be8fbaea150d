"""Prints, per unit, the time of an optimisation step over that of the unit's plain float forward and backward.

Both run on the same batch of the same cached inputs in turn, so a ratio holds on a noisy machine. The plain step
computes the loss and the gradients of the unit's weights, without an optimizer.

    python benchmarks/iteration.py configs/brecq/resnet/brecq_w2a4_resnet18_cifar10.py
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mmbrecq.building import build
from mmbrecq.calibration import build_calibration_set
from mmbrecq.calibration.calibrator import calibrate_activations, calibrate_weights
from mmbrecq.calibration.images import collect_images
from mmbrecq.checkpoint import load_float_checkpoint
from mmbrecq.engine.config import build_runner, load_config, resolve_checkpoint
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.quantizers.prepared import QuantizedModel
from mmbrecq.reconstruction.cache import ActivationCache, CachePlan
from mmbrecq.reconstruction.losses import MSELoss
from mmbrecq.reconstruction.optimize import UnitData, optimize_unit
from mmbrecq.reconstruction.stages import Stage, StageOptions
from mmbrecq.reconstruction.streams import Streams
from mmbrecq.registry import QUANTIZERS


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--steps', type=int, default=40, help='steps per measurement')
    parser.add_argument('--repeats', type=int, default=3, help='measurements of each kind, in turn; the median counts')
    parser.add_argument('--images', type=int, default=256, help='calibration images')
    return parser.parse_args()


def prepare(config: str, images: int) -> tuple[QuantizedModel, Tensor]:
    """The model of a config, calibrated, and its calibration images."""
    cfg = load_config(config, {'calibration.num_samples': images}, 'work_dirs/iteration')
    loop = {'type': 'mmbrecq.QuantizedTestLoop', 'checkpoint': '', 'quantizer': cfg.quantizer}
    runner = build_runner(cfg, config, loop)
    load_float_checkpoint(runner.model, resolve_checkpoint(cfg.float_checkpoint, config))
    batch = collect_images(runner.model, build_calibration_set(cfg, dict(cfg.calibration)))
    model = build(QUANTIZERS, dict(cfg.quantizer)).prepare(runner.model, batch[:2])
    calibrate_weights(model)
    calibrate_activations(model, batch.split(64))
    return model, batch


def seconds(function: Callable[[], object], steps: int) -> float:
    """Seconds per step of a function that takes ``steps`` of them."""
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) / steps


def plain_steps(unit: ReconstructionUnit, parameters: list[Tensor], data: UnitData, steps: int) -> None:
    """Float forward and backward passes on random batches of 32."""
    loss = MSELoss()
    for parameter in parameters:
        parameter.requires_grad_(True)
    for _ in range(steps):
        index = torch.randperm(len(data.targets[0]))[:32]
        outputs = unit.module(*[x[index] for x in data.float_inputs])
        torch.autograd.grad(data.loss(outputs, index, loss), parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)


def measure(model: QuantizedModel, unit: ReconstructionUnit, data: UnitData, stage: Stage, repeats: int) -> float:
    """Median ratio of an optimisation step to a plain one."""
    weights, quantizers = model.unit_weights(unit), model.unit_quantizers(unit)
    parameters = [module.parametrizations.weight.original for module, _ in weights]
    steps = stage.options.iterations

    def optimise() -> None:
        with model.quantization(weights=True, activations=stage.quantizes_activations):
            optimize_unit(
                unit.name, unit.module, weights, quantizers, data, MSELoss(), stage, torch.Generator().manual_seed(0),
                torch.device('cpu'), lambda step, loss: None,
            )  # fmt: skip

    def plain() -> None:
        with model.quantization(weights=False, activations=False):
            plain_steps(unit, parameters, data, steps)

    plain()
    ratios = [seconds(optimise, steps) / seconds(plain, steps) for _ in range(repeats)]
    return statistics.median(ratios)


def main() -> None:
    """Prints a line per unit and the geometric means."""
    args = parse_args()
    model, images = prepare(args.config, args.images)
    options = StageOptions(iterations=args.steps)
    stages = (
        Stage('weights', options, learns_rounding=True, learns_scale=False),
        Stage('activations', options, learns_rounding=False, learns_scale=True),
        Stage('joint', StageOptions(iterations=args.steps, drop_prob=0.5), learns_rounding=True, learns_scale=True),
    )
    print('| unit | cache s | ' + ' | '.join(stage.name for stage in stages) + ' |')
    print('| --- ' * (len(stages) + 2) + '|')
    ratios: dict[str, list[float]] = {stage.name: [] for stage in stages}
    with ActivationCache(CachePlan('host', 0, ''), torch.device('cpu'), Path('.')) as cache:
        streams = Streams(model, model.units, cache.hold(images), cache, 32)
        for index, unit in enumerate(model.units):
            start = time.perf_counter()
            targets = streams.run(unit, streams.float_inputs(unit), weights=False, activations=False)
            quantized = streams.run(unit, streams.quantized_inputs(unit), weights=True, activations=True)
            caching = time.perf_counter() - start
            data = UnitData(streams.quantized_inputs(unit), streams.float_inputs(unit), targets)
            line = []
            for stage in stages:
                if unit.layers:
                    ratios[stage.name].append(measure(model, unit, data, stage, args.repeats))
                    line.append(f'{ratios[stage.name][-1]:.2f}')
            print(f'| {unit.name} | {caching:.2f} | ' + ' | '.join(line) + ' |', flush=True)
            streams.advance(index, targets, quantized)
    means = [math.exp(statistics.mean(map(math.log, values))) for values in ratios.values()]
    print('| geometric mean | | ' + ' | '.join(f'{mean:.2f}' for mean in means) + ' |')


if __name__ == '__main__':
    main()
