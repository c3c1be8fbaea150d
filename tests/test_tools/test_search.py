"""From sensitivities to a config of bits to a quantized model, on the demo's network with few images and iterations."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmbrecq.mixed_precision.costs.models import Call, LayerShape
from mmbrecq.mixed_precision.sensitivity.table import SensitivityTable
from mmbrecq.schema import save_json

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / 'configs' / 'demo' / 'resnet_digits_w2a4.py'
SHORT = (
    'calibration.num_samples=64', 'reconstructor.weights.iterations=4', 'reconstructor.activations.iterations=2',
)  # fmt: skip


@pytest.fixture(scope='module')
def first_analysis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first test that asks for an analysis leaves it here for the others."""
    return tmp_path_factory.mktemp('first') / 'analysis'


@pytest.fixture
def analysed(call: Any, first_analysis: Path, tmp_path: Path) -> Path:
    """The work dir of an analysis, to be changed."""
    if not (first_analysis / 'sensitivity.html').exists():
        outcome = call('analyze', DEMO, *SHORT, work_dir=first_analysis)
        assert outcome.status == 0, outcome.err
    return shutil.copytree(first_analysis, tmp_path / 'analysis')


def test_bits_are_chosen_within_a_budget_and_quantized(call: Any, analysed: Path, tmp_path: Path) -> None:
    table = SensitivityTable.load(analysed / 'sensitivity.json')
    assert len(table.layers) == 21
    # the first and the last layer keep their 8 bits
    assert {layer.name for layer in table.layers} - set(table.searched) == {'backbone.conv1', 'head.fc'}
    assert set(table.pairs) >= {('backbone.layer1.0.conv1', 'backbone.layer1.0.conv2')}
    assert all(
        table.loss[name][2] > table.loss[name][8] for name in ('backbone.layer4.0.conv1', 'backbone.layer3.1.conv2')
    )
    assert (analysed / 'sensitivity.html').read_text().count('<circle') == 3 * 19 + 3

    outcome = call('search', DEMO, '--budget=size=0.11x', work_dir=analysed)
    assert outcome.status == 0, outcome.err
    (predicted,) = re.findall(r'size: ([\d.]+) kB', outcome.out)
    assert set(re.findall(r'^backbone\S+ +(\d)', outcome.out, re.MULTILINE)) == {'2', '4', '8'}

    outcome = call('ptq', analysed / 'bits.py', *SHORT, 'evaluations=[]', 'exporters=[]', work_dir=tmp_path / 'ptq')
    assert outcome.status == 0, outcome.err
    summary = json.loads((tmp_path / 'ptq' / 'summary.json').read_text())
    size = summary['model_size_bytes']
    assert size['quantized'] <= 0.11 * size['float']
    assert f'{size["quantized"] / 1e3:.1f}' == predicted
    assert {bits['weight'] for bits in summary['bits'].values()} == {2, 4, 8}
    # the rounding is the analysis's; what the config fixes is reconstructed
    assert [unit['name'] for unit in summary['units'] if unit['stage'] == 'weights'] == ['backbone.conv1', 'head.fc']
    search = summary['search']
    assert search['bits'] == {name: bits['weight'] for name, bits in summary['bits'].items() if name in search['bits']}
    assert len(search['bits']) == 19
    assert 0.3 * search['predicted'] < search['measured'] < 3 * search['predicted']
    assert search['spent']['size'] == size['quantized'] <= search['budgets']['size'] == 0.11 * size['float']
    costs, losses = zip(*search['front'], strict=True)
    assert sorted(costs) == list(costs) and sorted(losses, reverse=True) == list(losses)
    assert min(loss for cost, loss in search['front'] if cost <= search['spent']['size']) >= 0.99 * search['predicted']
    assert 'Choice of bits' in (tmp_path / 'ptq' / 'report.html').read_text()

    edited = analysed / 'edited.py'
    edited.write_text((analysed / 'bits.py').read_text().replace('weight_bits=8', 'weight_bits=7', 1))
    error = call('ptq', edited, *SHORT, 'evaluations=[]', 'exporters=[]', work_dir=tmp_path / 'edited').error
    assert re.search(r"expected the bits of .*search.json, but layer 'backbone\.\S+' has others in the config", error)

    # of another seed, or when told to, everything is reconstructed
    for option, reason in (('search.reuse=False', 'search.reuse is False'), ('seed=1', 'analysis was of another seed')):
        outcome = call(
            'ptq', analysed / 'bits.py', *SHORT, option, 'evaluations=[]', 'exporters=[]', work_dir=tmp_path / option
        )
        assert outcome.status == 0, outcome.err
        summary = json.loads((tmp_path / option / 'summary.json').read_text())
        assert len([unit for unit in summary['units'] if unit['stage'] == 'weights']) == 10
        assert summary['search']['measured'] > 0
        (log,) = (tmp_path / option).glob('*/*.log')
        assert reason in log.read_text()


def test_the_cheapest_bits_within_a_measured_drop(call: Any, analysed: Path, tmp_path: Path) -> None:
    options = (*SHORT, 'search.held_out=100', 'search.searcher.type=IntegerProgram')
    outcome = call('search', DEMO, *options, '--budget=drop=20', work_dir=analysed)
    assert outcome.status == 0, outcome.err
    search = json.loads((analysed / 'search.json').read_text())
    trials = search['trials']
    (chosen,) = [trial for trial in trials if trial['chosen']]
    # a hundred images: whole points
    assert chosen['drop'] == round(chosen['drop'], 9) <= 20
    assert all(trial['drop'] > 20 for trial in trials if trial['spent'] < chosen['spent'])
    assert any(trial['drop'] > 20 for trial in trials), 'else nothing was to be found'
    assert chosen['spent'] == search['spent']['size'] and chosen['predicted'] == search['predicted']
    assert (search['metric'], search['held_out'], search['asked']) == ('accuracy/top1', 100, {'drop': '20'})
    assert f'drop: {chosen["drop"]:.4g} points of accuracy/top1 on 100 held-out images, budget 20' in outcome.out
    told = re.findall(
        r'^size [\d.]+ kB, predicted loss [\d.e-]+: drops by (-?[\d.]+) points$', outcome.out, re.MULTILINE
    )
    assert [float(drop) for drop in told] == [float(f'{trial["drop"]:.4g}') for trial in trials]
    # float layers are among the choices without being asked for
    assert trials[0]['spent'] > 0.3 * search['float_costs']['size']

    page = tmp_path / 'ptq' / 'report.html'
    outcome = call('ptq', analysed / 'bits.py', *SHORT, 'evaluations=[]', 'exporters=[]', work_dir=page.parent)
    assert outcome.status == 0, outcome.err
    assert 'On 100 held-out images accuracy/top1 dropped by' in page.read_text()

    error = call('search', DEMO, *options, 'seed=1', '--budget=drop=20', work_dir=analysed).error
    expected = 'expected the config and images of the analysis to measure a drop with, but seed was 0 and is 1 now'
    assert expected in error
    error = call('search', DEMO, *options, 'search.budgets.size=0.072x', '--budget=drop=1', work_dir=analysed).error
    assert re.search(
        'but got 1 points: the choice .* is predicted to lose least drops by [0-9]+ on the held-out', error
    )


def test_held_out_images_need_labels(call: Any, folder_config: Any, tmp_path: Path) -> None:
    path, _ = folder_config
    text = path.read_text() + "train_dataloader['dataset'].update(with_label=False)\n"
    path.write_text(text + 'search = dict(budgets=dict(drop=1), held_out=1)\ncalibration = dict(num_samples=20)\n')
    error = call('analyze', path).error
    assert 'expected annotated calibration images to measure the drop of search.budgets on, but those that are' in error
    assert not list(tmp_path.rglob('*.pth')), 'nothing was reconstructed'


def test_one_command_chooses_bits_of_weights_and_activations(call: Any, tmp_path: Path) -> None:
    config, work = tmp_path / 'config.py', tmp_path / 'work'
    checkpoint = DEMO.with_name('resnet_digits.pth')
    search = (
        "dict(candidates=[2, 8, 'float'], activation_candidates=[4, 8], pairs=False, images=32,"
        " budgets=dict(size='0.5x', bitops='0.05x'))"
    )
    config.write_text(f'_base_ = [{str(DEMO)!r}]\nfloat_checkpoint = {str(checkpoint)!r}\nsearch = {search}\n')
    outcome = call('ptq', config, *SHORT, 'evaluations=[quantized]', work_dir=work)
    assert outcome.status == 0, outcome.err
    summary = json.loads((work / 'summary.json').read_text())
    search = summary['search']
    assert set(search['bits'].values()) <= {2, 8, None}
    assert {2, 8} <= set(search['bits'].values())
    assert set(search['activation_bits'].values()) == {4, 8}
    for name, bits in summary['bits'].items():
        if name in search['bits']:
            assert bits['weight'] == search['bits'][name]
            # the value that the first two layers of a stage read has one number of bits
            assert bits['activation'] == search['activation_bits'].get(name, bits['activation'])
    shared = [f'backbone.layer2.0.{name}' for name in ('conv1', 'downsample.0')]
    assert len({summary['bits'][name]['activation'] for name in shared}) == 1
    assert all(search['spent'][name] <= search['budgets'][name] for name in ('size', 'bitops'))
    assert search['measured'] > 0
    top1 = summary['metrics']['quantized']['accuracy/top1']
    outcome = call('test', config, work / 'quantized.pth', work_dir=tmp_path / 'test')
    assert f'accuracy/top1: {top1!r}' in outcome.out + outcome.err


def test_bits_are_chosen_by_the_task_loss(call: Any, tmp_path: Path) -> None:
    search = [f'search.{option}' for option in ('pairs=False', 'images=32', 'loss=fisher', 'budgets.size=0.15x')]
    outcome = call('ptq', DEMO, *SHORT, *search, 'evaluations=[]', 'exporters=[]', work_dir=tmp_path / 'work')
    assert outcome.status == 0, outcome.err
    search = json.loads((tmp_path / 'work' / 'summary.json').read_text())['search']
    assert search['kind'] == 'Fisher-weighted error'
    # a sum over layers of what is, to second order, the square of a sum
    assert 0.1 * search['predicted'] < search['measured'] < 10 * search['predicted']
    assert 'Fisher-weighted error from the float outputs' in (tmp_path / 'work' / 'report.html').read_text()


def test_a_choice_that_is_missing_or_no_choice(call: Any, tmp_path: Path) -> None:
    config = tmp_path / 'config.py'
    checkpoint = DEMO.with_name('resnet_digits.pth')
    config.write_text(
        f"_base_ = [{str(DEMO)!r}]\nfloat_checkpoint = {str(checkpoint)!r}\nsearch = dict(result='search.json')\n"
    )
    assert 'expected the file of search.result, but there is none' in call('ptq', config, *SHORT).error
    (tmp_path / 'search.json').write_text('{"kind": 3}')
    assert 'search.json: expected what tools/search.py writes, but it is not' in call('ptq', config, *SHORT).error


def test_an_analysis_goes_on_where_it_stopped(call: Any, analysed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = analysed / 'sensitivity.json'
    before = path.read_text()
    states = {state: state.stat().st_mtime_ns for state in (analysed / 'states').iterdir()}
    assert len(states) == 3 * 8
    lost = next(state for state in states if 'layer2.0-w4' in state.name)
    lost.unlink()
    content = json.loads(before)
    del content['loss']['backbone.layer2.0.conv1']['4']
    path.write_text(json.dumps(content))
    outcome = call('analyze', DEMO, *SHORT, work_dir=analysed)
    assert outcome.status == 0, outcome.err
    assert json.loads(path.read_text()) == json.loads(before)
    changed = [state for state in states if state.stat().st_mtime_ns != states[state]]
    assert changed == [lost]


def test_an_analysis_of_something_else_is_not_taken_up(call: Any, analysed: Path) -> None:
    before = (analysed / 'sensitivity.json').read_text()
    outcome = call('analyze', DEMO, *SHORT, 'seed=1', work_dir=analysed)
    assert (
        'sensitivity.json is of another analysis: seed was 0 and is 1 now; choose another --work-dir' in outcome.error
    )
    assert (analysed / 'sensitivity.json').read_text() == before
    (analysed / 'sensitivity.json').unlink()
    assert (
        'to tell what those states are of, but there is none' in call('analyze', DEMO, *SHORT, work_dir=analysed).error
    )


def save_table(folder: Path) -> None:
    """Three layers, of which the bits of two are to be chosen."""
    calls = (Call((3, 8, 8), (4, 8, 8)),)
    shapes = [LayerShape(name, 'Conv2d', (4, 3, 3, 3), calls, (8, 8), 4, True) for name in 'abc']
    loss = {name: {2: 1.0, 8: 0.0} for name in 'ab'}
    table = SensitivityTable('divergence', [2, 8], shapes, ['a', 'b'], dict.fromkeys('abc', 'unit'), 100, {}, loss)
    save_json(table, folder / 'sensitivity.json')


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ((), 'expected --budget NAME=AMOUNT, or search.budgets in the config, but got neither'),
        (
            ('--budget=size=tiny',),
            'expected the budget of size to be a number above 0, such as 1.2MB, 3ms or 0.1x of the',
        ),
        (('--budget=size=0x',), "but got '0x'"),
        (('search.budgets.size=0.1q',), "but got '0.1q'"),
        (('--budget=speed=3',), "expected budgets of the costs size, bitops, but got one of 'speed'"),
        (
            (
                '--budget=size=0.01x',
            ),  # biases, a layer at 8 bits, two at 2, with their scales: 100 + (108 + 16) + 2 * (27 + 16)
            'the least cost of these layers and candidates is 310 bytes',
        ),
        (('--budget=size',), "expected --budget as NAME=AMOUNT, each name once, such as size=0.1x, but got 'size'"),
        (('search.searcher.type=Greedy', '--budget=size=1x'), "unknown searcher type 'Greedy'"),
        (
            ('search.generations=3', '--budget=size=1x'),
            "unknown option 'generations' of search: expected candidates or ",
        ),
        (('--table=none.json', '--budget=size=1x'), 'none.json: cannot be read: No such file or directory'),
    ],
)
def test_bad_budgets(call: Any, words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    shapes = [
        LayerShape(name, 'Conv2d', (4, 3, 3, 3), (Call((3, 8, 8), (4, 8, 8)),), (8, 8), 4, True) for name in 'abc'
    ]
    loss = {name: {2: 1.0, 8: 0.0} for name in 'ab'}
    table = SensitivityTable('divergence', [2, 8], shapes, ['a', 'b'], dict.fromkeys('abc', 'unit'), 100, {}, loss)
    save_json(table, tmp_path / 'work' / 'sensitivity.json')
    assert re.search(message, call('search', DEMO, *words).error)
    assert not (tmp_path / 'work' / 'bits.py').exists()


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        (
            'search.candidates=[2]',
            r"two or more different integers in 2..8, one of which may be 'float', but got \[2\]",
        ),
        ('search.candidates=[2,9]', r'search.candidates to be two or more different integers in 2..8, .* \[2, 9\]'),
        ('search.candidates=[float,float]', r"but got \['float', 'float'\]"),
        (
            'search.activation_candidates=[4,4]',
            r'activation_candidates to be different integers in 2..8, but got \[4, 4',
        ),
        ('search.activation_candidates=8', "expected option 'activation_candidates' of search to be a list, but got 8"),
        ('search.images=0', 'search.images to be an integer >= 1, but got 0'),
        ('search.generations=3', "unknown option 'generations' of search: expected candidates or "),
        ('search=3', "expected 'search' to be a dict, but got 3"),
        ('search.budgets.speed=3', "expected budgets of the costs size, bitops, but got one of 'speed'"),
        ('search.budgets.size=tiny', 'expected the budget of size to be a number above 0'),
        (
            'search.budgets.size=0.01x',
            'a budget of size that can be kept, but got .*: the least cost of these',
        ),
        ('search.searcher.type=Greedy', "unknown searcher type 'Greedy'"),
        ('search.costs=[]', r'expected search.costs to be a list of cost models, but got \[\]'),
        ('search.budgets=3', "expected option 'budgets' of search to be a dict, but got 3"),
        ('search.budgets.drop=-1', 'expected the budget of drop to be points of the metric, >= 0, but got -1'),
        ('search.held_out=0', 'expected search.held_out to be an integer >= 1, but got 0'),
        ('search.reuse=3', "expected option 'reuse' of search to be True or False, but got 3"),
    ],
)
def test_bad_options_of_an_analysis(call: Any, tmp_path: Path, option: str, message: str) -> None:
    assert re.search(message, call('analyze', DEMO, *SHORT, option).error)
    assert not list(tmp_path.rglob('*.pth')), 'nothing was reconstructed'


def test_a_run_that_searches_checks_its_budget_first(call: Any, tmp_path: Path) -> None:
    options = ('search.budgets.drop=1', 'search.held_out=5000')
    assert 'images for calibration and 5000 others, see search.held_out' in call('ptq', DEMO, *SHORT, *options).error
    assert 'expected a budget of bitops that can be kept' in call('ptq', DEMO, *SHORT, 'search.budgets.bitops=1').error
    assert not list(tmp_path.rglob('*.pth')), 'nothing was reconstructed'


@pytest.mark.parametrize(
    ('tool', 'line', 'message'),
    [
        (
            'analyze',
            "quantizer = dict(overrides=[dict(pattern='*', weight_bits=4)])",
            'the config fixes those of all layers',
        ),
        (
            'search',
            "search = dict(costs=[dict(type='Price')], budgets=dict(size='1x'))",
            "unknown cost model type 'Price'",
        ),
        (
            'search',
            "search = dict(costs=[dict(type='ModelSize')] * 2, budgets=dict(size='1x'))",
            'cost models of different names',
        ),
    ],
)
def test_configs_that_leave_nothing_to_choose(call: Any, tmp_path: Path, tool: str, line: str, message: str) -> None:
    config = tmp_path / 'config.py'
    checkpoint = DEMO.with_name('resnet_digits.pth')
    config.write_text(f'_base_ = [{str(DEMO)!r}]\nfloat_checkpoint = {str(checkpoint)!r}\n{line}\n')
    if tool == 'search':
        save_table(tmp_path / 'work')
    assert message in call(tool, config, *SHORT).error


def test_a_quick_analysis_tells_what_every_grid_costs(call: Any, tmp_path: Path) -> None:
    outcome = call('analyze', DEMO, '--quick')
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / 'work' / 'grids.json').read_text())
    grids = found['grids']
    assert (found['kind'], found['images']) == ('divergence', 16)
    assert sum(grid['kind'] == 'weight' for grid in grids) == 21
    assert [grid['loss'] for grid in grids] == sorted((grid['loss'] for grid in grids), reverse=True)
    bits = {grid['name']: grid['bits'] for grid in grids}
    assert bits['backbone.conv1'] == bits['head.fc'] == 8 and bits['backbone.layer1.0.conv1'] == 2
    # two bits cost more than eight
    losses = {grid['name']: grid['loss'] for grid in grids}
    assert losses['backbone.layer3.0.conv1'] > 100 * losses['backbone.conv1']
    assert found['together'] > grids[0]['loss']
    rows = re.findall(r'^\| ([\d.e-]+) \|', outcome.out, re.MULTILINE)
    assert [float(row) for row in rows] == [float(f'{grid["loss"]:.3g}') for grid in grids[:20]]
    assert 'backbone.layer3.0.conv1' in (tmp_path / 'work' / 'grids.html').read_text()
    assert f'with all grids {found["together"]:.3g}, 16 images; {len(grids) - 20} more grids' in outcome.out
