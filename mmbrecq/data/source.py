"""Builds the dataset of calibration images: the training set's files, read through the test pipeline."""

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from mmbrecq.building import explain_build_error
from mmbrecq.errors import ConfigError, DataError, MMBrecqError

# options of a dataset config that do not choose its files
# fmt: off
_SAME_FILES = frozenset({
    'type', '_scope_', 'pipeline', 'test_mode', 'data_root', 'data_prefix', 'ann_file', 'metainfo', 'filter_cfg',
    'indices', 'serialize_data', 'lazy_init', 'max_refetch', 'backend_args', 'file_client_args', 'extensions',
    'with_label', 'return_classes',
})
_SIGNS = (
    'failed to load image', 'imdecode', 'cannot identify image file', 'Found 0 files in', 'No such file or directory',
    'pipline should not get `None`',
)
# fmt: on
"""Libraries say these of images that are missing or damaged; with the last, in its spelling, mmengine gives one up."""


def build_source_datasets(
    cfg: Config, dataset: dict[str, Any] | None, pipeline: list[Any] | None, for_loss: bool = True
) -> list[Any]:
    """Builds the datasets to draw from; several where the training set is concatenated.

    Wrappers that repeat, re-weight or mix images are removed, since a draw without replacement needs each image once.

    Args:
        cfg: The resolved config, with ``train_dataloader`` and ``test_dataloader``.
        dataset: A dataset config that replaces the training set; its own ``pipeline`` is not used.
        pipeline: Transforms that replace the test pipeline.
        for_loss: Whether annotations are as a task loss wants them, see :func:`annotations_first`, or else as the
            pipeline leaves them for an evaluator.

    Raises:
        ConfigError: There is no dataset or no pipeline in the config, or a type or argument in it is unknown.
        DataError: The files are missing or are those of the test or validation set.
    """
    if dataset is None and (dataset := _dataset_of(cfg, 'train_dataloader')) is None:
        raise ConfigError('expected train_dataloader.dataset or calibration.dataset, but the config has neither')
    sources = _unwrap(dataset)
    _refuse_test_files(cfg, sources)
    pipeline = _test_pipeline(cfg) if pipeline is None else pipeline
    pipeline = annotations_first(pipeline) if for_loss else pipeline
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    return [_build({**copy.deepcopy(dict(source)), 'pipeline': copy.deepcopy(pipeline)}) for source in sources]


def _dataset_of(cfg: Config, loader: str) -> dict[str, Any] | None:
    return (cfg.get(loader) or {}).get('dataset')


def _type_name(cfg: Any) -> str:
    """Returns the type of a dataset or transform; an empty name where there is none."""
    kind = cfg.get('type') if isinstance(cfg, Mapping) else cfg
    return kind if isinstance(kind, str) else getattr(kind, '__name__', '')


def _unwrap(dataset: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the datasets within wrappers, in the order of the config."""
    if 'datasets' in dataset:
        return [leaf for part in dataset['datasets'] for leaf in _unwrap(part)]
    if 'dataset' not in dataset:
        return [dataset]
    if _type_name(dataset).endswith('KFoldDataset'):
        raise ConfigError('expected a training set in files of its own, but got KFoldDataset; set calibration.dataset')
    return _unwrap(dataset['dataset'])


def _held_out(cfg: Config) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the datasets of test and validation, each with the name of its loader."""
    loaders = ('test_dataloader', 'val_dataloader')
    return [(loader, source) for loader in loaders for source in _unwrap(_dataset_of(cfg, loader) or {}) if source]


def _test_pipeline(cfg: Config) -> list[Any]:
    for _, source in _held_out(cfg):
        if source.get('pipeline'):
            return list(source['pipeline'])
    raise DataError(
        'expected the pipeline of calibration images in test_dataloader.dataset or calibration.pipeline, '
        'but the config has neither'
    )


def _refuse_test_files(cfg: Config, sources: list[Mapping[str, Any]]) -> None:
    for loader, held_out in _held_out(cfg):
        for source in sources:
            if _chosen_files(held_out) == _chosen_files(source):
                raise DataError(
                    f'expected calibration images from the training set, but got those of {loader}: {_where(source)}'
                )


def _where(source: Mapping[str, Any]) -> str:
    return ', '.join(_locations(source)) or _type_name(source)


def _chosen_files(source: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Returns the paths of a dataset and options such as ``split``, which together choose its files."""
    paths = [os.path.realpath(path) for path in _locations(source)]
    options = {key: value for key, value in source.items() if key not in _SAME_FILES and value is not None}
    return paths, options


def _locations(source: Mapping[str, Any]) -> list[str]:
    """Returns the folders and the annotation file as the dataset joins them, else the root."""
    root = source.get('data_root') or ''
    prefix = source.get('data_prefix') or {}
    parts = [*(prefix.values() if isinstance(prefix, Mapping) else [prefix]), source.get('ann_file') or '']
    return [os.path.join(root, part) for part in parts if part] or [root] * bool(root)


def _build(source: dict[str, Any]) -> Any:
    """Builds one dataset and reads its list of images."""
    try:
        dataset = DATASETS.build(source)
        if hasattr(dataset, 'full_init'):
            dataset.full_init()
    except MMBrecqError:
        raise
    except Exception as error:  # each dataset has its own way to say that files are missing
        raise _explain(error, source) from error
    if len(dataset) == 0:
        raise DataError(f'no images found in {_where(source)}')
    return dataset


def _explain(error: Exception, source: dict[str, Any]) -> MMBrecqError:
    message, kind = last_line(error), _type_name(source)
    unknown_type = isinstance(error, KeyError) and 'is not in the' in message
    if unknown_type or (isinstance(error, TypeError) and 'argument' in message):
        return ConfigError(f'the dataset of calibration images cannot be built: {explain_build_error(error)}')
    missing = [path for path in _locations(source) if '://' not in path and not Path(path).exists()]
    if missing:
        return DataError(f'{missing[0]} does not exist, but the images of {kind} are expected there')
    # mmengine packs the list of images into one array, and NumPy has no array of none
    if isinstance(error, ValueError) and 'need at least one array' in message:
        return DataError(f'no images found in {_where(source)}')
    return DataError(f'{kind} cannot read {_where(source)}: {type(error).__name__}: {message}')


def annotations_first(pipeline: Sequence[Any]) -> list[Any]:
    """Returns the pipeline with annotations loaded right after the image.

    mmdet's test pipelines load them after the image was resized, as its evaluators want them: in the pixels of the
    file. A task loss needs boxes in the pixels that the network sees. The images are the same either way.
    """
    named = [(_type_name(transform).rpartition('.')[2], transform) for transform in pipeline]
    loads = [transform for name, transform in named if name.startswith('LoadAnnotations')]
    others = [(name, transform) for name, transform in named if not name.startswith('LoadAnnotations')]
    start = max((index + 1 for index, (name, _) in enumerate(others) if name.startswith('LoadImage')), default=0)
    rest = [transform for _, transform in others]
    return [*rest[:start], *loads, *rest[start:]]


def has_annotations(batches: Iterable[Mapping[str, Any]]) -> bool:
    """Returns whether any image has a class label, or an object with its box."""
    samples = (sample for batch in batches for sample in batch['data_samples'])
    return any('gt_label' in sample or len(sample.get('gt_instances', ())) > 0 for sample in samples)


@contextmanager
def explained_data_errors() -> Iterator[None]:
    """Raises what :func:`explain_data_error` makes of an exception within the block, where that is an error."""
    try:
        yield
    except Exception as error:
        explained = explain_data_error(error)
        if explained is None or explained is error:
            raise
        raise explained from error


def explain_data_error(exc: BaseException) -> DataError | None:
    """Returns the error that an exception of a data loader means, None if it is not about missing or bad images."""
    message = last_line(exc)
    if isinstance(exc, DataError):
        return exc if message == str(exc) else DataError(message)
    if isinstance(exc, OSError) and exc.filename is not None:
        return DataError(f'{exc.filename} cannot be read: {exc.strerror}')
    return DataError(f'images cannot be read: {message}') if any(sign in message for sign in _SIGNS) else None


def last_line(exc: BaseException) -> str:
    """Returns the message of ``exc``, or the original message of one from a worker process, which is a traceback."""
    lines = str(exc).strip().splitlines() or [type(exc).__name__]
    if not lines[0].startswith('Caught '):
        return ' '.join(line.strip() for line in lines)
    return re.sub(r'^[\w.]+: ', '', lines[-1].strip())
