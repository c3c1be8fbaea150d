"""Draws predictions of the float and of the quantized model side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import pseudo_collate
from mmengine.registry import VISUALIZERS
from torch import nn

from mmbrecq.data.source import explained_data_errors
from mmbrecq.errors import ConfigError, StorageError
from mmbrecq.graph.traced_graph import evaluation_mode

SHOWN, REPORTED = 10, 4
"""Numbers of images that are drawn, and that a report shows, spread evenly over the dataset: many are sorted."""

VISUALIZER_TYPES = {'mmpretrain': 'mmpretrain.UniversalVisualizer', 'mmdet': 'mmdet.DetLocalVisualizer'}

HEADER, SMALLEST = 24, 224
"""Height of the line above an image, and the least length of its longer side, in pixels."""


class SideBySide:
    """Draws the predictions of the float and of the quantized model for the same images.

    Args:
        dataset: The test set.
        visualizer: A visualizer of :func:`build_visualizer`.
        folder: Folder of the pictures; made where it is missing.
        count: Largest number of images.

    Raises:
        DataError: An image cannot be read.
    """

    def __init__(self, dataset: Any, visualizer: Any, folder: Path, count: int = SHOWN) -> None:
        self.dataset, self.visualizer, self.folder = dataset, visualizer, folder
        visualizer.dataset_meta = dataset.metainfo
        count = min(count, len(dataset))
        with explained_data_errors():
            self.data = [dataset[i * len(dataset) // count] for i in range(count)]
        self._float: list[Any] = []

    def note_float(self, model: nn.Module) -> None:
        """Keeps the predictions of the float model."""
        self._float = self._predict(model)

    def _predict(self, model: nn.Module) -> list[Any]:
        with evaluation_mode(model):
            return [model.test_step(pseudo_collate([data]))[0].cpu() for data in self.data]  # type: ignore[operator]

    def compare(self, model: nn.Module) -> list[Path]:
        """Writes a picture of both models' predictions of every image; returns their paths, or raises StorageError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for number, (data, *samples) in enumerate(zip(self.data, self._float, self._predict(model), strict=True)):
            image = _image_of(self.dataset, data, samples[0])
            pair = zip(samples, ('float', 'quantized'), strict=True)
            halves = [_titled(self._drawn(image.copy(), sample), title) for sample, title in pair]
            name = Path(str(samples[0].metainfo.get('img_path', f'image{number}'))).stem
            paths.append(self.folder / f'{number:02d}_{name}.png')
            if not cv2.imwrite(str(paths[-1]), np.concatenate(halves, axis=1)[..., ::-1]):
                raise StorageError(f'cannot write {paths[-1]}')
        return paths

    def _drawn(self, image: np.ndarray[Any, Any], sample: Any) -> np.ndarray[Any, Any]:
        if not hasattr(self.visualizer, 'visualize_cls'):
            self.visualizer.add_datasample('', image, sample, draw_gt=False)
        else:
            self.visualizer.visualize_cls(image, sample, draw_gt='gt_label' in sample)
        return self.visualizer.get_image()


def build_visualizer(scope: str) -> Any:
    """Returns the visualizer of predictions for ``scope``, the config's ``default_scope``; ConfigError for others."""
    if scope not in VISUALIZER_TYPES:
        known = ' or '.join(map(repr, VISUALIZER_TYPES))
        raise ConfigError(f'expected the default_scope of what is drawn to be {known}, but got {scope!r}')
    return VISUALIZERS.build({'type': VISUALIZER_TYPES[scope], 'name': 'side_by_side'})


def _load(dataset: Any, path: Any) -> np.ndarray[Any, Any] | None:
    """Loads an image file as the pipeline of ``dataset`` does, ``(H, W, 3)`` BGR; None where there is no such file.

    Whether a pipeline turns an image as its EXIF tag says is an option, and boxes are in the pixels of what it loads.
    """
    transforms = getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
    loader = next((t for t in transforms if isinstance(t, LoadImageFromFile)), None)
    # a dataset in memory has names that are no files
    if loader is None or path is None or not Path(path).is_file():
        return None
    image = np.asarray(loader({'img_path': str(path)})['img'])
    image = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image[..., :3]
    return image.clip(0, 255).astype(np.uint8)


def _image_of(dataset: Any, data: Any, sample: Any) -> np.ndarray[Any, Any]:
    """Returns the image, ``(H, W, 3)`` RGB: the file itself where there is one, since boxes are in its pixels."""
    path = sample.metainfo.get('img_path')
    image = _load(dataset, path)
    if image is None:
        image = data['inputs'].permute(1, 2, 0).numpy()
    image = np.ascontiguousarray(image[..., ::-1])
    factor = SMALLEST / max(image.shape[:2])
    if path is None or 'pred_instances' not in sample:
        image = cv2.resize(image, None, fx=max(factor, 1), fy=max(factor, 1), interpolation=cv2.INTER_NEAREST)
    return image


def _titled(image: np.ndarray[Any, Any], title: str) -> np.ndarray[Any, Any]:
    header = np.full((HEADER, image.shape[1], 3), 255, np.uint8)
    cv2.putText(header, title, (6, HEADER - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([header, image], axis=0)
