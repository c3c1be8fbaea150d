from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mmbrecq.data.source import annotations_first, has_annotations

LOAD, RESIZE, BOXES, PACK = (
    {'type': kind} for kind in ('LoadImageFromFile', 'Resize', 'mmdet.LoadAnnotations', 'PackDetInputs')
)


class Sample(dict[str, Any]):
    """As mmengine's data elements: keys with ``in`` and ``get``."""


def test_boxes_are_loaded_before_the_image_is_resized() -> None:
    pipeline = [LOAD, RESIZE, BOXES, PACK]
    assert annotations_first(pipeline) == [LOAD, BOXES, RESIZE, PACK]
    assert pipeline == [LOAD, RESIZE, BOXES, PACK]


@pytest.mark.parametrize('pipeline', [[], [LOAD, RESIZE, PACK], [LOAD, BOXES, RESIZE, PACK]])
def test_pipelines_that_stay_as_they_are(pipeline: list[dict[str, str]]) -> None:
    assert annotations_first(pipeline) == pipeline


def test_types_instead_of_names() -> None:
    class LoadAnnotations:
        pass

    boxes = {'type': LoadAnnotations}
    assert annotations_first([RESIZE, boxes]) == [boxes, RESIZE]


@pytest.mark.parametrize(
    ('sample', 'annotated'),
    [
        (Sample(gt_label=3), True),
        (Sample(gt_instances=[SimpleNamespace()]), True),
        (Sample(gt_instances=[]), False),
        (Sample(), False),
    ],
)
def test_an_image_counts_that_has_a_label_or_an_object(sample: Sample, annotated: bool) -> None:
    bare = Sample()
    assert has_annotations([{'data_samples': [bare, sample]}, {'data_samples': [bare]}]) is annotated
