from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.structures import BaseDataElement, InstanceData
from PIL import Image
from torch import nn

from mmbrecq.engine.drawing import SideBySide

TURNED_RIGHT, UPSIDE_DOWN = 6, 3
"""EXIF's words for what turns a file upright: a quarter clockwise, and a half."""


class Drawing:
    """Keeps the images that it is given, and draws nothing on them."""

    dataset_meta: Any = None

    def add_datasample(self, name: str, image: np.ndarray[Any, Any], *sample: Any, **options: Any) -> None:
        self.image = image

    def get_image(self) -> np.ndarray[Any, Any]:
        return self.image


class Dataset:
    """One image."""

    def __init__(self, **loading: Any) -> None:
        self.metainfo: dict[str, Any] = {}
        self.pipeline = Compose([{'type': 'LoadImageFromFile', **loading}])

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {'inputs': torch.zeros(3, 4, 4)}


@pytest.mark.parametrize(
    ('orientation', 'loading', 'expected'),
    [
        (TURNED_RIGHT, {}, np.s_[:40, :]),
        (TURNED_RIGHT, {'imdecode_backend': 'pillow', 'to_float32': True}, np.s_[:40, :]),
        (TURNED_RIGHT, {'color_type': 'unchanged'}, np.s_[:, :40]),
        (UPSIDE_DOWN, {}, np.s_[:, 40:]),
        (UPSIDE_DOWN, {'color_type': 'color_ignore_orientation'}, np.s_[:, :40]),
    ],
)
def test_images_are_drawn_the_way_up_that_the_pipeline_loads_them(
    orientation: int,
    loading: dict[str, Any],
    expected: tuple[slice, slice],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The left half of the file is red; where that lies in the picture shows how it was turned."""
    pixels, exif = np.zeros((32, 80, 3), np.uint8), Image.Exif()
    pixels[:, :40, 0], exif[0x0112] = 255, orientation
    Image.fromarray(pixels).save(tmp_path / 'image.png', exif=exif)
    sample: Any = BaseDataElement(metainfo={'img_path': str(tmp_path / 'image.png')})
    sample.pred_instances = InstanceData()
    drawing = Drawing()
    side_by_side = SideBySide(Dataset(**loading), drawing, tmp_path / 'pictures')
    monkeypatch.setattr(side_by_side, '_predict', lambda model: [sample])
    side_by_side.note_float(nn.Module())
    assert len(side_by_side.compare(nn.Module())) == 1
    wanted = np.zeros_like(drawing.image)
    wanted[expected] = (255, 0, 0)
    np.testing.assert_array_equal(drawing.image, wanted)
