from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import TRANSFORMS

from mmbrecq.data import CalibrationSet, build_calibration_set
from mmbrecq.errors import ConfigError, DataError

pytest.importorskip('mmpretrain')

DATA = Path(os.environ.get('MMBRECQ_DATA', Path(__file__).parents[3] / 'shared' / 'data'))
SIZE = 4


@TRANSFORMS.register_module()
class SpoilForTest:
    """Makes the input nothing, or an exception."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, results: dict[str, Any]) -> Any:
        if self.how == 'raise':
            raise KeyError('gt_bboxes')
        return None


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """Ten training images in two classes, whose grey value is ten times their number, and two for the test."""
    for number in range(10):
        write_image(tmp_path / 'train' / 'ab'[number % 2] / f'{number + 5}_x.png', number * 10)
    for number in range(2):
        write_image(tmp_path / 'val' / 'ab'[number % 2] / f'{number}.png', 200)
    test_pipeline = [{'type': 'LoadImageFromFile'}, {'type': 'PackInputs'}]
    train_pipeline = [{'type': 'LoadImageFromFile'}, {'type': 'RandomCrop', 'crop_size': 2}, {'type': 'PackInputs'}]
    common = {'type': 'CustomDataset', 'data_root': str(tmp_path)}
    return Config(
        {
            'default_scope': 'mmpretrain',
            'train_dataloader': {'dataset': {**common, 'data_prefix': 'train', 'pipeline': train_pipeline}},
            'test_dataloader': {'dataset': {**common, 'data_prefix': 'val', 'pipeline': test_pipeline}},
        }
    )


def write_image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((SIZE, SIZE, 3), value, np.uint8))


def values(images: CalibrationSet) -> list[int]:
    return [int(image[0, 0, 0]) // 10 for batch in images.batches() for image in batch['inputs']]


def train_set(cfg: Config) -> dict[str, Any]:
    dataset: dict[str, Any] = cfg.train_dataloader.dataset
    return dataset


def test_every_image_once_in_a_fixed_order(cfg: Config) -> None:
    state = torch.get_rng_state()
    images = build_calibration_set(cfg, {'num_samples': 10, 'batch_size': 4})
    batches = list(images.batches())
    assert [len(batch['inputs']) for batch in batches] == [4, 4, 2]
    assert {tuple(image.shape) for batch in batches for image in batch['inputs']} == {(3, SIZE, SIZE)}
    assert sorted(values(images)) == list(range(10)) and values(images) == values(images)
    assert values(images) != sorted(values(images))
    assert images.ids == [f'train/{"ab"[value % 2]}/{value + 5}_x.png' for value in values(images)]
    labels = [int(sample.gt_label) for batch in batches for sample in batch['data_samples']]
    assert labels == [value % 2 for value in values(images)]
    assert len(images) == 10 and torch.equal(state, torch.get_rng_state())


def test_the_draw_is_seeded(cfg: Config) -> None:
    draws = [build_calibration_set(cfg, {'num_samples': 6, 'seed': seed}).ids for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 6


def test_the_first_by_number_across_classes(cfg: Config) -> None:
    images = build_calibration_set(cfg, {'num_samples': 7, 'selection': 'first'})
    # Names are 5_x to 14_x: as text, 10_x would come before 5_x
    assert values(images) == list(range(7))


def test_workers_read_the_same(cfg: Config) -> None:
    options = {'num_samples': 5, 'batch_size': 2}
    assert values(build_calibration_set(cfg, {**options, 'num_workers': 1})) == values(
        build_calibration_set(cfg, options)
    )


def test_what_the_data_preprocessor_takes(cfg: Config) -> None:
    from mmpretrain.models import ClsDataPreprocessor

    batch = next(build_calibration_set(cfg, {'num_samples': 3}).batches())
    prepared = ClsDataPreprocessor(mean=[0, 0, 0], std=[10, 10, 10], to_rgb=True)(batch, False)
    assert prepared['inputs'].shape == (3, 3, SIZE, SIZE)
    np.testing.assert_allclose(prepared['inputs'][:, 0, 0, 0], values(build_calibration_set(cfg, {'num_samples': 3})))


@pytest.mark.parametrize(
    'wrap',
    [
        lambda leaf: {'type': 'RepeatDataset', 'times': 3, 'dataset': leaf},
        lambda leaf: {'type': 'ClassBalancedDataset', 'oversample_thr': 0.9, 'dataset': leaf},
        lambda leaf: {'type': 'ConcatDataset', 'datasets': [leaf]},
    ],
)
def test_wrappers_are_taken_off(cfg: Config, wrap: Any) -> None:
    plain = build_calibration_set(cfg, {'num_samples': 10}).ids
    cfg.train_dataloader.dataset = wrap(train_set(cfg))
    cfg.test_dataloader.dataset = {'type': 'RepeatDataset', 'times': 2, 'dataset': cfg.test_dataloader.dataset}
    assert build_calibration_set(cfg, {'num_samples': 10}).ids == plain
    with pytest.raises(DataError, match='^expected at least 11 images for calibration, but got 10 in '):
        build_calibration_set(cfg, {'num_samples': 11})


def test_several_datasets_are_one_list(cfg: Config, tmp_path: Path) -> None:
    write_image(tmp_path / 'more' / 'a' / '6_x.png', 100)
    both = [train_set(cfg), {**train_set(cfg), 'data_prefix': 'more'}]
    cfg.train_dataloader.dataset = {'type': 'ConcatDataset', 'datasets': both}
    images = build_calibration_set(cfg, {'num_samples': 3, 'selection': 'first'})
    assert images.ids == ['0:train/a/5_x.png', '0:train/b/6_x.png', '1:more/a/6_x.png']
    assert values(images) == [0, 1, 10]


def test_dataset_and_pipeline_of_the_options(cfg: Config, tmp_path: Path) -> None:
    write_image(tmp_path / 'own' / 'a.png', 70)
    dataset = {'type': 'CustomDataset', 'data_root': str(tmp_path / 'own'), 'with_label': False}
    pipeline = [{'type': 'LoadImageFromFile'}, {'type': 'Resize', 'scale': 9}, {'type': 'PackInputs'}]
    cfg.pop('train_dataloader')
    images = build_calibration_set(cfg, {'num_samples': 1, 'dataset': dataset, 'pipeline': pipeline})
    assert next(images.batches())['inputs'][0].shape == (3, 9, 9) and images.ids == ['a.png']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            {'samples': 3},
            r"^unknown option 'samples' of calibration: expected num_samples or seed or batch_size or num_w",
        ),
        ({'num_samples': 0}, r'^expected calibration\.num_samples to be an integer >= 1, but got 0$'),
        ({'batch_size': 2.0}, r'^expected calibration\.batch_size to be an integer >= 1, but got 2\.0$'),
        ({'seed': None}, r'^expected calibration\.seed to be an integer >= 0, but got None$'),
        ({'selection': 'last'}, r"^expected calibration\.selection 'random' or 'first', but got 'last'$"),
    ],
)
def test_options_out_of_range(cfg: Config, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_calibration_set(cfg, options)


def test_fewer_images_than_asked_for(cfg: Config, tmp_path: Path) -> None:
    expected = rf'^expected at least 1024 images for calibration, but got 10 in {tmp_path}/train$'
    with pytest.raises(DataError, match=expected):
        build_calibration_set(cfg, {})


def test_held_out_images_are_others_of_the_same_draw(cfg: Config, tmp_path: Path) -> None:
    options = {'num_samples': 6, 'batch_size': 4}
    used, held_out = build_calibration_set(cfg, options), build_calibration_set(cfg, options, held_out=3)
    assert used.ids + held_out.ids == build_calibration_set(cfg, {'num_samples': 9}).ids
    expected = '6 images for calibration and 5 others, see search.held_out, to measure a drop, but got 10 in '
    with pytest.raises(DataError, match=f'^expected at least {expected}{tmp_path}/train$'):
        build_calibration_set(cfg, options, held_out=5)


def test_annotations_of_held_out_images_alone(cfg: Config, tmp_path: Path) -> None:
    images = build_calibration_set(cfg, {'num_samples': 6}, held_out=3)
    with pytest.raises(
        ConfigError, match=r"^expected held-out images of one dataset with annotations in COCO's format"
    ):
        images.write_annotations(tmp_path / 'some.json')
    dataset = images.dataset
    dataset.get_data_info = lambda index: {'img_id': 100 + index}
    content = {
        'images': [{'id': 100 + index} for index in range(10)],
        'annotations': [{'id': index, 'image_id': 100 + index % 10} for index in range(20)],
        'categories': [{'id': 1, 'name': 'a'}],
    }
    dataset.ann_file = str(tmp_path / 'all.json')
    (tmp_path / 'all.json').write_text(json.dumps(content))
    images.write_annotations(tmp_path / 'some.json')
    found = json.loads((tmp_path / 'some.json').read_text())
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()[6:9]
    assert [image['id'] for image in found['images']] == sorted(100 + index for index in order)
    assert [entry['id'] for entry in found['annotations']] == sorted([*order, *(10 + index for index in order)])
    assert found['categories'] == content['categories']


@pytest.mark.parametrize('loader', ['test_dataloader', 'val_dataloader'])
@pytest.mark.parametrize('prefix', ['val', 'val/', {'img_path': './val'}])
def test_never_the_test_set(cfg: Config, loader: str, prefix: Any) -> None:
    cfg[loader] = {'dataset': {**cfg.test_dataloader.dataset, 'test_mode': True}}
    train_set(cfg)['data_prefix'] = prefix
    if loader == 'val_dataloader':
        cfg.test_dataloader.dataset.data_prefix = 'other'
    with pytest.raises(
        DataError, match=rf'^expected calibration images from the training set, but got those of {loader}: '
    ):
        build_calibration_set(cfg, {'num_samples': 1})


def test_never_the_test_split(cfg: Config) -> None:
    digits = {'type': 'mmbrecq.DigitsDataset', 'pipeline': [{'type': 'PackInputs'}]}
    cfg.train_dataloader.dataset = {**digits, 'split': 'val'}
    cfg.test_dataloader.dataset = {**digits, 'split': 'val'}
    with pytest.raises(DataError, match=r'but got those of test_dataloader: mmbrecq\.DigitsDataset$'):
        build_calibration_set(cfg, {'num_samples': 1})
    cfg.train_dataloader.dataset.split = 'train'
    if not (Path(__file__).parents[2] / 'mmbrecq' / 'data' / 'digits.py').exists():
        pytest.skip('the digits are not part of this package')
    pytest.importorskip('sklearn')
    assert build_calibration_set(cfg, {'num_samples': 4}).ids[0].startswith('digits/')


def test_missing_and_empty_folders(cfg: Config, tmp_path: Path) -> None:
    train_set(cfg)['data_prefix'] = 'nowhere'
    expected = rf'^{tmp_path}/nowhere does not exist, but the images of CustomDataset are expected there$'
    with pytest.raises(DataError, match=expected):
        build_calibration_set(cfg, {'num_samples': 1})
    for folder in ('empty', 'half/a'):
        (tmp_path / folder).mkdir(parents=True)
    for prefix in ('empty', 'half'):
        train_set(cfg)['data_prefix'] = prefix
        with pytest.raises(DataError, match=rf'^CustomDataset cannot read {tmp_path}/{prefix}: .*Found 0 files in'):
            build_calibration_set(cfg, {'num_samples': 1})
    train_set(cfg)['ann_file'] = 'list.txt'
    with pytest.raises(DataError, match=rf'^{tmp_path}/list\.txt does not exist, but the images of'):
        build_calibration_set(cfg, {'num_samples': 1})
    (tmp_path / 'list.txt').touch()
    with pytest.raises(DataError, match=rf'^no images found in {tmp_path}/half, {tmp_path}/list\.txt$'):
        build_calibration_set(cfg, {'num_samples': 1})


@pytest.mark.parametrize('num_workers', [0, 1])
@pytest.mark.parametrize('content', [b'', b'no image', None])
def test_an_image_that_cannot_be_read(cfg: Config, tmp_path: Path, content: bytes | None, num_workers: int) -> None:
    images = build_calibration_set(cfg, {'num_samples': 10, 'num_workers': num_workers})
    broken = tmp_path / 'train' / 'b' / '8_x.png'
    if content is None:
        broken.unlink()
    else:
        broken.write_bytes(content)
    reason = {None: 'No such file or directory$', b'': 'error: '}.get(content, 'AssertionError: failed to load image')
    with pytest.raises(DataError, match=rf'^image train/b/8_x\.png cannot be read: {reason}'):
        list(images.batches())


@pytest.mark.parametrize(
    ('how', 'message'),
    [
        ('nothing', r'^image train/\S+ cannot be read: the pipeline returned nothing for it$'),
        ('raise', r"^image train/\S+ cannot be read: KeyError: 'gt_bboxes'$"),
    ],
)
def test_a_pipeline_that_spoils_its_images(cfg: Config, how: str, message: str) -> None:
    cfg.test_dataloader.dataset.pipeline.append({'type': 'mmengine.SpoilForTest', 'how': how})
    with pytest.raises(DataError, match=message):
        list(build_calibration_set(cfg, {'num_samples': 2}).batches())


def test_configs_that_cannot_be_built(cfg: Config) -> None:
    options = {'num_samples': 1}
    cfg.test_dataloader.dataset.pipeline = [{'type': 'LoadImagesFromTape'}]
    with pytest.raises(
        ConfigError,
        match=r"^the dataset of calibration images cannot be built: unknown transform type 'LoadImagesFromTape'",
    ):
        build_calibration_set(cfg, options)
    cfg.test_dataloader.dataset.pop('pipeline')
    with pytest.raises(DataError, match=r'^expected the pipeline of calibration images in test_dataloader\.dataset'):
        build_calibration_set(cfg, options)
    options['pipeline'] = []
    train_set(cfg)['colour'] = 'red'
    with pytest.raises(
        ConfigError,
        match=r"^the dataset of calibration images cannot be built: .* got an unexpected keyword argument 'colour'",
    ):
        build_calibration_set(cfg, options)
    train_set(cfg)['type'] = 'NoDataset'
    with pytest.raises(
        ConfigError,
        match=r"^the dataset of calibration images cannot be built: unknown dataset type 'NoDataset': expected one",
    ):
        build_calibration_set(cfg, options)
    cfg.train_dataloader.dataset = {'type': 'KFoldDataset', 'dataset': train_set(cfg)}
    with pytest.raises(ConfigError, match=r'^expected a training set in files of its own, but got KFoldDataset'):
        build_calibration_set(cfg, options)
    cfg.pop('train_dataloader')
    with pytest.raises(
        ConfigError, match=r'^expected train_dataloader\.dataset or calibration\.dataset, but the config'
    ):
        build_calibration_set(cfg, options)


def zoo_config(name: str, monkeypatch: pytest.MonkeyPatch) -> Config:
    path = DATA.parent / 'zoo' / f'{name}.py'
    if not path.is_file():
        pytest.skip(f'no {path}; set MMBRECQ_DATA to the data folder beside the zoo')
    monkeypatch.setenv('MMBRECQ_DATA', str(DATA))
    return Config.fromfile(path)


def test_the_first_of_the_real_classifier_data(monkeypatch: pytest.MonkeyPatch) -> None:
    images = build_calibration_set(
        zoo_config('resnet18_cifar10', monkeypatch), {'num_samples': 1024, 'selection': 'first'}
    )
    assert [int(Path(name).name[:4]) for name in images.ids] == list(range(1024))
    assert next(images.batches())['inputs'][0].shape == (3, 64, 64)


def test_real_detector_data_keeps_its_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('mmdet')
    pytest.importorskip('mmcv.ops', reason='mmdet needs mmcv with its ops')
    images = build_calibration_set(zoo_config('retinanet_r18_bccd', monkeypatch), {'num_samples': 8, 'batch_size': 3})
    batches = list(images.batches())
    assert [len(batch['inputs']) for batch in batches] == [3, 3, 2]
    assert all(len(sample.gt_instances) > 0 for batch in batches for sample in batch['data_samples'])
    assert all(name.startswith('images/') for name in images.ids)
