"""Prints how much longer an iteration takes without one family of compiled kernels, or without any of them.

Runs with and without a family take turns in one process with one thread, and what counts is CPU time: the mean of the
lowest third of all iterations of a kind. Weights are random, as are the images: nothing but the time matters.

    python benchmarks/kernels.py mobilenetv2 --size 64 --units layer2.1 layer4.1 layer6.1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mmbrecq import pipeline
from mmbrecq.building import build
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.kernels import native
from mmbrecq.quantizers.quantized_model import QuantizedGraph
from mmbrecq.reconstruction import BRECQReconstructor, MSELoss, QDropReconstructor, Stage, Task, optimize
from mmbrecq.reconstruction.batches import Batches, UnitData
from mmbrecq.reconstruction.results import load_unit_state, unit_state
from mmbrecq.reconstruction.values import laid_out, memory_format
from mmbrecq.registry import QUANTIZERS

FAMILIES = {
    'fake quantization': {'fake_quantize', 'fake_quantize_gradient'},
    'rounding': {'soft_weight', 'rounding_gradient'},
    'mixing': {'mix'},
    'Adam': {'adam'},
    'all': set(native.OPERATIONS),
}


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('network', choices=['resnet18', 'mobilenetv2', 'retinanet_head'])
    parser.add_argument('--size', type=int, default=64, help='height and width of the images')
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--iterations', type=int, default=4, help='iterations of a run that count')
    parser.add_argument('--repeats', type=int, default=3, help='runs of each kind')
    parser.add_argument('--units', nargs='+', help='measure these alone')
    return parser.parse_args()


class RetinaNetHead(nn.Module):
    """The box branch of RetinaNet's head on a pyramid of four levels."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(256, 256, 3, padding=1) for _ in range(4))
        self.out = nn.Conv2d(256, 36, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for _ in range(4):
            y = x
            for conv in self.convs:
                y = torch.relu(conv(y))
            outputs.append(self.out(y))
            x = nn.functional.max_pool2d(x, 2)
        return outputs


def network(name: str) -> tuple[nn.Module, int]:
    """Returns a network with random weights, and the number of its input's channels."""
    from mmpretrain.models import MobileNetV2, ResNet

    if name == 'retinanet_head':
        return RetinaNetHead(), 256
    return ResNet(18, out_indices=(3,)) if name == 'resnet18' else MobileNetV2(), 3


class Recorder(torch.fx.Interpreter):
    """Runs a graph and keeps the values of all its nodes."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: torch.fx.Node) -> Tensor:
        self.values[n.name] = value = super().run_node(n)
        return value


class Clock(Batches):
    """Notes the CPU time at which every iteration begins."""

    marks: list[float]

    def begin(self) -> None:
        """Begins the next iteration."""
        Clock.marks.append(time.process_time())
        super().begin()


def seconds(
    model: nn.Module, graph: QuantizedGraph, unit: ReconstructionUnit, data: UnitData, stage: Stage, disabled: set[str]
) -> list[float]:
    """Returns the CPU time of the iterations of one run, without the first, from a fresh state."""
    Clock.marks = []
    native.DISABLED.clear()
    native.DISABLED.update(disabled)
    state = unit_state(model, unit)
    with graph.quantization(True, stage.quantizes_activations):
        optimize.optimize_unit(
            unit.name, unit.module, graph.unit_weights(unit), graph.unit_quantizers(unit), data, MSELoss(), stage,
            torch.Generator().manual_seed(0), torch.device('cpu'), lambda *_: None,
        )  # fmt: skip
    load_unit_state(model, unit, state)
    return [end - start for start, end in zip(Clock.marks[1:], Clock.marks[2:], strict=False)]


def typical(times: Sequence[float]) -> float:
    """Returns the mean of the lowest third: whatever else a machine does only adds to the time."""
    return statistics.mean(sorted(times)[: max(1, len(times) // 3)])


def main() -> None:
    """Prints a row for every pass, the sum over the units."""
    args = parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, channels = network(args.network)
    # mmpretrain's own eval() returns nothing
    model.eval()
    images = torch.rand(2 * args.batch_size, channels, args.size, args.size)
    weight = {'bits': 2, 'rounding': {'type': 'AdaRound'}}
    config = {'type': 'BRECQQuantizer', 'preset': 'academic', 'weight': weight, 'activation': {'bits': 4}}
    quantized = pipeline.prepare(model, images, build(QUANTIZERS, config))
    pipeline.calibrate(Task(quantized, images[:8], list, None, 0, Path()))
    graph = quantized.image_graph
    recorder = Recorder(graph.compiled)
    with torch.no_grad(), graph.quantization(False, False):
        recorder.run(images)
    # with the regulariser, as four fifths of the iterations of a training have it; the first is left out, the last open
    options = {'batch_size': args.batch_size, 'warmup': 0.0, 'iterations': args.iterations + 2}
    stages = [*BRECQReconstructor(options, options).stages, *QDropReconstructor(options).stages]
    optimize.Batches = Clock  # type: ignore[misc]
    totals = {stage.name: dict.fromkeys(['', *FAMILIES], 0.0) for stage in stages}
    for unit in graph.units:
        if not unit.layers or (args.units and unit.name not in args.units):
            continue
        layout = memory_format(unit.module)
        inputs, outputs = (
            [laid_out(recorder.values[n], layout) for n in names] for names in (unit.inputs, unit.outputs)
        )
        data = UnitData([x + 0.01 * torch.randn_like(x) for x in inputs], inputs, outputs)
        for stage in stages:
            times: dict[str, list[float]] = {name: [] for name in totals[stage.name]}
            for _ in range(args.repeats):
                for name, disabled in FAMILIES.items():
                    times[''] += seconds(model, graph, unit, data, stage, set())
                    times[name] += seconds(model, graph, unit, data, stage, disabled)
            for name, found in times.items():
                totals[stage.name][name] += typical(found)
    print(f'{args.network}, {args.size}x{args.size}, {args.batch_size} images, {torch.__version__}')
    print('| pass | ms | ' + ' | '.join(f'without {name}' for name in FAMILIES) + ' |')
    print('| --- ' * (2 + len(FAMILIES)) + '|')
    for name, row in totals.items():
        cells = [f'{100 * (row[family] / row[""] - 1):+.0f} %' for family in FAMILIES]
        print(f'| {name} | {1e3 * row[""]:.0f} | {" | ".join(cells)} |')


if __name__ == '__main__':
    main()
