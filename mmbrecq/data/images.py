"""Draws, reads and preprocesses calibration images.

The draw is seeded and without replacement, from the training set, without augmentation; each image is then preprocessed
as the model does.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from mmbrecq.building import check_integer, expect, parse_options
from mmbrecq.data.groups import Grouped, Images, grouped
from mmbrecq.data.source import build_source_datasets, last_line
from mmbrecq.distributed import aligned_batches, gather, process_count, share_of
from mmbrecq.errors import ConfigError, DataError, NonFiniteError, first_line
from mmbrecq.graph.traced_graph import trace_image_graph
from mmbrecq.progress import track, without_chatter
from mmbrecq.runs.storage import write_text_atomic


@dataclass(frozen=True)
class CalibrationOptions:
    """Holds the ``calibration`` dict of a config.

    Args:
        num_samples: Number of images, at least 1.
        seed: Seed of the draw, at least 0; without effect on ``selection='first'``.
        batch_size: Images per batch, at least 1.
        num_workers: Number of processes that read images; 0 for this process alone.
        selection: ``'random'``, or ``'first'`` for the images whose file names come first, with numbers in the names
            compared as numbers.
        dataset: Dataset config that replaces ``train_dataloader.dataset``.
        pipeline: Transforms that replace the test pipeline.
    """

    num_samples: int = 1024
    seed: int = 0
    batch_size: int = 32
    num_workers: int = 0
    selection: str = 'random'
    dataset: dict[str, Any] | None = None
    pipeline: list[Any] | None = None

    def __post_init__(self) -> None:
        for name, least in (('num_samples', 1), ('seed', 0), ('batch_size', 1), ('num_workers', 0)):
            check_integer(getattr(self, name), least, f'calibration.{name}')
        expect(self.selection in ('random', 'first'), "calibration.selection 'random' or 'first'", self.selection)


def build_calibration_set(cfg: Config, calibration: dict[str, Any], held_out: int = 0) -> CalibrationSet:
    """Draws the calibration images that a config asks for, or those that follow them in the same draw.

    They are images of the training set read through the test pipeline, never of the test or validation set. With
    ``held_out`` they are so many others, with annotations as an evaluator wants them. ConfigError names an invalid
    option of :class:`CalibrationOptions`, DataError a folder that is missing, has too few images, or is the test set's.
    """
    options = parse_options(CalibrationOptions, calibration, 'calibration')
    with without_chatter():
        sources = build_source_datasets(cfg, options.dataset, options.pipeline, for_loss=not held_out)
        images = _Images(sources)
    if len(images) < options.num_samples + held_out:
        more = f' and {held_out} others, see search.held_out, to measure a drop' if held_out else ''
        raise DataError(
            f'expected at least {options.num_samples} images for calibration{more}, but got {len(images)} in '
            f'{images.where}'
        )
    if options.selection == 'first':
        order = sorted(range(len(images)), key=lambda index: _name_order(images.id_of(index)))
    else:
        generator = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(len(images), generator=generator).tolist()
    chosen = order[options.num_samples :][:held_out] if held_out else order[: options.num_samples]
    return CalibrationSet(images, chosen, options.batch_size, options.num_workers)


class CalibrationSet(Dataset[Any]):
    """A fixed list of calibration images, read in the same order every time.

    Attributes:
        ids: One name per image, in order: its path relative to the dataset's root, else the dataset's own id.
        first: Number of the first image among those of all processes.
        ends: Numbers, among those, at which groups of images end; no batch is of two groups.
    """

    def __init__(
        self, images: _Images, indices: Sequence[int], batch_size: int, num_workers: int, first: int = 0
    ) -> None:
        self.ids = [images.id_of(index) for index in indices]
        self._images, self._indices, self.first = images, list(indices), first
        self.batch_size, self.num_workers = batch_size, num_workers
        self.ends: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, position: int) -> Any:
        """Returns one image, or its error in its place: raised in a worker it would arrive as a traceback."""
        name = self.ids[position]
        try:
            data = self._images.load(self._indices[position])
        except Exception as error:  # a transform may raise anything; the image has to be named with it
            told = isinstance(error, OSError) and error.strerror
            return DataError(f'image {name} cannot be read: {told or f"{type(error).__name__}: {last_line(error)}"}')
        if data is None:
            return DataError(f'image {name} cannot be read: the pipeline returned nothing for it')
        return data

    @property
    def dataset(self) -> Any:
        """The dataset of the first image."""
        return self._images.locate(self._indices[0])[1]

    def write_annotations(self, path: Path) -> None:
        """Writes the annotations of these images alone as a file in COCO's format; ConfigError where that fails."""
        dataset: Any
        try:
            (dataset,) = self._images.datasets
            content = json.loads(Path(dataset.ann_file).read_text(encoding='utf-8'))
            ids = {dataset.get_data_info(index)['img_id'] for index in self._indices}
            content['images'] = [image for image in content['images'] if image['id'] in ids]
            content['annotations'] = [entry for entry in content['annotations'] if entry['image_id'] in ids]
        except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            raise ConfigError(
                f"expected held-out images of one dataset with annotations in COCO's format, as the evaluator has "
                f'them, but got {self._images.where}: {type(error).__name__}: {error}'
            ) from error
        write_text_atomic(json.dumps(content), path)

    def share(self, groups: Sequence[Sequence[int]] = ()) -> CalibrationSet:
        """Returns this process's images, ordered by ``groups`` of their numbers; DataError where a process has none."""
        if len(self) < process_count():
            raise DataError(f'expected an image for each of {process_count()} processes, but got {len(self)}')
        share = share_of(len(self))
        indices = ([self._indices[i] for group in groups for i in group] or self._indices)[share.start : share.stop]
        found = CalibrationSet(self._images, indices, self.batch_size, self.num_workers, share.start)
        found.ends = [*accumulate(map(len, groups))]
        return found

    def batches(self, size: int | None = None) -> Iterator[dict[str, Any]]:
        """Yields every image once, the last batch smaller where the number does not divide.

        Where several processes have a share of the images each, batches end where they end in one process. They are of
        ``size`` images, by default ``batch_size``, and are the argument of ``model.data_preprocessor(data, False)``:
        ``inputs``, a list of B images of (C, H, W), and ``data_samples``. DataError names an image that cannot be read.
        """
        parts = aligned_batches(len(self), size or self.batch_size, self.first, self.ends)
        # without a generator of its own every pass would draw from the global one
        loader = DataLoader(
            self, batch_sampler=[[*range(part.start, part.stop)] for part in parts], num_workers=self.num_workers,
            collate_fn=collate, generator=torch.Generator(),
        )  # fmt: skip
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


class _Images(ConcatDataset[Any]):
    """One or several mmengine datasets as one list of images."""

    @property
    def where(self) -> str:
        """The roots of the datasets, or their types, for a message."""
        return ', '.join(
            str(getattr(part, 'img_prefix', None) or getattr(part, 'data_root', None) or type(part).__name__)
            for part in self.datasets
        )

    def locate(self, index: int) -> tuple[int, Any, int]:
        """Returns the number of a dataset, the dataset, and the index in it."""
        part = bisect_right(self.cumulative_sizes, index)
        return part, self.datasets[part], index - (self.cumulative_sizes[part - 1] if part else 0)

    def id_of(self, index: int) -> str:
        """Returns the name of an image; with several datasets, the dataset's number stands before it."""
        part, dataset, inner = self.locate(index)
        info = dataset.get_data_info(inner) if hasattr(dataset, 'get_data_info') else {}
        name = str(info.get('img_id', info.get('sample_idx', inner)))
        if info.get('img_path'):
            name = path = str(info['img_path'])
            if root := getattr(dataset, 'data_root', None):
                relative = os.path.relpath(path, root)
                name = path if relative.startswith(os.pardir) else relative
        return name if len(self.datasets) == 1 else f'{part}:{name}'

    def load(self, index: int) -> Any:
        """Returns one image through the pipeline, None where the pipeline gave it up."""
        _, dataset, inner = self.locate(index)
        # not by __getitem__, which replaces an image that cannot be read by a random other one
        return dataset.prepare_data(inner) if hasattr(dataset, 'prepare_data') else dataset[inner]


def collate(samples: list[Any]) -> Any:
    return next((sample for sample in samples if isinstance(sample, DataError)), None) or pseudo_collate(samples)


def _name_order(name: str) -> tuple[list[str | int], str]:
    """Returns the key that sorts by file name, numbers as numbers; text and numbers alternate, so like meets like."""
    parts = re.split(r'(\d+)', os.path.basename(name))
    return [int(part) if part.isdigit() else part for part in parts], name


Allocate = Callable[[Sequence[int], Tensor], Tensor]
"""Makes an uninitialised tensor of a shape, of the dtype and on the device of another one."""


def collect_images(
    model: nn.Module, calibration: CalibrationSet, allocate: Allocate = lambda shape, like: like.new_empty(tuple(shape))
) -> tuple[Images, CalibrationSet]:
    """Reads and preprocesses the calibration images of this process, into memory that is allocated once.

    Images of several sizes are padded at the right and at the bottom to the largest height and width, those of other
    processes included, as the preprocessor itself pads the images of a batch. Images that are higher than wide are
    padded as a group, and the others as another, if the model runs at any size. Where the first image does not have the
    size of all the images are read a second time, rather than kept twice.

    Args:
        model: The model, whose data preprocessor is used.
        calibration: The drawn images of all processes.
        allocate: Makes the tensor; see :meth:`~mmbrecq.reconstruction.BaseReconstructor.image_room`.

    Returns:
        Finite images, ``(N, 3, H, W)`` or the group of the larger ones and the other, on the device of the model;
        NonFiniteError names another one. And the drawn images of this process, in their order.
    """
    share, own = calibration.share(), []
    images: Tensor | None = None
    for number, image in enumerate(_preprocessed(model, share)):
        if number == 0:
            images = allocate((len(share), *image.shape[1:]), image)
        if images is not None and not _put(image, images[number], model):
            images = None
        own.append(image.shape[2:])
    sizes = torch.tensor([size for part in gather(own) for size in part])
    upright = sizes[:, 0] > sizes[:, 1]
    groups = [kind.nonzero()[:, 0] for kind in (~upright, upright) if kind.any()]
    if len(groups) > 1 and not all(gather(_is_free(model, image))):
        groups = [torch.arange(len(sizes))]
    groups.sort(key=lambda group: -int(sizes[group].amax(0).prod()))
    shapes = [tuple(sizes[group].amax(0).tolist()) for group in groups]
    if len(groups) == 1 and images is not None and images.shape[2:] == shapes[0]:
        return images, share
    del images
    share = calibration.share([group.tolist() for group in groups]) if len(groups) > 1 else share
    rows = [shape for group, shape in zip(groups, shapes, strict=True) for _ in group][share.first :][: len(share)]
    # a share may have images of one group alone
    present = [(len(list(run)), image.shape[1], *shape) for shape, run in groupby(rows)]
    counts = [math.prod(shape) for shape in present]
    room = allocate(present[0] if len(present) == 1 else [sum(counts)], image)
    parts = [part.view(shape) for part, shape in zip(room.flatten().split(counts), present, strict=True)]
    for row, image in zip(chain(*parts), _preprocessed(model, share), strict=True):
        _put(image, row, model)
    return Grouped(parts, share.ends) if len(groups) > 1 else parts[0], share


def _preprocessed(model: nn.Module, calibration: CalibrationSet) -> Iterator[Tensor]:
    """Yields each image, ``(1, 3, H, W)``; of a whole batch, several copies would be there at once."""
    batches = track(calibration.batches(1), 'calibration images', len(calibration))
    for name, batch in zip(calibration.ids, batches, strict=True):
        try:
            with torch.no_grad():
                image: Tensor = model.data_preprocessor(batch, False)['inputs']  # type: ignore[operator]
        except Exception as error:
            raise DataError(
                f'{type(model.data_preprocessor).__name__} cannot take the calibration images as their pipeline gives '
                f'them: {type(error).__name__}: {first_line(error)}'
            ) from error
        if not bool(torch.isfinite(image).all()):
            raise NonFiniteError(f"expected finite pixels, but got NaN or infinity in '{name}'")
        yield image


def _is_free(model: nn.Module, image: Tensor) -> bool:
    """Returns whether the model runs at the size of an image, and its graph is right for any size."""
    with suppress(Exception):
        return trace_image_graph(copy.deepcopy(model), image).free_size
    return False


def _put(image: Tensor, row: Tensor, model: nn.Module) -> bool:
    """Copies an image, ``(1, 3, h, w)``, into ``row``, ``(3, H, W)``, and pads it; returns whether it fits."""
    height, width = image.shape[2:]
    if height > row.shape[1] or width > row.shape[2]:
        return False
    if row.shape != image.shape[1:]:
        row.fill_(getattr(model.data_preprocessor, 'pad_value', 0))
    row[:, :height, :width] = image[0]
    return True


def example_of(images: Images) -> Tensor:
    """Returns a copy of the first two images, ``(2, 3, H, W)``, to trace with; a single image is repeated."""
    first: Tensor = grouped(images).parts[0]
    return torch.cat([first[:1], first[:2][-1:]])
