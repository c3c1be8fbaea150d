"""What the result of a run depends on, so that neither it nor its states are continued by another run."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from mmbrecq.data.groups import Images, grouped
from mmbrecq.distributed import gather, hash_of
from mmbrecq.kernels.native import kernel_state

IGNORED = frozenset({
    # where a run writes, how it is started, what it shows
    'work_dir', 'launcher', 'resume', 'log_level', 'log_processor', 'visualizer', 'vis_backends', 'env_cfg',
    'default_hooks', 'custom_hooks', 'randomness', 'cfg', 'default_scope', 'experiment_name',
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
    """Returns every setting that counts, by its path in the config, in the config's words."""
    return {path: value for key in cfg if key not in IGNORED for path, value in _leaves(key, cfg[key])}


def first_difference(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Describes the first setting that differs; None where none does."""
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


def describe_inputs(cfg: Mapping[str, Any], model: nn.Module, images: Images, seed: int) -> dict[str, str]:
    """Returns what states of units depend on: settings in the config's words, weights and images by their hash.

    The bits of layers are no part of it. ``model`` has its float weights and is not prepared yet; ``images`` are the
    preprocessed ones of this process.
    """
    settings = {key: value for key, value in cfg['quantizer'].items() if key != 'overrides'}
    settings['weight'] = {key: value for key, value in settings['weight'].items() if key != 'bits'}
    # of each image, so that it does not depend on how many processes have them
    parts = grouped(images).parts
    own = [hashlib.sha256(image.cpu().numpy().tobytes()).digest() for part in parts for image in part]
    hashes = [digest for part in gather(own) for digest in part]
    return {
        'quantizer': json.dumps(settings, sort_keys=True, default=repr),
        'reconstructor': json.dumps(cfg['reconstructor'], sort_keys=True, default=repr),
        'seed': str(seed),
        # a GPU never runs them
        'kernels': 'none' if parts[0].is_cuda else kernel_state(),
        'float weights': hash_of(model)[:16],
        'calibration images': hashlib.sha256(b''.join(hashes)).hexdigest()[:16],
    }
