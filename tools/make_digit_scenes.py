"""Draws scenes of several handwritten digits and writes their boxes in COCO's format: a detector's data, no download.

The digits are scikit-learn's; those of the training scenes and of the validation scenes are different ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmbrecq.dependencies import require
from mmbrecq.engine.config import add_debug, run_tool

SIZE = 96
DIGITS = (2, 5)
"""Least and most digits that are tried to be placed in a scene."""
SIDES = (16, 36)
"""Shortest and longest side of a digit, in pixels."""

NUM_VAL = 500
"""Digits of the validation scenes; the others are those of the training scenes."""

Image = np.ndarray[Any, np.dtype[np.uint8]]
Box = tuple[int, int, int, int]


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/digit_scenes'), help='folder (%(default)s)')
    parser.add_argument('--train', type=int, default=800, help='training scenes (%(default)s)')
    parser.add_argument('--val', type=int, default=100, help='validation scenes (%(default)s)')
    add_debug(parser)
    return parser.parse_args()


def read_digits(split: str) -> list[tuple[Image, int]]:
    """Images, ``(8, 8)`` in 0..255, and labels."""
    require('sklearn')
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    # load_digits counts set pixels of a 4x4 cell: 0..16
    images = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(images))
    return [(images[i], int(labels[i])) for i in (order[:NUM_VAL] if split == 'val' else order[NUM_VAL:])]


def draw_scene(digits: list[tuple[Image, int]], random: np.random.RandomState) -> tuple[Image, list[tuple[int, Box]]]:
    """A scene, ``(96, 96, 3)``, and label and box ``(x, y, w, h)`` of each of its digits, which do not overlap."""
    canvas = random.uniform(0, 60) + random.normal(0, 8, (SIZE, SIZE))
    taken = np.zeros((SIZE, SIZE), bool)
    placed = []
    for _ in range(random.randint(DIGITS[0], DIGITS[1] + 1)):
        digit, label = digits[random.randint(len(digits))]
        side = random.randint(SIDES[0], SIDES[1] + 1)
        x, y = random.randint(0, SIZE - side + 1, 2)
        window = (slice(y, y + side), slice(x, x + side))
        if taken[window].any():
            continue
        taken[window] = True
        stroke = cv2.resize(digit.astype(np.float32) / 255, (side, side), interpolation=cv2.INTER_CUBIC)
        canvas[window] += random.uniform(100, 190) * np.clip(stroke, 0, 1)
        rows, columns = (np.flatnonzero((stroke > 0.2).any(axis)) for axis in (1, 0))
        box = (x + columns[0], y + rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
        placed.append((label, tuple(int(value) for value in box)))
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return image[..., None].repeat(3, axis=2), placed  # type: ignore[return-value]


def write_scenes(folder: Path, split: str, count: int) -> None:
    """Writes ``images/SPLIT_0000.png`` and so on, and ``SPLIT.json``."""
    digits = read_digits(split)
    random = np.random.RandomState({'train': 0, 'val': 1}[split])
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        image, placed = draw_scene(digits, random)
        name = f'{split}_{number:04d}.png'
        if not cv2.imwrite(str(folder / 'images' / name), image):
            raise OSError(f'{folder / "images" / name} cannot be written')
        images.append({'id': number, 'file_name': name, 'width': SIZE, 'height': SIZE})
        for label, (x, y, w, h) in placed:
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': number,
                    'category_id': label,
                    'bbox': [x, y, w, h],
                    'area': w * h,
                    'iscrowd': 0,
                }
            )
    categories = [{'id': label, 'name': str(label)} for label in range(10)]
    content = {'images': images, 'annotations': annotations, 'categories': categories}
    (folder / f'{split}.json').write_text(json.dumps(content))


def main() -> None:
    """Writes both splits."""
    args = parse_args()
    (args.out / 'images').mkdir(parents=True, exist_ok=True)
    for split, count in (('train', args.train), ('val', args.val)):
        write_scenes(args.out, split, count)
    print(f'{args.train} training and {args.val} validation scenes in {args.out}')


if __name__ == '__main__':
    sys.exit(run_tool(main))
