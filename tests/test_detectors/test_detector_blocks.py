from __future__ import annotations

import pytest
from small_detectors import build, data, preprocess

from mmbrecq.graph.blocks import find_blocks
from mmbrecq.graph.traced_graph import trace_image_graph

RESNET = [f'backbone.layer{i}.{j}' for i in range(1, 5) for j in range(2)]
MOBILENET = [f'backbone.layer{i}.{j}' for i, count in enumerate([1, 2, 3, 4, 3, 3, 1], 1) for j in range(count)]
CSP = [f'backbone.stage{i}.{2 if i == 4 else 1}' for i in range(1, 5)]
CSP += [f'neck.{name}_blocks.{i}' for name in ('top_down', 'bottom_up') for i in range(2)]


@pytest.mark.parametrize(
    ('name', 'expected'),
    [('retinanet', RESNET), ('fcos', RESNET), ('faster_rcnn', RESNET), ('ssdlite', MOBILENET), ('yolox', CSP)],
)
def test_detectors_have_blocks_in_what_makes_features(name: str, expected: list[str]) -> None:
    """What the class names gave: sums and concatenations of a pyramid are none, nor is a pooling pyramid or a head."""
    model = build(name)
    assert find_blocks(model, trace_image_graph(model, preprocess(model, data(2))).graph, None) == expected
