"""From a config file to a runner, with errors in one sentence."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmbrecq.calibration.data_errors import explain_data_error
from mmbrecq.errors import ConfigError, MMBrecqError

KEYS = ('float_checkpoint', 'quantizer', 'reconstructor', 'calibration', 'exporters', 'evaluations', 'seed')
"""Top-level keys of a config that are mmbrecq's own."""

NEEDED = ('float_checkpoint', 'quantizer', 'reconstructor', 'calibration')


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that all tools share."""
    parser.add_argument('--work-dir', help='folder for results and logs; never emptied (default: work_dirs/CONFIG)')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
        help='override keys of the config, for example quantizer.weight.bits=4 or seed=1',
    )  # fmt: skip
    parser.add_argument(
        '--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none', help='job launcher (default: none)'
    )


def load_config(path: str, options: dict[str, Any] | None, work_dir: str | None) -> Config:
    """Reads a config file.

    Raises:
        ConfigError: It is missing, does not parse, lacks a key, or has one that looks like a misspelt one.
    """
    if not Path(path).is_file():
        raise ConfigError(f'{path}: expected a config file, but there is none')
    try:
        cfg = Config.fromfile(path)
        if options:
            cfg.merge_from_dict(options)
    except Exception as error:
        text = str(error).strip() or repr(error)
        raise ConfigError(f'{path}: the config cannot be read: {" ".join(text.split())}') from error
    for key in cfg:
        close = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8)
        if key not in KEYS and close:
            raise ConfigError(f"{path}: unknown key '{key}', did you mean '{close[0]}'?")
    missing = [key for key in NEEDED if key not in cfg]
    if missing:
        raise ConfigError(f"{path}: expected the key '{missing[0]}', but the config has none")
    cfg.work_dir = work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(path).stem)
    cfg.randomness = {'seed': int(cfg.get('seed', 0))}
    return cfg


def resolve_checkpoint(checkpoint: str, config: str) -> str:
    """A path below the working directory or beside the config file, or a URL as it is."""
    if '://' in checkpoint or os.path.exists(checkpoint):
        return checkpoint
    beside = Path(config).parent / checkpoint
    return str(beside) if beside.exists() else checkpoint


def build_runner(cfg: Config, path: str, loop: dict[str, Any]) -> Runner:
    """A runner whose test loop is ``loop``; nothing for training is built.

    Raises:
        ConfigError: A type or an argument is unknown.
        DataError: The test data is missing.
    """
    runner_cfg = cfg.copy()
    for phase in ('train', 'val'):
        for part in ('dataloader', 'cfg', 'evaluator'):
            if f'{phase}_{part}' in runner_cfg:
                runner_cfg[f'{phase}_{part}'] = None
    for part in ('optim_wrapper', 'param_scheduler', 'load_from'):
        if part in runner_cfg:
            runner_cfg[part] = None
    runner_cfg.resume = False
    runner_cfg.test_cfg = loop
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    try:
        runner = Runner.from_cfg(runner_cfg)
        # the loop draws calibration images from the training data, which the runner itself is not to build
        runner.cfg = cfg
        runner._test_loop = runner.build_test_loop(loop)
    except MMBrecqError:
        raise
    except Exception as error:
        explained = explain_data_error(error)
        if explained is not None:
            raise explained from error
        raise ConfigError(f'{path}: {" ".join(str(error).split())}') from error
    return runner


def run_tool(main: Callable[[], None]) -> int:
    """Runs a tool; returns its exit status. What a user can mend is one sentence and status 2, Ctrl-C is 130."""
    try:
        main()
    except MMBrecqError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except OSError as error:
        print(f'error: {error.filename or "a file"} cannot be used: {error.strerror}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted: what was saved so far is in the work dir', file=sys.stderr)
        return 130
    return 0
