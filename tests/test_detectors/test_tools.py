"""The two commands on the detectors of the demo, with few scenes and few iterations; every run in its own process."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from demo_runs import CONFIGS, QUICK, SHORT, summary_of

from mmbrecq.data.groups import Grouped
from mmbrecq.data.images import collect_images
from mmbrecq.engine import ptq_loop
from mmbrecq.engine.drawing import SHOWN
from mmbrecq.reconstruction.batches import Batches

# what so few iterations leave of 2-bit weights is so bad that single values decide its AP
OPTIONS = {'retinanet_scenes_w4a8': SHORT, 'faster_rcnn_scenes_w2a8': (*SHORT, 'quantizer.weight.bits=4')}
SCENES = Path('work_dirs', 'digit_scenes')
"""Where the demo's configs look for the scenes, from the working directory."""


@pytest.fixture(scope='module')
def finished(run: Callable[..., Any], folder: Path) -> Callable[[str], Path]:
    """``finished(name)``: the work dir of a whole run of ``configs/demo/<name>.py``."""
    done: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in done:
            done[name] = folder / name
            run('ptq', folder, CONFIGS / f'{name}.py', '--work-dir', done[name], '--cfg-options', *OPTIONS[name])
        return done[name]

    return make


FILES = {
    'retinanet_scenes_w4a8': {'model.xml'},
    'faster_rcnn_scenes_w2a8': {
        f'model{part}.{kind}' for part in ('', '.roi_head.bbox_head') for kind in ('onnx', 'xml')
    },
}
NAMES = list(FILES)


@pytest.mark.parametrize('name', NAMES)
def test_from_the_float_checkpoint_to_deployed_accuracy(finished: Callable[[str], Path], name: str) -> None:
    work_dir = finished(name)
    summary = summary_of(work_dir)
    stages = summary['metrics']
    metrics = {stage: stages[stage]['coco/bbox_mAP'] for stage in ('float', 'nearest', 'quantized')}
    assert metrics['float'] > 0.5
    assert all(unit['loss_after'] <= unit['loss_before'] for unit in summary['units'])
    assert summary['float_layers'] == []
    for deployed in summary['metrics']['deployed'].values():
        assert abs(deployed['coco/bbox_mAP'] - metrics['quantized']) < 0.015
    assert all(result == 'passed' for result in summary['verify'].values())
    assert {path.name for path in (work_dir / 'deploy').glob('*.[ox]*')} == FILES[name]
    if 'w4a8' in name:
        # made for OpenVINO, so that it computes all of it in integers
        assert summary['integer_kernels'] == {'OpenVINO': {'quantized': 31, 'integer': 31, 'float_layers': {}}}
    else:
        assert set(summary['metrics']['deployed']) == {'ONNX Runtime', 'OpenVINO'}
    assert (work_dir / 'report.html').read_text().count('data:image/png;base64') == 4


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(('file', 'stage'), [('quantized.pth', None), ('deploy/model.xml', 'OpenVINO')])
def test_what_is_left_measures_the_same_again(
    finished: Callable[[str], Path], folder: Path, call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    name: str, file: str, stage: str | None,
) -> None:  # fmt: skip
    work_dir, pictures = finished(name), tmp_path / 'pictures'
    monkeypatch.chdir(folder)
    outcome = call('test', CONFIGS / f'{name}.py', work_dir / file, '--show-dir', pictures, *OPTIONS[name])
    assert outcome.status == 0, outcome.err
    assert 'annotations into memory' not in outcome.out
    metrics = summary_of(work_dir)['metrics']
    (measured,) = map(float, re.findall(r'coco/bbox_mAP: ([\d.]+)', outcome.out))
    if stage is None:
        assert measured == metrics['quantized']['coco/bbox_mAP']
    else:
        # not to the last digit: a runtime owes no bitwise equality between a process with one thread and this one
        assert abs(measured - metrics['deployed'][stage]['coco/bbox_mAP']) < 0.02
    drawn = [cv2.imread(str(path)) for path in pictures.iterdir()]
    assert len(drawn) == SHOWN
    assert all(picture.shape[1] == 2 * 96 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50 for picture in drawn)


@pytest.fixture
def scenes(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the scenes, to be spoiled, below a working directory of its own."""
    copy: Path = tmp_path / 'own' / SCENES
    shutil.copytree(folder / SCENES, copy)
    monkeypatch.chdir(tmp_path / 'own')
    return copy


@pytest.fixture
def quantize(call: Any, scenes: Path) -> Callable[..., Any]:
    """``quantize(*options, name)``: a short run on the copy of the scenes, without exports."""

    def start(*options: str, name: str = 'retinanet_scenes_w4a8') -> Any:
        return call('ptq', CONFIGS / f'{name}.py', *QUICK, *options)

    return start


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Changes an annotation file."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_annotations_of_other_images(scenes: Path, quantize: Callable[..., Any]) -> None:
    def rename(content: dict[str, Any]) -> None:
        for info in content['images']:
            info['file_name'] = 'other_' + info['file_name']

    change(scenes / 'train.json', rename)
    missing = r'image images/other_train_\d{4}\.png cannot be read: No such file or directory'
    assert re.fullmatch(missing, quantize().error)


def test_annotations_of_other_classes(scenes: Path, quantize: Callable[..., Any]) -> None:
    def rename(content: dict[str, Any]) -> None:
        for category in content['categories'][:4]:
            category['name'] = 'letter'

    change(scenes / 'val.json', rename)
    assert quantize().error == (
        'expected the 10 classes of CocoDataset among the categories of work_dirs/digit_scenes/val.json, '
        "but 6 of them are there; they start with '0'"
    )


def test_another_number_of_classes_than_the_checkpoint(scenes: Path, quantize: Callable[..., Any]) -> None:
    error = quantize('model.bbox_head.num_classes=3').error
    assert error == "expected 'bbox_head' to have the 10 classes of CocoDataset, but num_classes is 3"


def test_a_checkpoint_of_other_classes(scenes: Path, quantize: Callable[..., Any]) -> None:
    def rename(content: dict[str, Any]) -> None:
        for category, name in zip(content['categories'], 'abc', strict=False):
            category['name'] = name

    for split in ('train', 'val'):
        change(scenes / f'{split}.json', rename)
    classes = [f'{loader}_dataloader.dataset.metainfo.classes=[a,b,c]' for loader in ('train', 'val', 'test')]
    error = quantize('model.bbox_head.num_classes=3', *classes).error
    assert 'retinanet_scenes.pth' in error
    assert 'bbox_head.retina_cls' in error


def test_annotations_of_the_evaluator_are_those_of_other_images(scenes: Path, quantize: Callable[..., Any]) -> None:
    def renumber(content: dict[str, Any]) -> None:
        for info in content['images']:
            info['id'] += 1000
        for annotation in content['annotations']:
            annotation['image_id'] += 1000

    other = scenes / 'other.json'
    shutil.copy(scenes / 'val.json', other)
    change(other, renumber)
    error = quantize(f'test_evaluator.ann_file={other}', 'evaluations=[float]').error
    assert error == 'expected the annotation file of the evaluator to be that of the test data, but it has other images'


@pytest.mark.parametrize('name', NAMES)
def test_images_without_objects_and_a_fisher_loss(
    scenes: Path, quantize: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    """Half of the calibration images have no object; the task loss is that of the others."""

    def clear(content: dict[str, Any]) -> None:
        content['annotations'] = [a for a in content['annotations'] if a['image_id'] % 2]

    change(scenes / 'train.json', clear)
    options = ('train_dataloader.dataset.filter_cfg.filter_empty_gt=False', 'calibration.num_samples=24')
    outcome = quantize('reconstructor.loss.type=FisherLoss', *options, name=name)
    assert outcome.status == 0, outcome.err
    summary = summary_of(tmp_path / 'work')
    assert summary['loss'].startswith('FisherLoss, by the task loss on annotated images')
    change(scenes / 'train.json', lambda content: content['annotations'].clear())
    outcome = quantize('reconstructor.loss.type=FisherLoss', *options, name=name)
    assert outcome.status == 0, outcome.err
    summary = summary_of(tmp_path / 'work')
    assert summary['loss'].startswith('FisherLoss, by the distance of quantized from float outputs')
    assert all(0 <= unit['loss_after'] <= unit['loss_before'] for unit in summary['units'])
    assert {unit['name'] for unit in summary['units']} >= {'backbone.conv1', 'neck.fpn_convs.0.conv'}


@pytest.mark.parametrize('name', NAMES)
def test_images_smaller_than_the_stride(scenes: Path, quantize: Callable[..., Any], tmp_path: Path, name: str) -> None:
    """They are padded to the preprocessor's divisor, and without one the maps shrink to a pixel."""
    for path in (scenes / 'images').iterdir():
        assert cv2.imwrite(str(path), cv2.resize(cv2.imread(str(path)), (12, 12)))
    tiny = [f'{loader}_dataloader.dataset.pipeline.1.scale=(12,12)' for loader in ('train', 'val', 'test')]
    options = ('model.data_preprocessor.pad_size_divisor=1', 'evaluations=[quantized]')
    outcome = quantize(*tiny, *options, name=name)
    assert outcome.status == 0, outcome.err
    assert all(unit['iterations'] > 0 for unit in summary_of(tmp_path / 'work')['units'])


@pytest.fixture
def both_orientations(scenes: Path) -> None:
    """Makes a third of the scenes 96 pixels wide and 64 high, and the others 64 wide and 96 high."""
    for number, path in enumerate(sorted((scenes / 'images').iterdir())):
        image = cv2.imread(str(path))
        assert cv2.imwrite(str(path), image[:64] if number % 3 == 0 else image[:, :64])


@pytest.mark.parametrize('name', NAMES)
def test_images_of_both_orientations(
    both_orientations: None, call: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """Each orientation is a group, no step is of both, and a resumed run ends where an uninterrupted one does."""
    found: list[Any] = []
    steps: set[tuple[int, ...]] = set()

    def collect(*args: Any) -> Any:
        found.append(collect_images(*args))
        return found[-1]

    def draw(batches: Batches) -> None:
        draw_plainly(batches)
        index = batches._next[0] if batches._next else torch.tensor([0])
        if isinstance(batches.data.targets[0], Grouped):
            steps.add(tuple(sorted({int(i >= found[-1][0].starts[1]) for i in index})))

    draw_plainly = Batches._draw
    monkeypatch.setattr(ptq_loop, 'collect_images', collect)
    monkeypatch.setattr(Batches, '_draw', draw)
    options = (*QUICK, 'evaluations=[quantized]', 'reconstructor.loss.type=FisherLoss')

    def quantize(folder: Path, *more: str) -> tuple[dict[str, Any], Any, Any]:
        outcome = call('ptq', CONFIGS / f'{name}.py', *options, *more, work_dir=folder)
        assert outcome.status == 0, outcome.err
        summary = summary_of(folder)
        losses = [(unit['name'], unit['loss_before'], unit['loss_after']) for unit in summary['units']]
        return torch.load(folder / 'quantized.pth', weights_only=True)['state_dict'], losses, summary['metrics']

    state, losses, metrics = quantize(tmp_path / 'whole')
    images, drawn = found[0]
    assert sorted(tuple(part.shape[1:]) for part in images.parts) == [(3, 64, 96), (3, 96, 64)]
    assert sum(map(len, images.parts)) == 16 and images.ends == drawn.ends
    for image, batch in zip((row for part in images.parts for row in part), drawn.batches(1), strict=True):
        assert image.shape[1:] == batch['inputs'][0].shape[1:]
    assert steps == {(0,), (1,)}
    assert all(0 <= after <= before for _, before, after in losses)
    journal = tmp_path / 'cut' / 'reconstruction.pth'
    journal.parent.mkdir()
    saved = torch.load(tmp_path / 'whole' / 'reconstruction.pth', weights_only=True)
    saved['units'] = saved['units'][:7]
    torch.save(saved, journal)
    again, same_losses, same_metrics = quantize(tmp_path / 'cut', '--resume')
    assert all(torch.equal(tensor, again[key]) for key, tensor in state.items())
    assert (same_losses, same_metrics) == (losses, metrics)


def test_a_task_loss_of_other_regions_chooses_no_bits(
    quantize: Callable[..., Any],
) -> None:
    outcome = quantize('search.loss=fisher', 'search.budgets.size=0.2x', name='faster_rcnn_scenes_w4a8')
    assert outcome.status == 2
    assert 'without heads of regions for search.loss=' in outcome.error and 'roi_head' in outcome.error
