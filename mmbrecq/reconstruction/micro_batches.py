"""Fewer images at once where a GPU has no room for a whole batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from mmengine.logging import print_log

from mmbrecq.errors import StorageError

T = TypeVar('T')


class MicroBatches:
    """How many images a unit takes at once: half as many whenever the GPU runs out of memory.

    Args:
        unit: Name of the unit.
        images: Of a whole batch.

    Attributes:
        images: What it takes now.
        split: Whether that is less than a whole batch.
    """

    def __init__(self, unit: str, images: int) -> None:
        self.unit, self.images, self.split = unit, images, False

    def run(self, work: Callable[[int], T]) -> T:
        """Calls ``work(images)``, again with fewer where it fails for want of memory.

        Raises:
            StorageError: A single image does not fit.
        """
        while True:
            try:
                return work(self.images)
            except torch.cuda.OutOfMemoryError as error:
                if self.images == 1:
                    raise StorageError(
                        f"expected room on the GPU for the work on unit '{self.unit}', but a single image takes more "
                        'than it has; use a finer granularity or cache=host'
                    ) from error
            # out of the except clause, whose traceback holds the tensors of the failed attempt
            self.images, self.split = (self.images + 1) // 2, True
            torch.cuda.empty_cache()
            print_log(
                f"the GPU has no room for a batch of unit '{self.unit}': it takes {self.images} images at once now",
                'current',
                logging.WARNING,
            )
