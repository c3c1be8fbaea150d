"""Annotations of calibration images: a Fisher-weighted loss asks for the task loss, and that for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def annotations_first(pipeline: Sequence[Any]) -> list[Any]:
    """The pipeline with annotations loaded right after the image.

    mmdet's test pipelines load them after the image was resized, as its evaluators want them: in the pixels of the
    file. A task loss wants boxes where the network sees the objects. The images are the same either way.
    """
    loads = [transform for transform in pipeline if _kind(transform).startswith('LoadAnnotations')]
    others = [transform for transform in pipeline if transform not in loads]
    images = [index for index, transform in enumerate(others) if _kind(transform).startswith('LoadImage')]
    place = images[-1] + 1 if images else 0
    return [*others[:place], *loads, *others[place:]]


def has_annotations(batches: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any image has a class label, or an object with its box."""
    return any(_is_annotated(sample) for batch in batches for sample in batch['data_samples'])


def _is_annotated(sample: Any) -> bool:
    return 'gt_label' in sample or len(sample.get('gt_instances', ())) > 0


def _kind(transform: Any) -> str:
    """Name of a transform's type, without its scope."""
    kind = transform.get('type') if isinstance(transform, Mapping) else transform
    return kind.rsplit('.', 1)[-1] if isinstance(kind, str) else getattr(kind, '__name__', '')
