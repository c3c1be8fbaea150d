"""The benchmarks run from the command line as their README has them."""

from __future__ import annotations

import importlib
import json
import math
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from mmbrecq.reconstruction.cache import CachePlan
from mmbrecq.report.rows import format_seconds

pytest.importorskip('mmpretrain', reason='the benchmarks run models of mmpretrain')

ROOT = Path(__file__).resolve().parents[1]
CONFIG = 'configs/demo/resnet_digits_w2a4.py'


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, '-W', 'ignore', str(ROOT / 'benchmarks' / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reconstruction_prints_speed_and_ratio_for_every_unit_and_stage() -> None:
    out = run('reconstruction.py', CONFIG, '--steps', '8', '--repeats', '2', '--images', '32')
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in out.splitlines() if line.startswith('|')]
    stages = ('weights', 'activations', 'joint')
    columns = [f'{stage} {what}' for stage in stages for what in ('it/s', 'ratio', 'set-up ms', 'caching')]
    assert rows[0] == ['unit', 'plain it/s', *columns, 'peak MB']
    assert [row[0] for row in rows[2:4]] == ['backbone.conv1', 'backbone.layer1.0']
    for row in rows[2:-1]:
        speeds = [float(cell) for cell in (row[1], *row[2:-1:4])]
        ratios = [float(cell) for cell in row[3:-1:4]]
        # one measurement of each: the speeds are rounded to whole iterations
        for speed, ratio in zip(speeds[1:], ratios, strict=True):
            assert ratio == pytest.approx(speeds[0] / speed, rel=0.01 + 0.5 / speed + 0.5 / speeds[0], abs=0.01)
        # a share of nearly nothing, or on a busy machine of nearly all, is rounded
        assert all(0 <= float(cell.removesuffix(' %')) <= 100 for cell in row[5:-1:4])
        assert float(row[-1]) > 100
    assert rows[-1][0] == 'geometric mean'
    means = [float(cell) for cell in rows[-1][3:-1:4]]
    for column, mean in zip(range(3, 15, 4), means, strict=True):
        values = [float(row[column]) for row in rows[2:-1]]
        assert mean == pytest.approx(math.exp(statistics.mean(map(math.log, values))), rel=0.03)


def test_accuracy_prints_mean_and_spread_over_seeds(tmp_path: Path) -> None:
    options = ['reconstructor.weights.iterations=2', 'reconstructor.activations.iterations=2', 'exporters=[]']
    options += ['calibration.num_samples=32', 'calibration.batch_size=32', 'evaluations=[nearest,quantized]']
    out = run('accuracy.py', CONFIG, '--seeds', '0', '1', '--work-dir', str(tmp_path), '--cfg-options', *options)
    row = next(line for line in out.splitlines() if line.startswith('| resnet_digits_w2a4 | 0 1 |'))
    cells = [cell.strip() for cell in row.strip('|').split('|')]
    assert cells[2] == cells[4] == '' and re.fullmatch(r'\d+\.\d\d ± \d+\.\d\d', cells[5])
    memory = re.search(r'^peak RSS of the imports alone: (\d+\.\d\d) MB$', out, re.MULTILINE)
    assert memory is not None and 100 < float(memory[1]) < float(cells[-1].split()[0])


def load(name: str) -> ModuleType:
    folder = str(ROOT / 'benchmarks')
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def test_spread_has_digits_for_percentages_and_for_fractions() -> None:
    accuracy = load('accuracy')
    assert accuracy.spread([81.0, 82.0, 83.0]) == '82.00 ± 1.00'
    assert accuracy.spread([0.55, 0.57]) == '0.560 ± 0.014'
    assert accuracy.spread([0.5]) == '0.500' and accuracy.spread([]) == ''


def test_scale_reads_what_a_run_says() -> None:
    scale = load('scale')
    plan = CachePlan('host', 4_620_000_000, 'a', working_bytes=2_050_000_000, working_unit='b')
    text = f'{plan}\njoint 1/26 a: 12 iterations, 0.5 s, about {format_seconds(9780)} left\n'
    assert scale.Told.read(text, r'about (.+) left') == scale.Told('host', 4_620_000_000, 2_050_000_000, 9780)
    assert scale.Told.read(str(plan), r'about (.+) left').seconds is None
    with pytest.raises(SystemExit, match='expected the plan of memory, but got: nothing'):
        scale.Told.read('nothing', '')


def test_coverage_counts_the_layers_of_a_model() -> None:
    out = run('coverage.py', 'mmpretrain::resnet/resnet18_8xb32_in1k.py', '--size', '64', '64')
    # 17 convolutions, 3 of shortcuts, and the classifier
    assert '| mmpretrain::resnet/resnet18_8xb32_in1k.py | 21 | 21 | 0 |  |' in out.splitlines()


def test_mixed_precision_prints_its_three_comparisons(tmp_path: Path) -> None:
    options = ['reconstructor.weights.iterations=4', 'calibration.num_samples=32', 'search.pairs=False']
    out = run(
        'mixed_precision.py', CONFIG, '--choices', '6', '--budgets', '2', '--rounds', '1', '--work-dir', str(tmp_path),
        '--cfg-options', *options,
    )  # fmt: skip
    assert float(re.findall(r'6 random choices: rank correlation (-?[\d.]+)', out)[0]) > 0.5
    assert re.search(r'19 layers of 2, 4, 8 bits, 2 budgets: at most \d\.\d+% above the integer program', out)
    assert len(re.findall(r'latencies of 21 layers in \w+, measured twice: rank correlation', out)) == 2


def test_agreement_compares_simulation_and_deployed_files(tmp_path: Path) -> None:
    options = ['reconstructor.weights.iterations=2', 'reconstructor.activations.iterations=2']
    options += ['calibration.num_samples=32', 'calibration.batch_size=32', 'evaluations=[quantized]']
    run('../tools/ptq.py', CONFIG, '--work-dir', str(tmp_path), '--cfg-options', *options)
    out = run('agreement.py', CONFIG, str(tmp_path), '--images', '64', '--noise', '1e-9', '9', '--draws', '2')
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in out.splitlines() if line.startswith('|')]
    ways = ['simulation', 'one thread', 'without oneDNN', 'model.onnx', 'model.xml']
    assert [row[0] for row in rows[2:]] == [*ways, *['simulation with noise'] * 2]
    assert float(rows[2][2]) == 0
    quantized = json.loads((tmp_path / 'summary.json').read_text())['metrics']['quantized']['accuracy/top1']
    assert rows[2][1] == f'accuracy/top1 {quantized:.4g}'
    little, much = (float(re.findall(r'top1 ([\d.]+) ±', row[1])[0]) for row in rows[-2:])
    assert little == pytest.approx(quantized, abs=0.5) and much < 0.8 * quantized
    for row in rows[3:-2]:
        assert float(row[2]) < 0.1 * float(row[3]), 'far nearer to the simulation than to float'


def write_files(folder: Path) -> None:
    """Writes the float files of a network as peers.py does, and copies in place of all quantized ones."""
    peers = load('peers')
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    peers.write_float(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images, list, folder)
    assert np.array_equal(np.load(folder / 'calibration-0000.npy'), images.numpy())
    for name in ('nncf', 'nearest_openvino-seed0/deploy/model'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        for suffix in ('.xml', '.bin'):
            (folder / f'{name}{suffix}').write_bytes((folder / f'float{suffix}').read_bytes())
    (folder / 'onnxruntime.onnx').write_bytes((folder / 'float.onnx').read_bytes())


def test_peers_compares_files_in_a_work_dir(tmp_path: Path) -> None:
    write_files(tmp_path / 'mmpretrain-none.py')
    options = ['--work-dir', str(tmp_path), '--reuse', '--seconds', '0', '--python', sys.executable]
    out = run('peers.py', 'mmpretrain::none.py', *options)
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in out.splitlines() if line.startswith('|')]
    assert rows[2][:2] == ['mmpretrain::none.py', 'skipped: random weights'] and len(rows[2]) == len(rows[0]) == 7
    latency = rows[5]
    assert rows[3][-1] == 'mmbrecq / peer' and latency[:3] == ['mmpretrain::none.py', 'openvino', '1']
    assert all(float(cell) > 0 for cell in latency[3:7])
    ratio, low, high = map(float, re.fullmatch(r'([\d.]+) \(([\d.]+) to ([\d.]+)\)', latency[7]).groups())
    assert low <= ratio <= high
    assert len(rows) == 8, 'the same file has the same operations'


def test_peers_quantize_reads_every_image_once_and_knows_attention(tmp_path: Path) -> None:
    helper = pytest.importorskip('onnx').helper
    quantize = load('peers_quantize')
    first, second = np.arange(6.0).reshape(3, 2), np.arange(4.0).reshape(2, 2)
    for name, array in (('-0000', first), ('-0001', second), ('.head-0000', np.ones((130, 2)))):
        np.save(tmp_path / f'calibration{name}.npy', array)
    samples = quantize.samples_of(tmp_path, '')
    for _ in 'again':
        assert np.array_equal(np.concatenate(list(samples)), np.concatenate([first, second]))
    assert len(samples) == 5 and next(iter(samples)).dtype == np.float32
    assert [len(part) for part in quantize.samples_of(tmp_path, 'head')] == [64, 64, 2]
    with pytest.raises(FileNotFoundError, match='expected arrays of calibration images in'):
        quantize.samples_of(tmp_path, 'other')

    def graph(*values: str) -> object:
        nodes = [helper.make_node('Softmax', ['x'], ['s']), helper.make_node('Reshape', ['s', 'shape'], ['r'])]
        weight = helper.make_tensor('weight', 1, [1, 1], [1.0])
        return helper.make_graph([*nodes, helper.make_node('MatMul', list(values), ['y'])], 'g', [], [], [weight])

    assert quantize.has_attention(graph('r', 'values'))
    assert not quantize.has_attention(graph('r', 'weight')) and not quantize.has_attention(graph('x', 'values'))


def test_peers_ratio_is_that_of_paired_rounds() -> None:
    latency = load('peers_latency')
    times = {'float32': [4e-3] * 3, 'peer': [1e-3, 2e-3, 4e-3], 'mmbrecq': [1e-3, 4e-3, 12e-3]}
    assert latency.cells(times) == ['4.00', '', '2.00', '4.00', '2.00 (1.00 to 3.00)']
    calls: list[str] = []
    found = latency.in_turn({name: lambda name=name: calls.append(name) or time.sleep(0.011) for name in 'ab'}, 0)
    assert len(found['a']) == len(found['b']) == latency.FEWEST_ROUNDS and min(found['a']) >= 0.011
    assert ''.join(calls).startswith('aaabbb' + 'bbbaaa'), 'each round begins with another file'


@pytest.mark.parametrize('script', ['reconstruction.py', 'mixed_precision.py', 'accuracy.py'])
def test_a_missing_config_is_one_sentence(script: str, tmp_path: Path) -> None:
    options = [] if script == 'reconstruction.py' else ['--work-dir', str(tmp_path)]
    command = [sys.executable, '-W', 'ignore', str(ROOT / 'benchmarks' / script), 'missing.py', *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert 'missing.py' in done.stderr and len(done.stderr.strip().splitlines()) == 1
