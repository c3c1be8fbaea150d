"""tools/test.py gives the metrics that the run wrote, and takes nothing that does not belong to the config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import pytest

from mmbrecq.engine.drawing import build_visualizer
from mmbrecq.errors import ConfigError


def metrics_of(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / 'summary.json').read_text())['metrics']
    return metrics


def printed(outcome: Any) -> float:
    """The accuracy that the tool printed, every digit of it."""
    assert outcome.status == 0, outcome.err
    (line,) = [line for line in outcome.out.splitlines() if 'accuracy/top1: ' in line]
    return float(line.rpartition('accuracy/top1: ')[2])


def test_a_checkpoint_gives_exactly_the_metric_of_the_run(demo_run: Any, run: Any, demo: Path, tmp_path: Path) -> None:
    # in another process, from another folder, and without the run's work dir
    checkpoint = shutil.copy(demo_run.folder / 'quantized.pth', tmp_path)
    outcome = run('test', demo, checkpoint, '--work-dir', tmp_path / 'work')
    assert printed(outcome) == metrics_of(demo_run.folder)['quantized']['accuracy/top1']
    assert outcome.err == ''
    assert {path.name for path in (tmp_path / 'work').glob('*') if path.is_file()} == set()


@pytest.mark.parametrize(('file', 'runtime'), [('model.onnx', 'ONNX Runtime'), ('model.xml', 'OpenVINO')])
def test_an_exported_file_gives_the_deployed_metric(
    demo_run: Any, call: Any, demo: Path, file: str, runtime: str
) -> None:
    outcome = call('test', demo, demo_run.folder / 'deploy' / file)
    assert printed(outcome) == metrics_of(demo_run.folder)['deployed'][runtime]['accuracy/top1']


def test_no_calibration_data_is_read(demo_run: Any, call: Any, demo: Path) -> None:
    options = ('train_dataloader.dataset.type=NoDataset', 'calibration.num_samples=1000000', 'float_checkpoint=no.pth')
    for file in ('quantized.pth', 'deploy/model.onnx'):
        assert printed(call('test', demo, demo_run.folder / file, *options)) > 0


def test_the_results_of_the_run_stay(finished: Any, call: Any, demo: Path) -> None:
    before = finished.contents()
    assert call('test', demo, finished.folder / 'quantized.pth', work_dir=finished.folder).status == 0
    assert finished.contents() == before


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        (
            'quantizer.weight.bits=4',
            "19 of 40 grids differ (first: 'backbone.layer1.0.conv1' expected 0..15 along axis 0 but got 0..3 along",
        ),
        ('quantizer.activation.bits=8', "grids differ (first: 'activation_quantizers.backbone_"),
        ('quantizer.first_last_8bit=False', "grids differ (first: 'backbone.conv1' expected 0..3 along axis 0 but got"),
        ('quantizer.weight.per_channel=False', '42 keys of another shape'),
        ('quantizer.preset=onnxruntime', 'does not fit'),
        ('quantizer.activation=None', '38 unexpected keys'),
        ('model.backbone.depth=34', 'missing keys'),
    ],
)
def test_a_checkpoint_of_another_config_is_refused(
    demo_run: Any, call: Any, demo: Path, option: str, message: str
) -> None:
    checkpoint = demo_run.folder / 'quantized.pth'
    error = call('test', demo, checkpoint, option).error
    assert error.startswith(f'{checkpoint} does not fit the quantize') and message in error


def test_files_that_are_no_result_of_a_run(demo_run: Any, call: Any, demo: Path, tmp_path: Path) -> None:
    assert call('test', demo, tmp_path / 'no.pth').error == (
        f'{tmp_path / "no.pth"}: expected a checkpoint or an exported file, but there is none'
    )
    float_checkpoint = demo.parent / 'resnet_digits.pth'
    assert call('test', demo, float_checkpoint).error == (
        f'{float_checkpoint}: expected a checkpoint written by tools/ptq.py, but it names no grids'
    )
    for name in ('quantized.pth', 'deploy/model.onnx', 'deploy/model.xml'):
        source = demo_run.folder / name
        cut = tmp_path / f'cut{source.suffix}'
        cut.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
        assert str(cut) in call('test', demo, cut).error


def test_predictions_are_drawn_side_by_side(demo_run: Any, call: Any, demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / 'pictures'
    outcome = call('test', demo, demo_run.folder / 'deploy' / 'model.onnx', '--show-dir', folder)
    assert printed(outcome) == metrics_of(demo_run.folder)['deployed']['ONNX Runtime']['accuracy/top1']
    pictures = sorted(folder.iterdir())
    assert len(pictures) == 10
    picture = cv2.imread(str(pictures[0]))
    assert picture is not None and picture.shape == (224 + 24, 2 * 224, 3)
    left, right = picture[24:, :224].astype(int), picture[24:, 224:].astype(int)
    # the same image under two texts
    assert 0.5 < float((left == right).all(2).mean()) <= 1


def test_a_family_without_pictures_is_refused() -> None:
    with pytest.raises(ConfigError, match="to be 'mmpretrain' or 'mmdet', but got 'mmseg'"):
        build_visualizer('mmseg')
