"""Which dataset calibration images come from: the training set's files, read through the test pipeline."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from mmbrecq.building import explain_build_error
from mmbrecq.data.data_errors import explain_data_error, last_line
from mmbrecq.errors import ConfigError, DataError, MMBrecqError

# What a dataset config may say without choosing other files by it
# fmt: off
_SAME_FILES = frozenset({
    'type', '_scope_', 'pipeline', 'test_mode', 'data_root', 'data_prefix', 'ann_file', 'metainfo', 'filter_cfg',
    'indices', 'serialize_data', 'lazy_init', 'max_refetch', 'backend_args', 'file_client_args', 'extensions',
    'with_label', 'return_classes',
})
# fmt: on


def build_source_datasets(cfg: Config, dataset: dict[str, Any] | None, pipeline: list[Any] | None) -> list[Any]:
    """Builds the datasets to draw from; several where the training set is concatenated.

    Wrappers that repeat, re-weight or mix images are taken off, since a draw without replacement wants each image once.

    Args:
        cfg: The resolved config, with ``train_dataloader`` and ``test_dataloader``.
        dataset: A dataset config in the place of the training set; its own ``pipeline`` is not used.
        pipeline: Transforms in the place of the test pipeline.

    Raises:
        ConfigError: There is no dataset or no pipeline in the config, or a type or argument in it is unknown.
        DataError: The files are missing or are those of the test or validation set.
    """
    if dataset is None:
        dataset = _dataset_of(cfg, 'train_dataloader')
    if dataset is None:
        raise ConfigError('expected train_dataloader.dataset or calibration.dataset, but the config has neither')
    sources = _unwrap(dataset)
    _refuse_test_files(cfg, sources)
    if pipeline is None:
        pipeline = _test_pipeline(cfg)
    pipeline = annotations_first(pipeline)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    return [_build({**copy.deepcopy(dict(source)), 'pipeline': copy.deepcopy(pipeline)}) for source in sources]


def describe_location(source: Mapping[str, Any]) -> str:
    """Names the files of a dataset config for an error message."""
    return ', '.join(_locations(source)) or _type_name(source)


def _dataset_of(cfg: Config, loader: str) -> dict[str, Any] | None:
    dataset: dict[str, Any] | None = (cfg.get(loader) or {}).get('dataset')
    return dataset


def _type_name(source: Mapping[str, Any]) -> str:
    kind = source.get('type')
    return kind if isinstance(kind, str) else getattr(kind, '__name__', 'dataset')


def _unwrap(dataset: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Takes wrappers off; the order is that of the config."""
    if 'datasets' in dataset:
        return [leaf for part in dataset['datasets'] for leaf in _unwrap(part)]
    if 'dataset' not in dataset:
        return [dataset]
    if _type_name(dataset).endswith('KFoldDataset'):
        raise ConfigError('expected a training set in files of its own, but got KFoldDataset; set calibration.dataset')
    return _unwrap(dataset['dataset'])


def _test_pipeline(cfg: Config) -> list[Any]:
    for loader in ('test_dataloader', 'val_dataloader'):
        for source in _unwrap(_dataset_of(cfg, loader) or {}):
            if source.get('pipeline'):
                return list(source['pipeline'])
    raise DataError(
        'expected the pipeline of calibration images in test_dataloader.dataset or calibration.pipeline, '
        'but the config has neither'
    )


def _refuse_test_files(cfg: Config, sources: list[Mapping[str, Any]]) -> None:
    for loader in ('test_dataloader', 'val_dataloader'):
        for held_out in _unwrap(_dataset_of(cfg, loader) or {}):
            for source in sources:
                if held_out and _chosen_files(held_out) == _chosen_files(source):
                    raise DataError(
                        f'expected calibration images from the training set, but got those of {loader}: '
                        f'{describe_location(source)}'
                    )


def _chosen_files(source: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """What chooses the files of a dataset: its paths, and options such as ``split``."""
    paths = [os.path.realpath(path) for path in _locations(source)]
    options = {key: value for key, value in source.items() if key not in _SAME_FILES and value is not None}
    return paths, options


def _locations(source: Mapping[str, Any]) -> list[str]:
    """Folders and annotation file as the dataset will join them, else the root; paths of a remote store as they are."""
    root = source.get('data_root') or ''
    prefix = source.get('data_prefix') or {}
    parts = [*(prefix.values() if isinstance(prefix, Mapping) else [prefix]), source.get('ann_file') or '']
    return [os.path.join(root, part) for part in parts if part] or [root] * bool(root)


def _build(source: dict[str, Any]) -> Any:
    """Builds one dataset and reads its list of images."""
    where = describe_location(source)
    try:
        dataset = DATASETS.build(source)
        if hasattr(dataset, 'full_init'):
            dataset.full_init()
    except MMBrecqError:
        raise
    except Exception as error:  # each dataset has its own way to say that files are missing
        raise _explain(error, source, where) from error
    if len(dataset) == 0:
        raise DataError(f'no images found in {where}')
    return dataset


def _explain(error: Exception, source: dict[str, Any], where: str) -> MMBrecqError:
    message = last_line(error)
    unknown_type = isinstance(error, KeyError) and 'is not in the' in message
    if unknown_type or (isinstance(error, TypeError) and 'argument' in message):
        return ConfigError(f'the dataset of calibration images cannot be built: {explain_build_error(error)}')
    missing = [path for path in _locations(source) if '://' not in path and not Path(path).exists()]
    if missing:
        return DataError(f'{missing[0]} does not exist, but the images of {_type_name(source)} are expected there')
    # mmengine packs the list of images into one array, and NumPy has no array of none
    if isinstance(error, ValueError) and 'need at least one array' in message:
        return DataError(f'no images found in {where}')
    return explain_data_error(error) or DataError(
        f'{_type_name(source)} cannot read {where}: {type(error).__name__}: {message}'
    )


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
