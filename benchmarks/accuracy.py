"""Runs recipes over seeds with tools/ptq.py and prints mean and spread of every metric as a Markdown table.

Each run is a process of its own, so its peak memory is its own. Figures go to benchmarks/README.md with the commit.

    python benchmarks/accuracy.py configs/brecq/resnet/brecq_w2a4_resnet18_cifar10.py --seeds 0 1 2
    python benchmarks/accuracy.py CONFIG --seeds 0 --cfg-options reconstructor.loss.type=FisherLoss --label fisher
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from mmbrecq.report.summary import Summary
from mmbrecq.schema import load_json

ROOT = Path(__file__).resolve().parents[1]


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', help='config files')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--metric', default='accuracy/top1')
    parser.add_argument('--label', default='', help='name of a variant, part of its work dirs')
    parser.add_argument('--work-dir', default='work_dirs/benchmark')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='passed on to tools/ptq.py')
    parser.add_argument('--reuse', action='store_true', help='take finished runs from the work dir')
    return parser.parse_args()


def run(config: str, seed: int, args: argparse.Namespace) -> Summary:
    """One run of tools/ptq.py; returns its summary."""
    name = '-'.join(part for part in (Path(config).stem, args.label, f'seed{seed}') if part)
    folder = Path(args.work_dir) / name
    summary = folder / 'summary.json'
    if not (args.reuse and summary.exists() and json.loads(summary.read_text())['seconds']['total']):
        command = [sys.executable, str(ROOT / 'tools/ptq.py'), config, '--work-dir', str(folder)]
        command += ['--cfg-options', f'seed={seed}', *args.cfg_options]
        environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
        folder.mkdir(parents=True, exist_ok=True)
        console = folder / 'console.log'
        with console.open('w') as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        if done.returncode:
            last = console.read_text().strip().rpartition('\n')[2]
            raise SystemExit(f'{config} failed with seed {seed}, see {console}; its last words are: {last}')
    return load_json(Summary, summary, 'tools/ptq.py')


def spread(values: list[float]) -> str:
    """``mean ± sample standard deviation``; the lone value of a single run."""
    if not values:
        return ''
    # percentages with two digits, fractions such as COCO's AP with three
    digits = 3 if max(values) <= 1 else 2
    if len(values) == 1:
        return f'{values[0]:.{digits}f}'
    return f'{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}'


def row(config: str, summaries: list[Summary], args: argparse.Namespace) -> list[str]:
    """A line of the table."""

    def values(metrics: list[Any]) -> list[float]:
        return [m[args.metric] for m in metrics if args.metric in m]

    names = ('float', 'nearest', 'weights', 'quantized')
    stages = [spread(values([getattr(s.metrics, name) for s in summaries])) for name in names]
    deployed = [
        spread(values([s.metrics.deployed.get(name, {}) for s in summaries])) for name in ('ONNX Runtime', 'OpenVINO')
    ]
    seconds = spread([s.seconds.reconstruct for s in summaries if s.seconds.reconstruct is not None])
    memory = spread([s.peak_memory_bytes.host / 1e6 for s in summaries if s.peak_memory_bytes.host is not None])
    name = Path(config).stem + (f' ({args.label})' if args.label else '')
    return [name, ' '.join(str(s) for s in args.seeds), *stages, *deployed, seconds, memory]


def import_memory() -> int:
    """Peak memory, in bytes, of a process that imports what a run imports."""
    code = 'import mmpretrain.models, mmbrecq.engine, onnx, onnxruntime, openvino; '
    code += 'from mmbrecq.runs.run_files import peak_memory; print(peak_memory().host)'
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-W', 'ignore', '-c', code]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(done.stdout.split()[-1])


def main() -> None:
    """Prints the table, and the peak memory of the imports alone."""
    args = parse_args()
    columns = 'config, seeds, float, nearest, weights, quantized, onnxruntime, openvino, reconstruct s, peak RSS MB'
    print('| ' + columns.replace(', ', ' | ') + ' |')
    print('| --- ' * len(columns.split(', ')) + '|')
    for config in args.configs:
        summaries = [run(config, seed, args) for seed in args.seeds]
        print('| ' + ' | '.join(row(config, summaries, args)) + ' |', flush=True)
    print(f'\npeak RSS of the imports alone: {import_memory() / 1e6:.2f} MB')


if __name__ == '__main__':
    main()
