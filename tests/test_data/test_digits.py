from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS
from mmpretrain.utils import register_all_modules
from sklearn.datasets import load_digits

from mmbrecq.data.digits import DigitsDataset
from mmbrecq.errors import ConfigError
from mmbrecq.registry import DATASETS

DEMO = Path(__file__).parents[2] / 'configs' / 'demo'


@pytest.fixture(scope='module')
def cfg():
    return Config.fromfile(DEMO / 'resnet_digits.py')


@pytest.fixture(autouse=True)
def mmpretrain_scope():
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


def numbers(dataset):
    return [int(dataset.get_data_info(i)['img_path'].removeprefix('digits/')) for i in range(len(dataset))]


def test_splits_are_a_partition_and_stay_the_same():
    train, val = numbers(DigitsDataset(split='train')), numbers(DigitsDataset(split='val'))
    assert (len(train), len(val)) == (1297, 500)
    assert sorted(train + val) == list(range(1797))
    # Frozen: a checkpoint trained on one split must not meet its images in the other
    assert val[:4] == [1081, 1707, 927, 713]
    assert numbers(DigitsDataset(split='val')) == val


def test_infos_hold_scikit_learns_images_and_labels():
    pixels, labels = load_digits(return_X_y=True)
    dataset = DigitsDataset(split='val')
    for i in (0, 17, 499):
        info = dataset.get_data_info(i)
        number = int(info['img_path'].removeprefix('digits/'))
        assert info['gt_label'] == labels[number]
        assert info['img'].shape == (8, 8, 3) and info['img'].dtype == np.uint8
        for channel in range(3):
            expected = pixels[number].reshape(8, 8) * 255 / 16
            np.testing.assert_allclose(info['img'][..., channel], expected, atol=0.5)
    assert max(dataset.get_data_info(i)['img'].max() for i in range(500)) == 255


def test_built_by_the_registry_and_by_scope(cfg):
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    assert type(dataset) is DigitsDataset
    assert dataset.metainfo['classes'] == tuple('0123456789')
    sample = dataset[3]
    assert sample['inputs'].shape == (3, 32, 32) and sample['inputs'].dtype == torch.uint8
    assert sample['data_samples'].img_path == dataset.get_data_info(3)['img_path']
    assert sample['data_samples'].gt_label.tolist() == [dataset.get_data_info(3)['gt_label']]


def test_indices_take_the_first_of_the_split():
    assert numbers(DigitsDataset(split='val', indices=5)) == numbers(DigitsDataset(split='val'))[:5]


def test_unknown_split_is_refused():
    message = "expected split of DigitsDataset to be one of 'train', 'val', but got 'test'"
    with pytest.raises(ConfigError, match=re.escape(message)):
        DigitsDataset(split='test')


def test_shipped_checkpoint_reaches_its_accuracy(cfg):
    path = DEMO / 'resnet_digits.pth'
    assert path.stat().st_size < 1_000_000
    checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    assert {value.dtype for value in checkpoint['state_dict'].values()} == {torch.float32, torch.int64}
    model = MODELS.build(cfg.model).eval()
    model.load_state_dict(checkpoint['state_dict'], strict=True)
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    batch = pseudo_collate([dataset[i] for i in range(len(dataset))])
    with torch.no_grad():
        predictions = model.test_step(batch)
    correct = sum(int(sample.pred_label.item() == sample.gt_label.item()) for sample in predictions)
    accuracy = 100 * correct / len(dataset)
    assert accuracy >= 98
    assert accuracy == pytest.approx(checkpoint['meta']['metrics']['accuracy/top1'], abs=0.21)
