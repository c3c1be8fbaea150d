"""How long a reconstruction will take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmbrecq.mixed_precision.costs.models import Call, LayerShape
from mmbrecq.reconstruction import callbacks as module
from mmbrecq.reconstruction.callbacks import OVERHEAD, Forecast
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.reconstruction.stages import Stage, StageOptions


def shape(name: str, channels: int, times: int = 1) -> LayerShape:
    """A 1x1 convolution of one channel to ``channels``, over 100 x 100 places."""
    return LayerShape(
        name, 'Conv2d', (channels, 1, 1, 1), (Call((1, 100, 100), (channels, 100, 100), times),), (2, 4), 1, True
    )


def unit(name: str) -> Any:
    return SimpleNamespace(name=name, layers=(name,), is_quantized=True)


@pytest.fixture
def forecast(monkeypatch: pytest.MonkeyPatch) -> Forecast:
    """Two passes of 10 and 5 steps of 100 images over a small and a large unit, and a head of regions."""
    shapes = [shape('small', 1), shape('large', 10), shape('head', 1, times=1000)]
    monkeypatch.setattr(module, 'layer_shapes', lambda model: shapes)
    units = [unit('small'), unit('large'), unit('head'), SimpleNamespace(name='pool', layers=(), is_quantized=False)]
    monkeypatch.setattr(module, 'stage_units', lambda part, stage: units)
    stages = [
        Stage('weights', StageOptions(iterations=10, batch_size=100), True, False),
        Stage('activations', StageOptions(iterations=5, batch_size=100), False, True),
    ]
    part = SimpleNamespace(traced=SimpleNamespace(example=torch.zeros(1)), quantizers={'a': 1})
    part.graphs, part.quantizes_activations, part.image_graph = [part], True, part
    return Forecast(part, stages)  # type: ignore[arg-type]


def result(name: str, stage: str, seconds: float) -> UnitResult:
    return UnitResult(name, stage, (name,), 1.0, 0.5, 10, seconds, False)


def test_nothing_is_known_before_the_first_unit(forecast: Forecast) -> None:
    assert forecast.left() is None


def test_units_take_their_share_of_the_work(forecast: Forecast) -> None:
    # multiplications of a step: 100 images, 10,000 places
    small, large, head = (100 * 10_000 * n + OVERHEAD['cpu'] for n in (1, 10, 32))
    forecast.note(result('small', 'weights', 2.0))
    left = 10 * (large + head) + 5 * (small + large + head)
    assert forecast.left() == pytest.approx(2.0 * left / (10 * small))


def test_what_is_done_is_not_left(forecast: Forecast) -> None:
    for stage in ('weights', 'activations'):
        for name in ('small', 'large', 'head'):
            forecast.note(result(name, stage, 1.0))
    assert forecast.left() == 0
