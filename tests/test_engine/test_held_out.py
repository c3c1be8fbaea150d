"""Drops of models whose mistakes are known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from torch import nn

from mmbrecq.data import build_calibration_set
from mmbrecq.engine.evaluation import HeldOut
from mmbrecq.errors import ConfigError

pytest.importorskip('mmpretrain')
DEMO = Path(__file__).resolve().parents[2] / 'configs' / 'demo' / 'resnet_digits_w2a4.py'
CALIBRATION = {'num_samples': 64}


class Answers(nn.Module):
    """Names the right digit of every image, but for some digits."""

    def __init__(self, *wrong: int) -> None:
        super().__init__()
        self.wrong = wrong

    def test_step(self, batch: Any) -> Any:
        for sample in batch['data_samples']:
            label = int(sample.gt_label)
            sample.set_pred_label((label + 1) % 10 if label in self.wrong else label)
        return batch['data_samples']


def held_out(folder: Path, build: Any = Evaluator) -> HeldOut:
    cfg = Config.fromfile(DEMO)
    init_default_scope('mmpretrain')
    runner: Any = SimpleNamespace(cfg=cfg, work_dir=str(folder), build_evaluator=build)
    return HeldOut(runner, CALIBRATION, 200)


def test_the_drop_is_the_share_of_new_mistakes(tmp_path: Path) -> None:
    images = build_calibration_set(Config.fromfile(DEMO), CALIBRATION, held_out=200)
    labels = [int(sample.gt_label) for batch in images.batches() for sample in batch['data_samples']]
    found = held_out(tmp_path)
    found.measure_float(Answers(7))
    assert (found.metric, len(found)) == ('accuracy/top1', 200)
    assert found.drop(Answers(7, 3)) == pytest.approx(100 * labels.count(3) / 200)
    assert found.drop(Answers()) == pytest.approx(-100 * labels.count(7) / 200)
    assert found.drop(Answers(7)) == 0


def test_a_float_model_without_a_right_answer_has_nothing_to_lose(tmp_path: Path) -> None:
    message = r'^expected a float model whose accuracy/top1 on 200 held-out images is above 0, .* but got 0\.0$'
    with pytest.raises(ConfigError, match=message):
        held_out(tmp_path).measure_float(Answers(*range(10)))


def test_points_of_a_fraction_are_percent(tmp_path: Path) -> None:
    results = iter([{'coco/bbox_mAP': 0.75, 'other': 3.0}, {'coco/bbox_mAP': 0.5, 'other': 2.0}])
    fake = SimpleNamespace(metrics=[], process=lambda **_: None, evaluate=lambda _: next(results))
    found = held_out(tmp_path, lambda _: fake)
    found.measure_float(Answers())
    assert found.metric == 'coco/bbox_mAP' and found.drop(Answers()) == 25.0
