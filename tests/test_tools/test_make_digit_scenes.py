"""The scenes of the detection demo, against the pixels of the written images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('scenes')
    write(out)
    return out


def write(out: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / 'tools/make_digit_scenes.py'),
        '--out',
        str(out),
        '--train',
        '12',
        '--val',
        '6',
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)


@pytest.mark.parametrize(('split', 'count'), [('train', 12), ('val', 6)])
def test_boxes_hold_the_bright_pixels(folder: Path, split: str, count: int) -> None:
    """What is brighter than any background lies in boxes, which are within the image and do not overlap."""
    content = json.loads((folder / f'{split}.json').read_text())
    assert len(content['images']) == count
    assert [category['name'] for category in content['categories']] == list('0123456789')
    assert len({annotation['id'] for annotation in content['annotations']}) == len(content['annotations'])
    for info in content['images']:
        image = cv2.imread(str(folder / 'images' / info['file_name']))[..., 0]
        assert image.shape == (info['height'], info['width'])
        covered = np.zeros(image.shape, int)
        for annotation in content['annotations']:
            if annotation['image_id'] == info['id']:
                x, y, w, h = annotation['bbox']
                assert min(x, y) >= 0
                assert x + w <= info['width']
                assert y + h <= info['height']
                assert annotation['area'] == w * h
                covered[y : y + h, x : x + w] += 1
        assert covered.max() == 1
        assert not (image > 130)[covered == 0].any()
        assert (image > 90)[covered == 1].any()


def test_the_same_scenes_every_time(folder: Path, tmp_path: Path) -> None:
    write(tmp_path)
    names = sorted(path.relative_to(folder) for path in folder.rglob('*.*'))
    assert len(names) == 20
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)
