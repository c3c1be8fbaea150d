"""Every config of configs/brecq: what its name says is what it does, and the metafiles know all of them."""

from __future__ import annotations

import copy
import os
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config, config, utils
from mmengine.registry import init_default_scope

pytest.importorskip('mmpretrain', reason='the configs inherit those of mmpretrain')
pytest.importorskip('mmdet', reason='the configs inherit those of mmdet')

import mmdet
import mmpretrain
from mmpretrain.registry import MODELS

from mmbrecq.building import build, parse_options
from mmbrecq.data.images import CalibrationOptions
from mmbrecq.presets import PRESETS
from mmbrecq.registry import EXPORTERS, QUANTIZERS, RECONSTRUCTORS
from mmbrecq.runs.checkpoint import load_float_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / 'configs' / 'brecq').glob('*/*.py'))
METAFILES = sorted((ROOT / 'configs' / 'brecq').glob('*/metafile.yml'))
ZOO_MODELS = ('resnet18', 'mobilenetv2')
ZOO_DETECTORS = {'retinanet-r18': 'retinanet_r18', 'faster-rcnn-r18': 'faster_rcnn_r18', 'yolox': 'yolox'}
COCO_DETECTORS = (
    'retinanet-r18', 'retinanet-r50', 'faster-rcnn-r50', 'yolox-tiny', 'yolox-s', 'ssdlite-mobilenetv2', 'fcos-r50',
    'mask-rcnn-r50',
)  # fmt: skip
NAME = re.compile(r'brecq_w(\d+)a(\d+)(?:-([a-z]+))?_([a-z0-9.-]+)_(in1k|cifar10|coco|bccd)')
DATA = Path(os.environ.get('MMBRECQ_DATA', ROOT / '..' / 'shared' / 'data')).resolve()


def stem(path: Path) -> str:
    return path.stem


@pytest.fixture(scope='module')
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Config]:
    """All configs, loaded once."""
    folder = tmp_path_factory.mktemp('data')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MMBRECQ_DATA', str(folder))
        # for every `mmpretrain::` config mmengine reads all of mmpretrain's metafiles and all installed packages anew
        for module, name in ((utils, 'load'), (config, 'is_installed'), (config, 'get_installed_path')):
            patch.setattr(module, name, lru_cache(maxsize=None)(getattr(module, name)))
        return {path: Config.fromfile(path) for path in CONFIGS}


@pytest.fixture(scope='module')
def published() -> dict[str, str]:
    """Checkpoint URL of every config of mmpretrain and mmdet, by the config's path, from their own metafiles."""
    folders = [Path(str(package.__file__)).parent / '.mim' / 'configs' for package in (mmpretrain, mmdet)]
    files = [file for folder in folders for file in folder.glob('*/metafile.yml')]
    read = [yaml.safe_load(file.read_text()) for file in files]
    models = [model for part in read for model in (part if isinstance(part, list) else part.get('Models', ()))]
    return {m['Config'].removeprefix('configs/'): m['Weights'] for m in models if 'Config' in m and m.get('Weights')}


def facts(path: Path) -> tuple[int, int | None, str, str, str]:
    """Weight bits, activation bits, preset, model and data, as the file name tells them."""
    match = NAME.fullmatch(path.stem)
    assert match, f'{path.name} does not tell method, bits, model and data'
    weight, activation, preset, model, data = match.groups()
    return int(weight), None if activation == '32' else int(activation), preset or 'academic', model, data


def test_all_recipes_are_there() -> None:
    deploy = [f'w8a8-{preset}' for preset in ('onnxruntime', 'openvino', 'tensorrt')]
    vgg = [f'vgg{depth}{norm}' for depth in (11, 13, 16, 19) for norm in ('', 'bn')]
    models = ['resnet18', 'resnet50', 'mobilenetv2', 'regnetx-3.2gf', *vgg]
    expected = {f'brecq_{bits}_{model}_in1k' for model in models for bits in ('w2a4', 'w4a4', *deploy)}
    small = ('w2a32', 'w2a4', 'w4a4', 'w4a8-openvino', 'w4a8-onnxruntime', *deploy)
    expected |= {f'brecq_{bits}_{model}_cifar10' for model in ZOO_MODELS for bits in small}
    detection = ('w8a8-openvino', 'w8a8-tensorrt', 'w4a8', 'w4a4', 'w2a8')
    expected |= {f'brecq_{bits}_{model}_coco' for model in COCO_DETECTORS for bits in detection}
    expected |= {f'brecq_{bits}_{model}_bccd' for model in ZOO_DETECTORS for bits in detection}
    assert {path.stem for path in CONFIGS} == expected


@pytest.mark.parametrize('path', CONFIGS, ids=stem)
def test_config_does_what_its_name_says(path: Path, configs: dict[Path, Config]) -> None:
    cfg = configs[path]
    weight_bits, activation_bits, preset, model, data = facts(path)

    quantizer = build(QUANTIZERS, cfg.quantizer)
    reconstructor = build(RECONSTRUCTORS, cfg.reconstructor)

    assert (quantizer.weight_bits, quantizer.activation_bits) == (weight_bits, activation_bits)
    assert quantizer.preset is PRESETS[preset]
    assert quantizer.first_last_8bit and quantizer.granularity == 'block'
    # QDrop and a pass over the network where that was measured to be better
    yolox = (model, data) == ('yolox', 'bccd') and preset != 'tensorrt'
    joint = (path.stem.startswith('brecq_w4a4') and data in ('cifar10', 'bccd')) or yolox
    names = ['joint', 'network'] if joint else ['weights', 'activations']
    if joint and model == 'resnet18':
        # equalised channels here, behind which the pass over the network brought nothing
        names = ['joint']
    assert quantizer.equalization == (0.75 if names == ['joint'] else 0)
    assert [stage.name for stage in reconstructor.stages] == names
    num_samples = 256 if data in ('coco', 'bccd') else 1024
    assert parse_options(CalibrationOptions, cfg.calibration, 'calibration').num_samples == num_samples
    suffixes = {build(EXPORTERS, exporter).suffix for exporter in cfg.exporters}
    assert suffixes == {'academic': {'.onnx', '.xml'}, 'openvino': {'.xml'}}.get(preset, {'.onnx'})


@pytest.mark.parametrize('path', [p for p in CONFIGS if facts(p)[4] == 'in1k'], ids=stem)
def test_imagenet_configs_have_the_paper_settings_and_the_published_checkpoint(
    path: Path, configs: dict[Path, Config], published: dict[str, str]
) -> None:
    cfg = configs[path]
    base = re.search(r"'mmpretrain::([^']+)'", path.read_text())
    assert base is not None
    assert cfg.float_checkpoint == published[base[1]]
    weights, activations = (stage.options for stage in build(RECONSTRUCTORS, cfg.reconstructor).stages)
    eight = facts(path)[0] == 8
    assert (weights.iterations, activations.iterations) == ((5000, 1000) if eight else (20000, 5000))
    assert (weights.batch_size, activations.activation_lr) == (32, None)
    assert weights.rounding_lr == (2e-3 if eight else 1e-3)
    assert weights.round_weight == (0.1 if facts(path)[3] == 'mobilenetv2' else 0.01)


@pytest.mark.parametrize('path', [p for p in CONFIGS if facts(p)[4] == 'cifar10'], ids=stem)
def test_cifar10_configs_read_the_data_folder(path: Path, configs: dict[Path, Config]) -> None:
    cfg = configs[path]
    root = Path(cfg.data_root)
    assert root.name == 'cifar10'
    assert Path(cfg.float_checkpoint) == root.parent / '..' / 'zoo' / f'{facts(path)[3]}_cifar10.pth'
    for loader, folder in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        dataset = cfg[f'{loader}_dataloader'].dataset
        assert (Path(dataset.data_root), dataset.data_prefix) == (root, folder)
    weight_bits, _, _, model, _ = facts(path)
    weights, *others = (stage.options for stage in build(RECONSTRUCTORS, cfg.reconstructor).stages)
    short = weight_bits == 8 or (weight_bits == 4 and model == 'mobilenetv2')
    assert weights.iterations == (1000 if short else 2000)
    assert all(activations.iterations == weights.iterations / 4 for activations in others)
    # few steps, so longer ones than the paper's 20,000 have
    assert weights.lr == 3e-3
    assert weights.round_weight == (0.1 if model == 'mobilenetv2' else 0.01)
    assert cfg.calibration.selection == 'first'


@pytest.mark.parametrize('path', [p for p in CONFIGS if facts(p)[4] == 'coco'], ids=stem)
def test_coco_configs_have_the_published_checkpoint_and_small_steps(
    path: Path, configs: dict[Path, Config], published: dict[str, str]
) -> None:
    cfg = configs[path]
    base = re.search(r"'mmdet::([^']+)'", path.read_text())
    assert base is not None
    assert cfg.float_checkpoint == published[base[1]]
    weights, activations = (stage.options for stage in build(RECONSTRUCTORS, cfg.reconstructor).stages)
    assert weights.batch_size == activations.batch_size == 4
    assert weights.round_weight == (0.1 if 'mobilenetv2' in path.stem else 0.01)


@pytest.mark.parametrize('path', [p for p in CONFIGS if facts(p)[4] == 'bccd'], ids=stem)
def test_bccd_configs_read_the_data_folder_and_take_500_steps(path: Path, configs: dict[Path, Config]) -> None:
    cfg = configs[path]
    root = Path(cfg.data_root)
    assert root.name == 'bccd'
    assert Path(cfg.float_checkpoint) == root.parent / '..' / 'zoo' / f'{ZOO_DETECTORS[facts(path)[3]]}_bccd.pth'
    for loader, file in (('train', 'train.json'), ('val', 'val.json'), ('test', 'val.json')):
        dataset = cfg[f'{loader}_dataloader'].dataset
        assert (Path(dataset.data_root), dataset.ann_file) == (root, file)
    learns_steps = cfg.quantizer.activation.get('fake_quant', {'type': 'LSQ'})['type'] == 'LSQ'
    taken = 0
    for stage in build(RECONSTRUCTORS, cfg.reconstructor).stages:
        options = stage.options
        # a pass with nothing to learn takes no step
        if stage.learns_rounding or learns_steps or options.bias_lr or options.weight_scale_lr:
            taken += options.iterations
    assert taken == 500


@pytest.mark.parametrize(('model', 'name'), ZOO_DETECTORS.items())
def test_bccd_models_are_those_of_their_checkpoints(model: str, name: str, configs: dict[Path, Config]) -> None:
    zoo = DATA.parent / 'zoo' / f'{name}_bccd.pth'
    if not zoo.is_file():
        pytest.skip(f'{zoo} is missing: set MMBRECQ_DATA')
    cfg, trained = configs[find(f'w4a8_{model}_bccd')], Config.fromfile(zoo.with_suffix('.py'))
    assert without_root(cfg.model) == without_root(trained.model)
    for loader in ('train_dataloader', 'test_dataloader'):
        ours, theirs = (without_root(c[loader].dataset) for c in (cfg, trained))
        assert ours == theirs


@pytest.mark.parametrize('name', ['w2a4_resnet18_in1k', 'w2a4_mobilenetv2_in1k', 'w2a4_regnetx-3.2gf_in1k'])
def test_imagenet_models_build(name: str, configs: dict[Path, Config]) -> None:
    model = build_model(configs[find(name)])
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 32, 32), mode='tensor').shape == (1, 1000)


@pytest.mark.parametrize('model', ZOO_MODELS)
def test_cifar10_models_are_those_of_their_checkpoints(model: str, configs: dict[Path, Config]) -> None:
    zoo = DATA.parent / 'zoo' / f'{model}_cifar10.pth'
    if not zoo.is_file():
        pytest.skip(f'{zoo} is missing: set MMBRECQ_DATA')
    cfg = configs[find(f'w2a4_{model}_cifar10')]
    load_float_checkpoint(build_model(cfg), zoo)

    trained = Config.fromfile(zoo.with_suffix('.py'))
    own = {key: value for key, value in cfg.items() if key in trained and key not in ('data_root', 'load_from')}
    assert set(own) == set(trained) - {'data_root', 'load_from'}
    for key, value in own.items():
        assert without_root(value) == without_root(trained[key]), key


def test_model_index_lists_all_metafiles() -> None:
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    assert [ROOT / path for path in index['Import']] == METAFILES


@pytest.mark.parametrize('path', METAFILES, ids=lambda path: path.parent.name)
def test_metafile_and_readme_list_the_configs(path: Path, configs: dict[Path, Config]) -> None:
    metafile = yaml.safe_load(path.read_text())
    listed = {ROOT / model['Config']: model for model in metafile['Models']}
    assert sorted(listed) == [file for file in CONFIGS if file.parent == path.parent]
    readme = (path.parent / 'README.md').read_text()
    names = {collection['Name'] for collection in metafile['Collections']}
    for file, model in listed.items():
        weight_bits, activation_bits, preset, _, _ = facts(file)
        metadata = model['Metadata']
        assert model['Name'] == file.stem and model['In Collection'] in names
        assert metadata['Weight Bits'] == weight_bits
        assert metadata['Activation Bits'] == (activation_bits or 32)
        assert metadata['Preset'] == preset
        checkpoint = configs[file].float_checkpoint
        assert metadata['Float Model']['Weights'] in (checkpoint, Path(checkpoint).name)
        row = next(line for line in readme.splitlines() if f'({file.name})' in line)
        bits = f'{weight_bits} / {activation_bits or "float"}'
        assert row.split(' | ')[2:4] == [bits, preset]
        assert metadata['Float Model']['Weights'] in row


def find(name: str) -> Path:
    return next(path for path in CONFIGS if path.stem == f'brecq_{name}')


def build_model(cfg: Config) -> torch.nn.Module:
    init_default_scope('mmpretrain')
    # building fills in defaults in place
    model: torch.nn.Module = MODELS.build(copy.deepcopy({**cfg.model, 'data_preprocessor': cfg.data_preprocessor}))
    return model


def without_root(value: object) -> object:
    """``value`` without the roots of datasets, which are the reader's."""
    if isinstance(value, dict):
        return {key: without_root(item) for key, item in value.items() if key != 'data_root'}
    return value
