"""Reading checkpoint files without running what they contain.

A checkpoint is a pickle, and a pickle may call any function. Files are loaded with ``weights_only=True``, always; what
mmengine's training loop puts beside the weights (a message hub of history buffers, NumPy scalars) is let in by name,
and none of it is built: a stand-in that keeps nothing takes its place.
"""

import os
import re
from collections import defaultdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlparse

import torch

from mmbrecq.dependencies import require
from mmbrecq.errors import CheckpointError, first_line

# torch's words for a refused global
_REFUSED = re.compile(r'GLOBAL ([\w.]+)')


class Dropped:
    """Stands for an object beside the weights, which is not built."""

    def __init__(self, *args: Any) -> None:
        """Takes what the object would be built from, and keeps nothing of it."""

    def __setstate__(self, state: Any) -> None:
        """Keeps nothing of the object's content."""


_ALLOWED: list[Any] = [
    defaultdict,
    # the factories of a defaultdict
    dict,
    list,
    (dict, 'mmengine.config.config.ConfigDict'),
    *(
        (Dropped, name)
        for name in (
            'mmengine.logging.history_buffer.HistoryBuffer', 'numpy.dtype', 'numpy.ndarray',
            # a history buffer names its statistics by it; Python 3 writes builtins as __builtin__ in torch's protocol
            'builtins.getattr', '__builtin__.getattr',
            # files of NumPy 1 and of NumPy 2 are about
            'numpy.core.multiarray.scalar', 'numpy.core.multiarray._reconstruct',
            'numpy._core.multiarray.scalar', 'numpy._core.multiarray._reconstruct',
        )
    ),
]  # fmt: skip


def read_checkpoint(path_or_url: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, running none of the code that it may contain.

    Args:
        path_or_url: A file of torch or of safetensors, or an http(s) URL; a download is kept where ``torch.hub`` and
            mmengine keep theirs.

    Returns:
        The dict that the file holds: ``state_dict`` and ``meta``, or the bare weights. NumPy's values and the history
        buffers of a message hub are :class:`Dropped`.

    Raises:
        CheckpointError: The file is missing, cannot be downloaded, is truncated or no checkpoint, or names a global
            outside the allow-list.
        DependencyError: The file is of safetensors, and the package is not installed.
    """
    path = _local_file(str(path_or_url))
    if _is_safetensors(path):
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals(_ALLOWED):
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
    if refused is not None:
        return f'checkpoint {path} asks for {refused[1]}, which is not on the list of safe types: the file was refused'
    return (
        f'checkpoint {path} ({path.stat().st_size} bytes) is truncated or no checkpoint: torch.load says '
        f'{type(error).__name__}: {_told(error)}'
    )


def _told(error: Exception) -> str:
    # torch puts two paragraphs of advice, one of them to switch the check off, before what the unpickler met
    _, found, told = str(error).partition('WeightsUnpickler error: ')
    return first_line(UnpicklingError(told) if found else error) if str(error) else type(error).__name__
