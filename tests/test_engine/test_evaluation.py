"""Evaluation with the config's own evaluator."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from torch import nn

from mmbrecq.engine.evaluation import check_classes, evaluate
from mmbrecq.errors import ConfigError, DataError


class Doubling(nn.Module):
    def test_step(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        assert not self.training and not torch.is_grad_enabled()
        return [{'value': float(x)} for x in 2 * batch]


class Mean(BaseMetric):
    default_prefix = 'test'

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [sample['value'] for sample in data_samples]

    def compute_metrics(self, results: list[float]) -> dict[str, Any]:
        mean = sum(results) / len(results)
        return {'mean': mean, 'tensor': torch.tensor(mean), 'words': 'many', 'count': len(results)}


class Batches:
    """A loader of three batches whose last is smaller; the last may fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.dataset = error, range(5)

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield torch.tensor([1.0, 2.0])
        yield torch.tensor([3.0, 4.0])
        if self.error is not None:
            raise self.error
        yield torch.tensor([5.0])


def test_metrics_are_the_evaluators_own_as_floats() -> None:
    model = Doubling().train()
    metrics = evaluate(model, Batches(), Evaluator([Mean()]), 'test')  # type: ignore[arg-type]
    assert metrics == {'test/mean': 6.0, 'test/tensor': 6.0, 'test/count': 5.0}
    assert all(type(value) is float for value in metrics.values())
    assert model.training


def test_an_image_that_cannot_be_read_is_named() -> None:
    error = FileNotFoundError(errno.ENOENT, 'No such file or directory', 'a/b.png')
    model = Doubling().train()
    with pytest.raises(DataError, match=r'a/b\.png'):
        evaluate(model, Batches(error), Evaluator([Mean()]), 'test')  # type: ignore[arg-type]
    assert model.training


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError):
        evaluate(Doubling(), Batches(ZeroDivisionError()), Evaluator([Mean()]), 'test')  # type: ignore[arg-type]


class Counting(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes


class Head(Counting):
    def predict_by_feat(self) -> None: ...


class Cells:
    metainfo = {'classes': ('red', 'white', 'platelet')}  # noqa: RUF012


def test_other_classes_than_the_head_has() -> None:
    """An RPN has one class whatever the data; a dataset that does not name its classes is taken as it is.

    HTC's semantic head has the classes of another annotation, and no results of its own.
    """
    rpn, roi = nn.ModuleDict({'stage': Head(1)}), nn.ModuleDict({'semantic_head': Counting(183)})
    model = nn.ModuleDict({'rpn_head': rpn, 'roi_head': roi, 'backbone': Counting(7), 'bbox_head': Head(3)})
    check_classes(model, Cells())
    check_classes(nn.ModuleDict({'bbox_head': Head(80)}), range(5))
    model['bbox_head'] = Head(80)
    with pytest.raises(
        ConfigError, match="^expected 'bbox_head' to have the 3 classes of Cells, but num_classes is 80$"
    ):
        check_classes(model, Cells())
