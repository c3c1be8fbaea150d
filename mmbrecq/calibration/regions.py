"""Captures the features of regions on which the heads of a two-stage detector are calibrated."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmbrecq.data.groups import Images
from mmbrecq.errors import DataError, GraphError
from mmbrecq.graph.components import region_heads
from mmbrecq.quantizers.quantized_model import QuantizedGraph, QuantizedModel

REGIONS_PER_IMAGE = 32
"""Regions that are drawn of each image."""


class RegionCapture:
    """Runs a detector over the calibration images and captures the inputs of its heads.

    Args:
        model: The prepared detector.
        images: Preprocessed calibration images, ``(N, 3, H, W)``, or groups of them.
        batches: Returns the calibration data, in the order of ``images``.
        seed: Seed of the draw of regions.
        first: Number of the first image among those of all processes.
    """

    def __init__(
        self, model: QuantizedModel, images: Images, batches: Callable[[], Iterable[Any]], seed: int, first: int = 0
    ) -> None:
        self.model, self.images, self.batches, self.seed, self.first = model, images, batches, seed, first
        self._heads = {head.path: head for head in region_heads(model.model)}

    def observe(self) -> None:
        """Runs the float detector, so that observers of its heads see all regions that its RPN proposes."""
        with torch.no_grad(), self.model.quantization(weights=False, activations=False):
            for images, samples in self._data():
                self.model.model(images, samples, mode='predict')

    def pairs(self, head: QuantizedGraph, weights: bool, activations: bool) -> tuple[Tensor, Tensor]:
        """Returns features of the same regions in the float and in the quantized stream.

        The regions are those that the quantized detector proposes; the float features are cut out of the float feature
        maps at the same coordinates, so that both streams of a head describe the same objects. Both are
        ``(R, C, h, w)``, R at most :data:`REGIONS_PER_IMAGE` times N. ``weights`` and ``activations`` tell what is
        quantized in the quantized stream.

        Raises:
            DataError: No region is proposed on any image.
            GraphError: The head reads something else than the features that were cut out.
        """
        path, done = head.path, self.first
        extractor: Any = self.model.model.get_submodule(self._heads[path].extractor)
        found: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for images, samples in self._data():
                with self.model.quantization(weights=False, activations=False):
                    float_maps: Any = self.model.image_graph(images)
                with self.model.quantization(weights, activations), self._recording(path) as calls:
                    self.model.model(images, samples, mode='predict')
                seeds = [_seed(self.seed, path, done + image) for image in range(len(images))]
                done += len(images)
                for regions, features in calls:
                    chosen = _draw(regions[:, 0], seeds)
                    found.append((extractor(float_maps[0][: extractor.num_inputs], regions[chosen]), features[chosen]))
        if not found:
            raise no_regions(head)
        floats, quantized = map(torch.cat, zip(*found, strict=True))
        return floats, quantized

    def _data(self) -> Iterator[tuple[Tensor, Any]]:
        start = 0
        for batch in self.batches():
            samples = self.model.model.data_preprocessor(batch, False)['data_samples']  # type: ignore[operator]
            images = self.images[start : start + len(samples)]
            start += len(samples)
            for sample in samples:
                sample.set_metainfo({'batch_input_shape': tuple(images.shape[-2:])})
            yield images, samples

    @contextmanager
    def _recording(self, path: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Lists regions, ``(R, 5)`` with the image's number first, and features of every call of the head ``path``."""
        head = self.model.model.get_submodule(path)
        extractor = self.model.model.get_submodule(self._heads[path].extractor)
        latest: list[tuple[Tensor, Tensor]] = []
        calls: list[tuple[Tensor, Tensor]] = []

        def note_features(_: nn.Module, args: tuple[Any, ...], features: Tensor) -> None:
            latest[:] = [(args[1], features)]

        def note_call(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not latest or latest[0][1] is not args[0]:
                raise GraphError(f"expected '{path}' to read features as they are cut out, but something changes them")
            calls.extend(latest)

        # what the extractor computes, not what other hooks make of it
        with extractor.register_forward_hook(note_features, prepend=True), head.register_forward_pre_hook(note_call):
            yield calls


def no_regions(head: QuantizedGraph) -> DataError:
    """Returns the error to raise where a head has no input."""
    return DataError(f"expected regions for '{head.path}', but the detector proposes none on any calibration image")


def _draw(image_of: Tensor, seeds: Sequence[int]) -> Tensor:
    """Returns the indices of at most :data:`REGIONS_PER_IMAGE` regions of each image."""
    drawn = []
    for image, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        own = (image_of == image).nonzero()[:, 0]
        drawn.append(own[torch.randperm(len(own), generator=generator)[:REGIONS_PER_IMAGE].to(own.device)])
    return torch.cat(drawn)


def _seed(seed: int, path: str, image: int) -> int:
    """Returns a seed for one image, so that its regions are the same in every process."""
    return int.from_bytes(hashlib.sha256(f'{seed}/{path}/{image}'.encode()).digest()[:7], 'big')
