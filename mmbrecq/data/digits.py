"""Provides scikit-learn's handwritten digits as an mmpretrain dataset: real images without a download."""

from typing import Any, ClassVar

import numpy as np
from mmpretrain.datasets import BaseDataset

from mmbrecq.building import expect
from mmbrecq.dependencies import require
from mmbrecq.registry import DATASETS

NUM_VAL = 500
_SPLIT_SEED = 0


@DATASETS.register_module()
class DigitsDataset(BaseDataset):
    """1,797 greyscale images of 8x8 pixels, ten classes, kept in memory.

    The images are those of ``sklearn.datasets.load_digits`` (Alpaydin and Kaynak, Optical Recognition of Handwritten
    Digits, UCI 1998). A fixed permutation splits them into 1,297 for training and 500 for validation. A data info
    holds ``img``, ``(8, 8, 3)`` uint8 in 0..255 with three equal channels; ``gt_label``, 0..9; ``img_path``, the id
    ``digits/NNNN``, where NNNN is the index in scikit-learn's order; ``img_shape`` and ``ori_shape``.
    The pipeline starts from ``img``: it needs no ``LoadImageFromFile``.

    Args:
        split: ``'train'`` or ``'val'``.
        **kwargs: Arguments of ``mmpretrain.datasets.BaseDataset``, such as ``pipeline`` and ``test_mode``.

    Raises:
        ConfigError: ``split`` is unknown.
        ImportError: scikit-learn is not installed.
    """

    METAINFO: ClassVar[dict[str, Any]] = {'classes': tuple('0123456789')}

    def __init__(self, split: str = 'train', **kwargs: Any) -> None:
        expect(split in ('train', 'val'), "split of DigitsDataset to be one of 'train', 'val'", split)
        self.split = split
        super().__init__(**{'ann_file': '', **kwargs})

    def load_data_list(self) -> list[dict[str, Any]]:
        """Returns the data infos of the split, in the order of the permutation."""
        require('sklearn')
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        # load_digits counts set pixels of a 4x4 cell: 0..16
        images = np.round(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8).repeat(3, axis=3)
        # RandomState, since NumPy promises its stream for good (NEP 19), and that of default_rng only for a version
        order: list[int] = np.random.RandomState(_SPLIT_SEED).permutation(len(images)).tolist()
        shape = {'img_shape': (8, 8), 'ori_shape': (8, 8)}
        return [
            {'img': images[index], 'gt_label': int(labels[index]), 'img_path': f'digits/{index:04d}', **shape}
            for index in (order[:NUM_VAL] if self.split == 'val' else order[NUM_VAL:])
        ]
