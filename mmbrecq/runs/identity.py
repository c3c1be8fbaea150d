"""What the result of a run depends on, so that it is not gone on with as another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

IGNORED = frozenset({
    # where a run writes, how it is started, what it shows
    'work_dir', 'launcher', 'resume', 'log_level', 'log_processor', 'visualizer', 'vis_backends', 'env_cfg',
    'default_hooks', 'custom_hooks', 'randomness', 'cfg', 'default_scope',
    'experiment_name',
    # what follows the reconstruction, and may be asked for later
    'evaluations', 'exporters',
    # training
    'train_cfg', 'val_cfg', 'test_cfg', 'val_dataloader', 'val_evaluator', 'optim_wrapper', 'param_scheduler',
    'auto_scale_lr', 'load_from',
    # known by their weights, not by their path
    'float_checkpoint',
})  # fmt: skip
"""Keys of a config, at its top, that change no figure of the units."""

RESOURCES = frozenset({'cache', 'memory_limit', 'num_workers', 'persistent_workers', 'pin_memory', 'prefetch_factor'})
"""Keys anywhere below that say with what means, not what is computed."""


def describe_config(cfg: Mapping[str, Any]) -> dict[str, str]:
    """Every setting that counts, by its path in the config, in the config's words."""
    return {path: value for key in cfg if key not in IGNORED for path, value in _leaves(key, cfg[key])}


def first_difference(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """The first setting that differs, in words; None where none does."""
    for key in dict.fromkeys([*now, *before]):
        if before.get(key) != now.get(key):
            return f'{key} was {before.get(key, "not set")} and is {now.get(key, "not set")} now'
    return None


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key in value:
            if key not in RESOURCES:
                yield from _leaves(f'{path}.{key}', value[key])
    elif isinstance(value, (list, tuple)) and value:
        for index, item in enumerate(value):
            yield from _leaves(f'{path}[{index}]', item)
    else:
        yield path, repr(value)
