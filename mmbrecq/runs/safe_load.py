"""Reading checkpoint files without running what they contain.

A checkpoint is a pickle, and a pickle may call any function. Files are loaded with ``weights_only=True``, always;
what mmengine's training loop puts beside the weights (a message hub of history buffers, NumPy scalars) is let in by
an allow-list. The pickle of a history buffer asks for ``getattr``, to name the buffer's statistics: it gets a stand-in
that gives those names of that class and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer

from mmbrecq.dependencies import require
from mmbrecq.errors import CheckpointError, first_line

# NumPy 2 renamed numpy.core, and warns of the old name
_numpy_core: Any = import_module('numpy._core.multiarray' if np.__version__ >= '2' else 'numpy.core.multiarray')
_STATISTICS = ('min', 'max', 'current', 'mean')
# Every fixed-size dtype; the object dtype, which may hold anything, stays out
_NUMPY_TYPE_CODES = '?bhilqBHILQefdgFDGSUMm'
# torch's words for a refused global, from 2.1 on
_REFUSED = re.compile(r"(?:GLOBAL |Unsupported class |Can only (?:build|create) .* got <class ')([\w.]+)")


def read_checkpoint(path_or_url: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, running none of the code that it may contain.

    Args:
        path_or_url: A file of torch or of safetensors, or an http(s) URL; a download is kept where ``torch.hub`` and
            mmengine keep theirs.

    Returns:
        The dict that the file holds: ``state_dict`` and ``meta``, or the bare weights. History buffers of a message
        hub come without the statistics that a user registered.

    Raises:
        CheckpointError: The file is missing, cannot be downloaded, is truncated or no checkpoint, or names a global
            outside the allow-list.
        DependencyError: The file is of safetensors, and the package is not installed.
    """
    path = _local_file(str(path_or_url))
    if _is_safetensors(path):
        return _read_safetensors(path)
    try:
        with _allowed_globals():
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # bytes that are no pickle break the reader in many ways
        raise CheckpointError(_explain(error, path)) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'expected {path} to hold a dict of weights, but got {type(checkpoint).__name__}')
    return checkpoint


def _is_safetensors(path: Path) -> bool:
    """Whether a file is in safetensors' format: the length of its header in 8 bytes, then a header in JSON."""
    with path.open('rb') as file:
        return path.suffix == '.safetensors' or file.read(9)[8:] == b'{'


def _read_safetensors(path: Path) -> dict[str, Any]:
    require('safetensors')
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except Exception as error:  # the package's own type, and torch's for dtypes that it does not know
        size = path.stat().st_size
        raise CheckpointError(
            f'checkpoint {path} ({size} bytes) is truncated or not of safetensors: {first_line(error)}'
        ) from error


def _local_file(path_or_url: str) -> Path:
    if path_or_url.startswith(('http://', 'https://')):
        return _download(path_or_url)
    path = Path(path_or_url).expanduser()
    if not path.is_file():
        what = 'is a folder' if path.is_dir() else 'does not exist'
        raise CheckpointError(f'checkpoint {path} {what}; expected a file or an http(s) URL')
    return path


def _download(url: str) -> Path:
    path = Path(torch.hub.get_dir(), 'checkpoints', os.path.basename(urlparse(url).path))
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=os.isatty(2))
        except Exception as error:  # URLError, HTTPException, timeouts, a full disk: all end the same way
            raise CheckpointError(f'cannot download {url} to {path}: {_told(error)}') from error
    return path


def _explain(error: Exception, path: Path) -> str:
    """Puts a failure of ``torch.load`` into one sentence."""
    refused = _REFUSED.search(str(error))
    if refused is None:
        return (
            f'checkpoint {path} ({path.stat().st_size} bytes) is truncated or no checkpoint: torch.load says '
            f'{type(error).__name__}: {_told(error)}'
        )
    if not hasattr(torch.serialization, 'add_safe_globals'):
        return (
            f'checkpoint {path} asks for {refused[1]}, which torch {torch.__version__} cannot load safely: '
            'use torch >= 2.4, or keep only state_dict and meta in the file'
        )
    return f'checkpoint {path} asks for {refused[1]}, which is not on the list of safe types: the file was refused'


def _told(error: Exception) -> str:
    # torch puts two paragraphs of advice, one of them to switch the check off, before what the unpickler met
    _, found, told = str(error).partition('WeightsUnpickler error: ')
    return first_line(UnpicklingError(told) if found else error)


@contextlib.contextmanager
def _allowed_globals() -> Iterator[None]:
    """Widens torch's list of safe globals inside the block, and puts it back."""
    serialization: Any = torch.serialization
    if hasattr(serialization, 'safe_globals'):
        with serialization.safe_globals(_ALLOWED):
            yield
    elif hasattr(serialization, 'add_safe_globals'):  # torch 2.4
        before = serialization.get_safe_globals()
        serialization.add_safe_globals(_ALLOWED)
        try:
            yield
        finally:
            serialization.clear_safe_globals()
            serialization.add_safe_globals(before)
    else:  # torch < 2.4 has no public list: plain weights load, all else is refused by name
        yield


def _called(full_name: str, target: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``target`` under the name by which a pickle asks for it; torch finds what is allowed by that name."""

    def stand_in(*args: Any) -> Any:
        return target(*args)

    stand_in.__module__, _, stand_in.__name__ = full_name.rpartition('.')
    stand_in.__qualname__ = stand_in.__name__
    return stand_in


def _set_numbers(buffer: Any, state: dict[str, Any]) -> None:
    """A buffer's ``__setstate__`` that leaves the class's table of statistics alone; mmengine's takes the file's."""
    buffer._set_default_statistics()
    for name in ('max_length', '_log_history', '_count_history'):
        setattr(buffer, name, state[name])


_SafeHistoryBuffer: Any = type(
    HistoryBuffer.__name__,
    (HistoryBuffer,),
    {'__module__': HistoryBuffer.__module__, '__setstate__': _set_numbers},
)


def _statistic(owner: Any, name: Any) -> Any:
    """The ``getattr`` that files get.

    Raises:
        UnpicklingError: The attribute asked for is not a statistic of a history buffer.
    """
    if owner is not _SafeHistoryBuffer or name not in _STATISTICS:
        raise UnpicklingError(f'GLOBAL builtins.getattr was asked for {name!r} of {owner!r}')
    return getattr(HistoryBuffer, name)


_ALLOWED: list[Any] = [
    _SafeHistoryBuffer,
    ConfigDict,
    defaultdict,
    dict,  # the factory of a defaultdict
    list,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in _NUMPY_TYPE_CODES},
    # Python 3 writes builtins as __builtin__ in torch's pickle protocol; older torch looks it up as written
    *(_called(f'{module}.getattr', _statistic) for module in ('builtins', '__builtin__')),
    # Files of NumPy 1 and of NumPy 2 are about
    *(
        _called(f'{module}.multiarray.{function}', getattr(_numpy_core, function))
        for module in ('numpy.core', 'numpy._core')
        for function in ('scalar', '_reconstruct')
    ),
]
