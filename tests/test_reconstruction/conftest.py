"""A tiny classifier of every kind of unit: a layer, a block, a unit without layers, and a head.

The folder is on the path, for the tests' helpers: the folders are no packages.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmbrecq.calibration.calibrator import calibrate_activations, calibrate_weights
from mmbrecq.quantizers.brecq import BRECQQuantizer
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction import Task
from mmbrecq.reconstruction.cache import ActivationCache, CachePlan

for folder in (Path(__file__).parent, Path(__file__).parents[1] / 'test_fake_quants'):
    sys.path.insert(0, str(folder))

WIDTH, CLASSES, IMAGES = 6, 5, 24


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.first = BasicBlock()
        self.pool = nn.MaxPool2d(2)
        self.second = BasicBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.pool(self.first(torch.relu(self.stem(x)))))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class Classifier(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), Head()

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
        assert mode == 'tensor'
        return self.head(self.backbone(inputs))


def make_classifier() -> nn.Module:
    torch.manual_seed(0)
    return Classifier().eval()


def make_images(count: int = IMAGES) -> Tensor:
    """Neighbours and channels are alike, as in photographs; of white noise, rounding to nearest is the best."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randn(count, 1, 3, 3, generator=generator)
    return nn.functional.interpolate(coarse, 8, mode='bilinear') + 0.2 * torch.randn(
        count, 3, 8, 8, generator=generator
    )


def labels(count: int = IMAGES) -> Tensor:
    return torch.arange(count) % CLASSES


def prepare(
    bits: int = 2,
    activation_bits: int | None = 4,
    granularity: str = 'block',
    model: nn.Module | None = None,
    **options: Any,
) -> QuantizedModel:
    activation = None if activation_bits is None else {'bits': activation_bits, 'observer': {'type': 'MinMaxObserver'}}
    weight = {'bits': bits, 'observer': {'type': 'MinMaxObserver'}}
    quantizer = BRECQQuantizer(
        **{'weight': weight, 'activation': activation, 'first_last_8bit': False, 'granularity': granularity, **options}
    )
    prepared = quantizer.prepare(make_classifier() if model is None else model, make_images(2))
    calibrate_weights(prepared)
    calibrate_activations(prepared, make_images().split(10))
    return prepared


@pytest.fixture
def prepared() -> Callable[..., QuantizedModel]:
    """``prepared(bits=2, activation_bits=4, granularity='block', model=None, **options)``: with calibrated grids."""
    return prepare


@pytest.fixture
def classifier() -> nn.Module:
    """The float model, with the same parameters as the prepared one."""
    return make_classifier()


@pytest.fixture
def images() -> Tensor:
    return make_images()


@pytest.fixture
def targets() -> Tensor:
    return labels()


@pytest.fixture
def host(tmp_path: Path) -> ActivationCache:
    return ActivationCache(CachePlan('host', 0, ''), torch.device('cpu'), tmp_path)


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Task]:
    """``task(model, seed=0)``; its batches are of 10 images, the last one of 4."""

    def make(model: QuantizedModel, seed: int = 0) -> Task:
        def batches() -> list[dict[str, Any]]:
            parts = zip(make_images().split(10), labels().split(10), strict=True)
            return [{'inputs': list(inputs), 'data_samples': target} for inputs, target in parts]

        def task_loss(batch: Any, inputs: Tensor) -> Tensor:
            return nn.functional.cross_entropy(model.model(inputs, mode='tensor'), batch['data_samples'])

        return Task(model, make_images(), batches, task_loss, seed, tmp_path)

    return make
