"""Reads a config file and builds a runner from it, with errors in one sentence."""

import argparse
import difflib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.config.config import DELETE_KEY
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn

from mmbrecq.building import explain_build_error
from mmbrecq.data.source import explain_data_error
from mmbrecq.distributed import leave_processes
from mmbrecq.errors import ConfigError, MMBrecqError, StorageError
from mmbrecq.progress import without_chatter
from mmbrecq.threads import limit_threads

NEEDED = {
    'float_checkpoint': (str, 'a path or URL'),
    **dict.fromkeys(('quantizer', 'reconstructor', 'calibration'), (Mapping, 'a dict')),
}
KEYS: dict[str, tuple[type, str]] = {
    **NEEDED, **dict.fromkeys(('exporters', 'evaluations'), (Sequence, 'a list')),
    'search': (Mapping, 'a dict'), 'seed': (int, 'an integer'),
}  # fmt: skip
"""Top-level keys of a config that are mmbrecq's own, and what each has to be."""

OTHERS = dict.fromkeys(('model', 'test_dataloader', 'randomness', 'env_cfg'), (Mapping, 'a dict'))


class _Options(DictAction):  # type: ignore[misc]
    """Parses ``KEY=VALUE`` pairs; mmengine's parser fails on values such as ``[dict(a=1, b=2)]``."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for value in values:
            try:
                super().__call__(parser, namespace, [value], option_string)
            except (AssertionError, RecursionError, ValueError) as error:
                raise ConfigError(f"expected --cfg-options as KEY=VALUE or KEY=[A,B], but got '{value}'") from error


class _Threads(argparse.Action):
    """Sets torch's number of threads as soon as it is read."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values < 1:
            raise ConfigError(f'expected --threads of at least 1, but got {values}')
        torch.set_num_threads(values)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that all tools share."""
    parser.add_argument(
        '--threads', type=int, action=_Threads, metavar='N',
        help='threads that compute (default: the processors that the process may use, or OMP_NUM_THREADS)',
    )  # fmt: skip
    parser.add_argument('--work-dir', help='folder for results and logs; never emptied (default: work_dirs/CONFIG)')
    add_cfg_options(parser)
    add_debug(parser)
    parser.add_argument(
        '--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none', help='job launcher (default: none)'
    )


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that :func:`run_tool` reads."""
    parser.add_argument('--debug', action='store_true', help='print the traceback of an error before its sentence')


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that overrides keys of the config."""
    parser.add_argument(
        '--cfg-options', nargs='+', action=_Options, metavar='KEY=VALUE',
        help='override keys of the config, for example quantizer.weight.bits=4 or seed=1',
    )  # fmt: skip


def load_config(path: str, options: dict[str, Any] | None, work_dir: str | None) -> Config:
    """Reads a config file; ConfigError if it is missing, does not parse, lacks a key or has a misspelt one."""
    if not Path(path).is_file():
        raise ConfigError(f'{path}: expected a config file, but there is none')
    try:
        cfg = Config.fromfile(path)
        if options:
            cfg.merge_from_dict(options)
        _drop_delete_keys(cfg._cfg_dict)
    except Exception as error:
        text = str(error).strip() or repr(error)
        raise ConfigError(f'{path}: the config cannot be read: {" ".join(text.split())}') from error
    for key in cfg:
        close = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8)
        if key not in KEYS and close:
            raise ConfigError(f"{path}: unknown key '{key}', did you mean '{close[0]}'?")
    _check_keys(cfg, path)
    cfg.work_dir = work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(path).stem)
    randomness = cfg.get('randomness') or {}
    if randomness.get('diff_rank_seed'):
        raise ConfigError(f'{path}: expected randomness without diff_rank_seed: all processes of a run have one seed')
    seed = cfg.get('seed', randomness.get('seed'))
    cfg.randomness = {**randomness, 'seed': 0 if seed is None else seed}
    return cfg


def _drop_delete_keys(value: Any) -> None:
    """Removes mmengine's ``_delete_``, which stays in values that replace nothing."""
    if isinstance(value, dict):
        # unbound: a ConfigDict's own methods would import what a lazy config names
        dict.pop(value, DELETE_KEY, None)
    for item in dict.values(value) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        _drop_delete_keys(item)


def _check_keys(cfg: Config, path: str) -> None:
    """Refuses a config that lacks a key which every run needs, or has one of the wrong kind."""
    for key in ('model', 'test_dataloader', 'test_evaluator', *NEEDED):
        if cfg.get(key) is None:
            raise ConfigError(f"{path}: expected the key '{key}', but the config has none")
    for key, (kind, meant) in {**KEYS, **OTHERS}.items():
        value = cfg.get(key)
        if key in cfg and (not isinstance(value, kind) or (kind is Sequence and isinstance(value, str))):
            raise ConfigError(f"{path}: expected '{key}' to be {meant}, but got {value!r}")


def resolve_checkpoint(checkpoint: str, config: str) -> str:
    """Returns a path below the working directory or beside the config file, or a URL as it is."""
    if '://' in checkpoint or os.path.exists(checkpoint):
        return checkpoint
    beside = Path(config).parent / checkpoint
    return str(beside) if beside.exists() else checkpoint


class ToolRunner(Runner):
    """A runner that writes environment, config and hooks to the log file alone."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Builds mmengine's logger; it prints warnings alone until :meth:`log_environment`."""
        logger = super().build_logger(*args, **kwargs)
        self._consoles = {h: h.level for h in logger.handlers if type(h) is logging.StreamHandler}
        for handler, level in self._consoles.items():
            handler.setLevel(max(level, logging.WARNING))
        return logger

    def log_environment(self) -> None:
        """Lets the logger print what the config's ``log_level`` asks for."""
        for handler, level in self._consoles.items():
            handler.setLevel(level)

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        """Returns the model on its device, never in DistributedDataParallel, since the model is not trained."""
        return model.to(get_device())

    def dump_config(self) -> None:
        """Writes nothing: the config of an earlier run stays until the loop has checked its input."""


def build_runner(cfg: Config, path: str, loop: dict[str, Any]) -> ToolRunner:
    """Returns a runner whose test loop is ``loop``; nothing for training is built.

    ConfigError names an unknown type or argument, DataError missing data, StorageError a work dir without access.
    """
    runner_cfg = cfg.copy()
    unused = [f'{phase}_{part}' for phase in ('train', 'val') for part in ('dataloader', 'cfg', 'evaluator')]
    for key in (*unused, 'optim_wrapper', 'param_scheduler', 'load_from'):
        if key in runner_cfg:
            runner_cfg[key] = None
    runner_cfg.resume = False
    runner_cfg.test_cfg = loop
    try:
        os.makedirs(cfg.work_dir, exist_ok=True)
    except OSError as error:
        raise StorageError(f'work dir {cfg.work_dir} cannot be made: {error.strerror}') from error
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    try:
        runner = ToolRunner.from_cfg(runner_cfg)
        # the loop draws calibration images from the training data, which the runner itself is not to build
        runner.cfg = cfg
        with without_chatter():
            runner._test_loop = runner.build_test_loop(loop)
    except MMBrecqError:
        raise
    except Exception as error:
        # a file that does not open has a name; a failure to write, such as that of the log, has none
        if isinstance(error, OSError) and error.filename is None and error.strerror:
            raise StorageError(f'cannot write to {cfg.work_dir}: {error.strerror}') from error
        raise explain_data_error(error) or ConfigError(f'{path}: {explain_build_error(error)}') from error
    runner.log_environment()
    return runner


def run_tool(main: Callable[[], int | None], advice: str = '') -> int:
    """Runs a tool; returns its exit status.

    An error that a user can mend is printed as one sentence, after its traceback with ``--debug``, and returns 2.
    Ctrl-C returns 130 and SIGTERM 143, after ``advice`` is printed; finished work is saved then.
    """
    limit_threads()
    signal.signal(signal.SIGTERM, partial(_terminate, os.getpid()))
    # else a log file that cannot be written, on a full disk, fills the terminal with tracebacks
    logging.raiseExceptions = False
    with warnings.catch_warnings():
        # of detectors' operations, when mmpretrain is imported over mmcv-lite
        warnings.filterwarnings('ignore', message='Fail to import ``MultiScaleDeformableAttention``')
        status = 0
        try:
            status = main() or 0
            leave_processes()
        except (Exception, KeyboardInterrupt) as error:
            if _is_interrupt(error):
                print(f'interrupted: what was saved so far is in the work dir{advice}', file=sys.stderr)
                return 143 if _TERMINATED else 130
            if '--debug' in sys.argv:
                traceback.print_exc()
            # processes often fail alike, so the first one's error has no number
            process = os.environ.get('RANK', '0')
            reason = str(error)
            if isinstance(error, OSError) and not isinstance(error, MMBrecqError):
                reason = f'{error.filename or "a file"} cannot be used: {error.strerror or error}'
            elif not isinstance(error, MMBrecqError):
                raise
            print(f'error{"" if process == "0" else f" in process {process}"}: {reason}', file=sys.stderr)
            return 2
        finally:
            logging.raiseExceptions = True
    return status


_TERMINATED: list[int] = []
"""Signals that have ended the work: a library may replace the exception of one by an exception of its own."""


def _terminate(tool: int, number: int, frame: object) -> None:
    """Ends the work as Ctrl-C does; a second signal must not interrupt the writing of files."""
    if os.getpid() != tool:
        # a worker of a data loader, which inherits the handler
        os._exit(128 + number)
    if not _TERMINATED:
        _TERMINATED.append(number)
        raise KeyboardInterrupt


def _is_interrupt(error: BaseException | None) -> bool:
    """Returns whether Ctrl-C caused ``error``: some libraries replace it by an exception of their own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
