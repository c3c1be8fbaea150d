"""Holds mixed precision against references: measured losses, the exact solution, a second measurement of latencies.

Measures the sensitivities of a config into the work dir, or takes those that are there, and prints

* the rank correlation of the loss that the tables predict with the loss that was measured, over random choices of bits;
* how far the genetic search ends from the integer program, for random budgets, and its seconds;
* the rank correlation of two tables of latencies, each measured anew.

    python benchmarks/mixed_precision.py configs/brecq/resnet/brecq_w2a32_resnet18_cifar10.py --work-dir work_dirs/mixed
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from mmbrecq.engine.bit_search import analyze
from mmbrecq.engine.config import add_common_arguments, build_runner, load_config, resolve_checkpoint, run_tool
from mmbrecq.mixed_precision.chosen_bits import ChosenBits
from mmbrecq.mixed_precision.costs.measured import MeasuredLatency
from mmbrecq.mixed_precision.costs.models import ModelSize
from mmbrecq.mixed_precision.search.bits import build_problem, describe_choice
from mmbrecq.mixed_precision.search.genetic import GeneticSearcher
from mmbrecq.mixed_precision.search.integer import IntegerProgram
from mmbrecq.mixed_precision.search.problem import BitProblem
from mmbrecq.mixed_precision.sensitivity.table import SensitivityTable
from mmbrecq.schema import save_json

RUNTIMES = ('openvino', 'onnxruntime')
PARTS = ('losses', 'searches', 'latencies')


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS, help='what to compare')
    parser.add_argument('--choices', type=int, default=30, help='random choices of bits')
    parser.add_argument('--budgets', type=int, default=10, help='random budgets')
    parser.add_argument('--rounds', type=int, default=10, help='rounds of a measurement of latencies')
    add_common_arguments(parser)
    return parser.parse_args()


def random_choices(problem: BitProblem, count: int) -> np.ndarray:
    """Choices of all kinds: the share of each number of bits is drawn anew for every one."""
    draw = np.random.default_rng(0)
    made = []
    for _ in range(count):
        shares = draw.dirichlet(np.ones(len(problem.candidates)))
        made.append(draw.choice(len(problem.candidates), len(problem.layers), p=shares))
    return np.array(made)


def measured_losses(args: argparse.Namespace, table: SensitivityTable, choices: np.ndarray) -> list[float]:
    """The loss of every choice, its units put together from the states of the analysis."""
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    loop = {key: cfg[key] for key in ('quantizer', 'reconstructor', 'calibration')}
    loop.update(
        type='mmbrecq.AnalysisLoop',
        float_checkpoint=resolve_checkpoint(cfg.float_checkpoint, args.config),
        search=dict(cfg.get('search') or {}),
    )
    loop = build_runner(cfg, args.config, loop).test_loop
    loop.load()
    problem = build_problem(table, [], {})
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        for chosen in choices:
            result = describe_choice(table, [], problem, chosen)
            result.states = str((Path(cfg.work_dir) / 'states').resolve())
            save_json(result, Path(folder) / 'search.json')
            choice = ChosenBits(Path(folder) / 'search.json', reuse=True)
            task = loop.prepare(table.candidates[0], None, result.overrides())
            task = choice.load_rounding(task, loop.reconstructor.stages[0])
            assert len(task.done) == len({table.units[name] for name in table.searched})
            losses.append(choice.measure(task))
    return losses


def compare_searches(table: SensitivityTable, count: int) -> None:
    """Genetic search against integer program, for budgets of size between the least and the most."""
    sizes = build_problem(table, [ModelSize()], {})
    ends = (sizes.least(values) for values in (sizes.costs['size'].table, sizes.loss))
    least, most = (float(sizes.spent('size', choice)) for choice in ends)
    worst, slowest = 0.0, 0.0
    for share in np.random.default_rng(0).uniform(0.02, 0.9, count):
        problem = build_problem(table, [ModelSize()], {'size': least + share * (most - least)})
        start = time.perf_counter()
        found = GeneticSearcher().search(problem, 0)
        slowest = max(slowest, time.perf_counter() - start)
        assert problem.feasible(found), 'a budget is exceeded'
        exact = float(problem.losses(IntegerProgram().search(problem)))
        worst = max(worst, (float(problem.losses(found)) - exact) / abs(exact))
    bits = ', '.join(map(str, table.candidates))
    print(
        f'genetic search over {len(table.searched)} layers of {bits} bits, {count} budgets: at most {worst:.3%} above '
        f'the integer program, {slowest:.1f} s at most'
    )


def _latencies(table: SensitivityTable, runtime: str, path: Path, rounds: int) -> np.ndarray:
    """Latencies of all layers, with 8 bits and in float, ``(layers, 2)``."""
    model = MeasuredLatency(runtime, str(path), rounds=rounds)
    model.prepare(table.layers)
    return np.array([[model.cost(layer, bits) for bits in ((8, 8), (None, None))] for layer in table.layers])


def compare_latencies(table: SensitivityTable, rounds: int) -> None:
    """Two measurements of the latencies of all layers, in each runtime."""
    for runtime in RUNTIMES:
        with tempfile.TemporaryDirectory() as folder:
            pair = [_latencies(table, runtime, Path(folder) / f'{i}.json', rounds) for i in range(2)]
        ranks = [spearmanr(pair[0][:, i], pair[1][:, i]).statistic for i in range(2)]
        total = pair[0].sum(0)
        print(
            f'latencies of {len(table.layers)} layers in {runtime}, measured twice: rank correlation {ranks[0]:.3f} in '
            f'8-bit integers, {ranks[1]:.3f} in float; sums {total[0]:.3g} and {total[1]:.3g} ms'
        )


def compare_losses(args: argparse.Namespace, table: SensitivityTable) -> None:
    """The loss that the tables predict for random choices of bits, and the measured one."""
    problem = build_problem(table, [], {})
    choices = random_choices(problem, args.choices)
    correlation = spearmanr(problem.losses(choices), measured_losses(args, table, choices)).statistic
    print(f'predicted and measured {table.kind} of {args.choices} random choices: rank correlation {correlation:.3f}')


def main() -> None:
    """Prints the comparisons that are asked for."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    cfg.launcher = 'none'
    table = analyze(cfg, args.config)
    if 'losses' in args.parts:
        compare_losses(args, table)
    if 'searches' in args.parts:
        compare_searches(table, args.budgets)
    if 'latencies' in args.parts:
        compare_latencies(table, args.rounds)


if __name__ == '__main__':
    sys.exit(run_tool(main))
