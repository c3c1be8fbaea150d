"""Prints how far a deployed graph lies from its simulation, and the simulation from itself on other kernels.

The last bits of float32 sums differ between kernels; a value that falls on the other side of a rounding boundary moves
others behind it. Each row is one way to compute the same quantized network: its metric, and the distance of its raw
outputs from the simulation's and from the float network's (mean square of the difference over that of the float
output, summed over the outputs). Last, for scale, the metric of the simulation with random noise of given powers
added to each of its outputs: mean and standard deviation over draws.

    python benchmarks/agreement.py configs/brecq/yolox/brecq_w8a8-openvino_yolox_bccd.py work_dirs/RUN
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq.deploy.backends import DeployedModel
from mmbrecq.engine.config import build_runner, load_config, run_tool
from mmbrecq.engine.evaluation import evaluate
from mmbrecq.errors import ConfigError
from mmbrecq.fake_quants.activation import FakeQuantize
from mmbrecq.graph.components import components_of, set_forward
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.pipeline import load

Outputs = list[list[Tensor]]


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='of a classifier or of a one-stage detector')
    parser.add_argument('run', type=Path, help='work dir of a run of tools/ptq.py')
    parser.add_argument('--noise', type=float, nargs='*', default=[1e-5, 1e-4], help="powers of it, over the output's")
    parser.add_argument('--draws', type=int, default=6, help='of each noise')
    parser.add_argument('--images', type=int, default=16, help='test images that distances are measured on')
    return parser.parse_args()


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def float_activations(model: nn.Module) -> Iterator[None]:
    """Activation quantization off; the weights stay what they are."""
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantize)]
    for quantizer in quantizers:
        quantizer.enabled = False
    yield
    for quantizer in quantizers:
        quantizer.enabled = True


@contextmanager
def noisy_outputs(model: nn.Module, power: float, seed: int) -> Iterator[None]:
    """Gaussian noise on what the graph gives to post-processing, ``power`` times as strong as each output."""
    first = components_of(model)[0]
    forward, generator = first.forward, torch.Generator().manual_seed(seed)

    def add(value: Any) -> Any:
        if isinstance(value, Tensor):
            strength = (power * value.square().mean()).sqrt()
            return value + strength * torch.randn(value.shape, generator=generator).to(value)
        return type(value)(add(item) for item in value)

    set_forward(first, lambda *args, **kwargs: add(forward(*args, **kwargs)))
    yield
    set_forward(first, forward)


def distance(found: Outputs, wanted: Outputs, unit: Outputs) -> float:
    """Sum over the outputs of the power of the difference, over that of ``unit``."""
    total = 0.0
    for i in range(len(unit[0])):
        error = sum(float((f[i] - w[i]).square().sum()) for f, w in zip(found, wanted, strict=True))
        total += error / sum(float(u[i].square().sum()) for u in unit)
    return total


def main() -> None:
    """Prints the table."""
    args = parse_args()
    cfg = load_config(args.config, {}, 'work_dirs/agreement')
    checkpoint = str(args.run / 'quantized.pth')
    loop_cfg = {'type': 'mmbrecq.QuantizedTestLoop', 'checkpoint': checkpoint, 'quantizer': cfg.quantizer}
    runner = build_runner(cfg, args.config, loop_cfg)
    loop, model = runner.test_loop, runner.model.eval()
    if getattr(model, 'with_roi_head', False):
        raise ConfigError(f'expected a model whose outputs follow from the image alone, but {args.config} has regions')
    load(model, checkpoint, cfg.quantizer)
    images: list[Tensor] = []
    for batch in loop.dataloader:
        images.append(model.data_preprocessor(batch, False)['inputs'])
        if sum(map(len, images)) >= args.images:
            break

    @torch.no_grad()
    def outputs() -> Outputs:
        return [list(flatten_outputs(model(batch, mode='tensor')).values()) for batch in images]

    def metric() -> dict[str, float]:
        return evaluate(model, loop.dataloader, loop.evaluator, 'evaluation')

    with float_activations(model):
        target = outputs()
    simulated = outputs()
    ways: list[tuple[str, Callable[[], Any]]] = [
        ('simulation', nullcontext), ('one thread', one_thread),
        ('without oneDNN', lambda: torch.backends.mkldnn.flags(enabled=False)),
    ]  # fmt: skip
    files = [path for path in sorted((args.run / 'deploy').glob('model.*')) if path.suffix in ('.onnx', '.xml')]
    rows = []
    for name, way in ways:
        with ExitStack() as stack:
            stack.enter_context(way())
            rows.append((name, metric(), outputs()))
    noise = []
    for power in args.noise:
        drawn = []
        for seed in range(args.draws):
            with noisy_outputs(model, power, seed):
                drawn.append(next(iter(metric().values())))
        noise.append((power, statistics.mean(drawn), statistics.stdev(drawn) if len(drawn) > 1 else 0.0))
    for path in files:
        DeployedModel(model, path).attach()
        rows.append((path.name, metric(), outputs()))
    print('| computed by | metric | from the simulation | from float activations |\n| --- | --- | --- | --- |')
    for name, values, found in rows:
        key, value = next(iter(values.items()))
        away = distance(found, simulated, target), distance(found, target, target)
        print(f'| {name} | {key} {value:.4g} | {away[0]:.2g} | {away[1]:.2g} |')
    for power, mean, spread in noise:
        print(f'| simulation with noise | {key} {mean:.4g} ± {spread:.2g} | {power:.2g} | |')


if __name__ == '__main__':
    sys.exit(run_tool(main))
