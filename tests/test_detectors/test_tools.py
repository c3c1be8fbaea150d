"""The two commands on the detectors of the demo, with few scenes and few iterations; every run in its own process."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs' / 'demo'
SHORT = (
    'calibration.num_samples=16', 'calibration.batch_size=8',
    'reconstructor.weights.iterations=4', 'reconstructor.activations.iterations=2',
)  # fmt: skip
QUICK = (*SHORT, 'evaluations=[]', 'exporters=[]')
SCENES = Path('work_dirs', 'digit_scenes')
"""Where the demo's configs look for the scenes, from the working directory."""


@dataclass(frozen=True)
class Outcome:
    """How a tool ended and what it said."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a tool that refused its input."""
        assert self.status == 2, (self.status, self.err)
        (line,) = self.err.splitlines()
        return line.removeprefix('error: ')


def run(name: str, folder: Path, *args: object) -> Outcome:
    """Runs ``tools/NAME.py`` in ``folder``, with one thread."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CI': 'true', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, str(ROOT / 'tools' / f'{name}.py'), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the scenes in it."""
    root: Path = tmp_path_factory.mktemp('detectors')
    done = run('make_digit_scenes', root, '--train', 24, '--val', 8)
    assert done.status == 0, done.err
    return root


@pytest.fixture(scope='module')
def finished(folder: Path) -> Callable[[str], Path]:
    """``finished(name)``: the work dir of a whole run of ``configs/demo/<name>.py``."""
    done: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in done:
            done[name] = folder / name
            outcome = run('ptq', folder, CONFIGS / f'{name}.py', '--work-dir', done[name], '--cfg-options', *SHORT)
            assert outcome.status == 0, outcome.err
        return done[name]

    return make


def summary_of(work_dir: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((work_dir / 'summary.json').read_text())
    return summary


NAMES = ['retinanet_scenes_w4a8', 'faster_rcnn_scenes_w2a8']


@pytest.mark.parametrize('name', NAMES)
def test_from_the_float_checkpoint_to_deployed_accuracy(finished: Callable[[str], Path], name: str) -> None:
    work_dir = finished(name)
    summary = summary_of(work_dir)
    metrics = {stage: values['coco/bbox_mAP'] for stage, values in summary['metrics'].items() if stage != 'deployed'}
    assert metrics['float'] > 0.5
    assert all(unit['loss_after'] <= unit['loss_before'] for unit in summary['units'])
    assert summary['float_layers'] == []
    for deployed in summary['metrics']['deployed'].values():
        assert abs(deployed['coco/bbox_mAP'] - metrics['quantized']) < 0.01
    assert len(summary['metrics']['deployed']) == 2
    assert all(result == 'passed' for result in summary['verify'].values())
    assert len(list((work_dir / 'deploy').glob('*.onnx'))) == (2 if 'faster' in name else 1)
    assert (work_dir / 'report.html').read_text().count('data:image/png;base64') == 4


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(('file', 'stage'), [('quantized.pth', None), ('deploy/model.xml', 'OpenVINO')])
def test_what_is_left_measures_the_same_again(
    finished: Callable[[str], Path], folder: Path, tmp_path: Path, name: str, file: str, stage: str | None
) -> None:
    work_dir, pictures = finished(name), tmp_path / 'pictures'
    outcome = run(
        'test', folder, CONFIGS / f'{name}.py', work_dir / file, '--work-dir', tmp_path, '--show-dir', pictures
    )
    assert outcome.status == 0, outcome.err
    metrics = summary_of(work_dir)['metrics']
    expected = metrics['quantized'] if stage is None else metrics['deployed'][stage]
    assert f'coco/bbox_mAP: {expected["coco/bbox_mAP"]!r}' in outcome.out
    drawn = [cv2.imread(str(path)) for path in pictures.iterdir()]
    assert len(drawn) == 8
    assert all(picture.shape[1] == 2 * 96 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50 for picture in drawn)


@pytest.fixture
def scenes(folder: Path, tmp_path: Path) -> Path:
    """A copy of the scenes in a working directory of its own, to be spoiled."""
    copy: Path = tmp_path / 'own'
    shutil.copytree(folder / SCENES, copy / SCENES)
    return copy


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Changes an annotation file."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def quantize(scenes: Path, *options: str, name: str = 'retinanet_scenes_w4a8') -> Outcome:
    return run('ptq', scenes, CONFIGS / f'{name}.py', '--work-dir', 'results', '--cfg-options', *QUICK, *options)


def test_annotations_of_other_images(scenes: Path) -> None:
    def rename(content: dict[str, Any]) -> None:
        for info in content['images']:
            info['file_name'] = 'other_' + info['file_name']

    change(scenes / SCENES / 'train.json', rename)
    assert re.fullmatch(r'\S+/images/other_train_\d{4}\.png does not exist', quantize(scenes).error)


def test_annotations_of_other_classes(scenes: Path) -> None:
    def rename(content: dict[str, Any]) -> None:
        for category in content['categories'][:4]:
            category['name'] = 'letter'

    change(scenes / SCENES / 'val.json', rename)
    assert quantize(scenes).error == (
        'expected the 10 classes of CocoDataset among the categories of work_dirs/digit_scenes/val.json, '
        "but 6 of them are there; they start with '0'"
    )


def test_another_number_of_classes_than_the_checkpoint(scenes: Path) -> None:
    error = quantize(scenes, 'model.bbox_head.num_classes=3').error
    assert error == "expected 'bbox_head' to have the 10 classes of CocoDataset, but num_classes is 3"
    classes = 'metainfo.classes=[0,1,2]'
    loaders = [f'{loader}_dataloader.dataset.{classes}' for loader in ('train', 'val', 'test')]
    options = [option.replace('[0,1,2]', '["0","1","2"]') for option in loaders]
    error = quantize(scenes, 'model.bbox_head.num_classes=3', *options).error
    assert 'retinanet_scenes.pth' in error
    assert 'bbox_head.retina_cls' in error


def test_annotations_of_the_evaluator_are_those_of_other_images(scenes: Path) -> None:
    def renumber(content: dict[str, Any]) -> None:
        for info in content['images']:
            info['id'] += 1000
        for annotation in content['annotations']:
            annotation['image_id'] += 1000

    other = scenes / SCENES / 'other.json'
    shutil.copy(scenes / SCENES / 'val.json', other)
    change(other, renumber)
    error = quantize(scenes, f'test_evaluator.ann_file={other}', 'evaluations=[float]').error
    assert error == 'expected the annotation file of the evaluator to be that of the test data, but it has other images'


@pytest.mark.parametrize('name', NAMES)
def test_images_without_objects_and_a_fisher_loss(scenes: Path, name: str) -> None:
    """Half of the calibration images have no object; the task loss is that of the others."""

    def clear(content: dict[str, Any]) -> None:
        content['annotations'] = [a for a in content['annotations'] if a['image_id'] % 2]

    change(scenes / SCENES / 'train.json', clear)
    options = ('train_dataloader.dataset.filter_cfg.filter_empty_gt=False', 'calibration.num_samples=24')
    outcome = quantize(scenes, 'reconstructor.loss.type=FisherLoss', *options, name=name)
    assert outcome.status == 0, outcome.err
    summary = summary_of(scenes / 'results')
    assert summary['loss'].startswith('FisherLoss, by the task loss on annotated images')
    change(scenes / SCENES / 'train.json', lambda content: content['annotations'].clear())
    outcome = quantize(scenes, 'reconstructor.loss.type=FisherLoss', *options, name=name)
    assert outcome.status == 0, outcome.err
    summary = summary_of(scenes / 'results')
    assert summary['loss'].startswith('FisherLoss, by the distance of quantized from float outputs')
    assert all(0 <= unit['loss_after'] <= unit['loss_before'] for unit in summary['units'])
    assert {unit['name'] for unit in summary['units']} >= {'backbone.conv1', 'neck.fpn_convs.0.conv'}


@pytest.mark.parametrize('name', NAMES)
def test_images_smaller_than_the_stride(scenes: Path, name: str) -> None:
    """They are padded to the preprocessor's divisor, and without one the maps shrink to a pixel."""
    for path in (scenes / SCENES / 'images').iterdir():
        assert cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (12, 12)))
    tiny = [f'{loader}_dataloader.dataset.pipeline.1.scale=(12,12)' for loader in ('train', 'val', 'test')]
    options = ('model.data_preprocessor.pad_size_divisor=1', 'evaluations=[quantized]')
    outcome = quantize(scenes, *tiny, *options, name=name)
    assert outcome.status == 0 or len(outcome.err.splitlines()) == 1, outcome.err
