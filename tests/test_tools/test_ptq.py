"""The whole job on the demo: what a run says, what it leaves, and that the choices of a config reach it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from mmengine.hooks import Hook
from onnx import numpy_helper

from mmbrecq.registry import HOOKS

TINY = (
    'calibration.num_samples=16', 'calibration.batch_size=16', 'reconstructor.weights.batch_size=8',
    'reconstructor.activations.batch_size=8', 'reconstructor.weights.iterations=2',
    'reconstructor.activations.iterations=2', 'evaluations=[quantized]', 'exporters=[]',
)  # fmt: skip
SHORT = ('calibration.num_samples=64', 'reconstructor.activations.iterations=2')
UNITS = ['backbone.conv1', *(f'backbone.layer{i}.{j}' for i in (1, 2, 3, 4) for j in (0, 1)), 'head.fc']


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / 'summary.json').read_text())
    return summary


def test_a_run_succeeds_and_is_quiet_where_there_is_no_terminal(demo_run: Any) -> None:
    assert demo_run.outcome.status == 0, demo_run.outcome.err
    assert demo_run.outcome.err == ''
    assert '\r' not in demo_run.outcome.out and '\x1b' not in demo_run.outcome.out


def test_the_console_shows_the_work_and_the_log_everything(demo_run: Any) -> None:
    (log,) = demo_run.folder.glob('*/*.log')
    logged = log.read_text()
    for preamble in ('System environment', 'float_checkpoint = ', 'Hooks will be executed'):
        assert preamble in logged and preamble not in demo_run.outcome.out
    for line in ('weights 1/10 backbone.conv1: loss', 'activations 10/10 head.fc: loss', 'deployed in OpenVINO: '):
        assert line in logged and line in demo_run.outcome.out
    # the weights are measured before the second pass fits biases and scales to quantized activations
    lines = ('weights 10/10', 'weights: accuracy', 'activations 1/10')
    first, measured, second = (logged.index(line) for line in lines)
    assert first < measured < second
    assert len(demo_run.outcome.out.splitlines()) < 50
    assert '| deployed in ONNX Runtime |' in demo_run.outcome.out


def test_what_a_run_leaves(demo_run: Any) -> None:
    pictures = {name for name in demo_run.contents() if name.startswith('pictures/')}
    assert len(pictures) == 4
    assert set(demo_run.contents()) - pictures == {
        'calibration_ids.txt', 'deploy/model.bin', 'deploy/model.onnx', 'deploy/model.xml', 'layers.txt',
        'quantized.pth', 'reconstruction.pth', 'report.html', 'resnet_digits_w2a4.py', 'summary.json',
        'deploy/notes.txt', 'notes.txt',
    }  # fmt: skip


def test_the_report_shows_predictions(demo_run: Any) -> None:
    pictures = [content for name, content in demo_run.contents().items() if name.startswith('pictures/')]
    page = (demo_run.folder / 'report.html').read_text()
    assert sorted(re.findall('base64,([^"]+)"', page)) == sorted(base64.b64encode(p).decode() for p in pictures)


def test_foreign_files_of_the_work_dir_stay(demo_run: Any) -> None:
    assert demo_run.contents()['notes.txt'] == demo_run.contents()['deploy/notes.txt'] == b'mine'


def test_summary(demo_run: Any) -> None:
    summary = summary_of(demo_run.folder)
    metrics = summary['metrics']
    for name in ('float', 'nearest', 'weights', 'quantized'):
        assert set(metrics[name]) == {'accuracy/top1'}, name
    assert set(metrics['deployed']) == {'ONNX Runtime', 'OpenVINO'}
    assert metrics['float']['accuracy/top1'] > 95 > metrics['nearest']['accuracy/top1']
    assert (
        summary['seed'] == 0 and summary['preset'] == 'academic' and summary['versions']['torch'] in torch.__version__
    )
    assert [(u['stage'], u['name']) for u in summary['units']] == [
        (stage, unit) for stage in ('weights', 'activations') for unit in UNITS
    ]
    for unit in summary['units']:
        assert unit['iterations'] == (20 if unit['stage'] == 'weights' else 10)
        assert 0 <= unit['loss_after'] <= unit['loss_before']
    assert {name: tuple(bits.values()) for name, bits in summary['bits'].items() if name != 'head.fc'} == {
        name: (8, 8) if name == 'backbone.conv1' else (2, 4) for name in summary['bits'] if name != 'head.fc'
    }
    assert summary['bits']['head.fc'] == {'weight': 8, 'activation': 8}
    assert len(summary['bits']) == 21 and summary['float_layers'] == []
    # of few images only the worst are looked for
    assert summary['grids']['count'] == 40 > len(summary['grids']['grids']) >= 5
    size = summary['model_size_bytes']
    assert size['float'] == 4 * sum(w.numel() for w in float_weights()) and size['quantized'] < size['float'] / 10
    assert summary['peak_memory_bytes']['host'] > 0
    steps = summary['seconds']
    parts = [steps[name] for name in ('prepare', 'calibrate', 'reconstruct', 'evaluate', 'export')]
    assert min(parts) > 0 and max(parts) < steps['total']


def float_weights() -> list[torch.Tensor]:
    """Parameters of the demo's model once its BatchNorms are folded: weights, and a bias for each output channel."""
    path = Path(__file__).resolve().parents[2] / 'configs' / 'demo' / 'resnet_digits.pth'
    state = torch.load(path, weights_only=True)['state_dict']
    weights = [value for name, value in state.items() if name.endswith('weight') and value.dim() > 1]
    return weights + [weight.new_zeros(len(weight)) for weight in weights]


def test_layer_list(demo_run: Any) -> None:
    lines = (demo_run.folder / 'layers.txt').read_text().splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert len(rows) == 21
    assert rows['backbone.conv1'] == ['Conv2d', 'W8A8', 'unit', 'backbone.conv1']
    assert rows['backbone.layer2.0.downsample.0'] == ['Conv2d', 'W2A4', 'unit', 'backbone.layer2.0']
    assert rows['head.fc'] == ['Linear', 'W8A8', 'unit', 'head.fc']


def test_calibration_ids_are_of_the_training_split(demo_run: Any) -> None:
    from mmbrecq.data.digits import DigitsDataset

    ids = (demo_run.folder / 'calibration_ids.txt').read_text().split()
    train = {info['img_path'] for info in DigitsDataset(split='train').load_data_list()}
    assert len(set(ids)) == 64 and set(ids) <= train


def test_checkpoint_holds_integers_and_tells_how_it_was_made(demo_run: Any) -> None:
    checkpoint = torch.load(demo_run.folder / 'quantized.pth', weights_only=True)
    meta, bits = checkpoint['meta'], summary_of(demo_run.folder)['bits']
    assert meta['bits'] == {name: [b['weight'], b['activation']] for name, b in bits.items()}
    assert meta['seed'] == 0 and meta['calibration_ids_file'] == 'calibration_ids.txt'
    assert 'num_samples=64' in meta['config'] and meta['versions']['mmbrecq']
    codes = {name: value for name, value in checkpoint['state_dict'].items() if name.endswith('.original0')}
    assert len(codes) == 21
    for name, value in codes.items():
        layer = name.split('.parametrizations')[0]
        assert value.dtype in (torch.int8, torch.uint8)
        assert int(value.max()) - int(value.min()) < 2 ** bits[layer]['weight']


def test_deployed_weights_lie_on_the_low_bit_grid(demo_run: Any) -> None:
    graph = onnx.load(demo_run.folder / 'deploy' / 'model.onnx').graph
    stored = [numpy_helper.to_array(tensor) for tensor in graph.initializer]
    kernels = [array for array in stored if array.ndim == 4]
    assert len(kernels) == 20
    assert {array.dtype.kind for array in kernels} <= {'i', 'u'}
    assert sum(len(np.unique(array)) <= 4 for array in kernels) == 19


def test_the_written_config_gives_the_same_model_again(demo_run: Any, call: Any, demo: Path, tmp_path: Path) -> None:
    again = tmp_path / 'again.py'
    again.write_bytes(demo_run.contents()['resnet_digits_w2a4.py'])
    options = (f'float_checkpoint={demo.parent / "resnet_digits.pth"}', 'evaluations=[]', 'exporters=[]')
    outcome = call('ptq', again, *options)
    assert outcome.status == 0, outcome.err
    assert (tmp_path / 'work' / 'again.py').is_file()
    first, second = (
        torch.load(folder / 'quantized.pth', weights_only=True)['state_dict']
        for folder in (demo_run.folder, tmp_path / 'work')
    )
    # the first ran in a process of its own: what other libraries did here may change the order of a sum
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    integers = [name for name in first if not first[name].is_floating_point()]
    assert integers and all(torch.equal(first[name], second[name]) for name in integers)


@pytest.fixture
def calls() -> list[tuple[str, ...]]:
    """What the hook that the test registers was told."""
    told: list[tuple[str, ...]] = []

    class TellingHook(Hook):
        def before_reconstruct_stage(self, runner: Any, stage: Any, units: Any, progress: Any) -> None:
            told.append(('before stage', stage.name, str(len(units))))

        def before_reconstruct_unit(self, runner: Any, stage: Any, unit: Any) -> None:
            told.append(('before', unit.name))

        def after_reconstruct_step(self, runner: Any, stage: Any, unit: Any, step: int, loss: float) -> None:
            assert loss >= 0
            told.append(('step', unit.name, str(step)))

        def after_reconstruct_unit(self, runner: Any, stage: Any, unit: Any, result: Any, progress: Any) -> None:
            assert (result.name, result.stage) == (unit.name, stage.name)
            told.append(('after', unit.name))

        def after_reconstruct_stage(self, runner: Any, stage: Any) -> None:
            told.append(('after stage', stage.name))

        def after_reconstruct(self, runner: Any) -> None:
            told.append(('after all',))

    HOOKS.register_module(name='TellingHook', force=True, module=TellingHook)
    return told


def test_hooks_are_called_in_order(
    call: Any, config: Callable[[str], Path], calls: list[tuple[str, ...]], tmp_path: Path
) -> None:
    path = config("custom_hooks = [dict(type='mmbrecq.TellingHook')]")
    outcome = call('ptq', path, *TINY, 'evaluations=[]', 'seed=1', 'reconstructor.weights.iterations=101')
    assert outcome.status == 0, outcome.err
    expected: list[tuple[str, ...]] = []
    for stage, steps in (('weights', ('100', '101')), ('activations', ('2',))):
        begin = calls[len(expected)]
        expected.append(('before stage', stage, begin[2]))
        for unit in UNITS:
            expected += [('before', unit), *(('step', unit, step) for step in steps), ('after', unit)]
        expected.append(('after stage', stage))
    assert calls == [*expected, ('after all',)]
    done = torch.load(tmp_path / 'work' / 'reconstruction.pth', weights_only=True)['meta']['units_done']
    assert [tuple(pair) for pair in done] == [(stage, unit) for stage in ('weights', 'activations') for unit in UNITS]


def test_fisher_weighted_loss(demo_run: Any, call: Any, demo: Path, tmp_path: Path) -> None:
    options = ('exporters=[]', 'evaluations=[quantized]', 'reconstructor.loss.type=FisherLoss')
    outcome = call('ptq', demo, *SHORT, *options, 'reconstructor.weights.iterations=2')
    assert outcome.status == 0, outcome.err
    assert summary_of(tmp_path / 'work')['loss'] == 'FisherLoss, by the task loss on annotated images'
    units = summary_of(tmp_path / 'work')['units']
    assert all(0 < unit['loss_after'] <= unit['loss_before'] for unit in units) and len(units) == 20
    # the same images, the same nearest rounding: weights of mean 1 keep the magnitude of the loss, but are not all 1
    ratio = units[0]['loss_before'] / summary_of(demo_run.folder)['units'][0]['loss_before']
    assert 0.05 < ratio < 20 and abs(ratio - 1) > 1e-3


def test_qdrop_learns_everything_in_one_pass(call: Any, config: Callable[[str], Path], tmp_path: Path) -> None:
    path = config("reconstructor = dict(_delete_=True, type='QDropReconstructor', joint=dict(iterations=4))")
    outcome = call('ptq', path, 'calibration.num_samples=32', 'exporters=[]', 'evaluations=[weights,quantized]')
    assert outcome.status == 0, outcome.err
    summary = summary_of(tmp_path / 'work')
    assert [(unit['stage'], unit['name']) for unit in summary['units']] == [('joint', unit) for unit in UNITS]
    # weights that were fitted to quantized activations are not measured without them
    assert summary['metrics']['quantized'] and not summary['metrics']['weights']


def test_float_activations(call: Any, demo: Path, tmp_path: Path) -> None:
    options = ('quantizer.activation=None', 'quantizer.weight.bits=4', 'evaluations=[nearest,weights,quantized]')
    outcome = call('ptq', demo, *TINY, *options)
    assert outcome.status == 0, outcome.err
    summary = summary_of(tmp_path / 'work')
    assert {unit['stage'] for unit in summary['units']} == {'weights'}
    assert {bits['activation'] for bits in summary['bits'].values()} == {None}
    assert {bits['weight'] for bits in summary['bits'].values()} == {4, 8}
    assert summary['metrics']['weights'] == summary['metrics']['quantized'] != {}
    assert 'W4A32' in (tmp_path / 'work' / 'layers.txt').read_text()
    assert outcome.out.splitlines()[-1].endswith('report.html') and 'W4A32' in outcome.out


def test_only_what_evaluations_name_is_measured(call: Any, demo: Path, tmp_path: Path) -> None:
    # of a single image, too
    outcome = call('ptq', demo, *TINY, 'evaluations=[nearest]', 'calibration.num_samples=1')
    assert outcome.status == 0, outcome.err
    metrics = summary_of(tmp_path / 'work')['metrics']
    assert [name for name, values in metrics.items() if values] == ['nearest']


def test_help_explains(run: Any, call: Any) -> None:
    outcome = run('ptq', '--help')
    assert (outcome.status, outcome.err) == (0, '')
    for word in ('quantized.pth', 'deploy/', 'report.html', 'summary.json', '--work-dir', '--cfg-options KEY=VALUE'):
        assert word in outcome.out, word
    outcome = call('test', '--help')
    assert outcome.status == 0 and '.onnx' in outcome.out and '--cfg-options KEY=VALUE' in outcome.out


def test_a_dry_run_prints_the_work_and_leaves_no_result(run: Any, demo: Path, tmp_path: Path) -> None:
    outcome = run('ptq', demo, '--dry-run', '--work-dir', tmp_path / 'dry', '--cfg-options', *SHORT)
    assert outcome.status == 0, outcome.err
    for word in (
        'backbone.layer1.0.conv1',
        'W2A4',
        '10 units: backbone.conv1',
        'off its simulation by',
        'of 21 quantized',
    ):
        assert word in outcome.out
    assert re.search(r'the reconstruction will take about .*\d', outcome.out) and 'cached' in outcome.out
    assert not [path.name for path in (tmp_path / 'dry').glob('*.*') if path.is_file()]
