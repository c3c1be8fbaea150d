"""Reads checkpoint files without running what they contain, and loads weights that all fit, or says what does not.

A checkpoint is a pickle, and a pickle may call any function. Files are loaded with ``weights_only=True``, always; what
mmengine's training loop puts beside the weights (a message hub of history buffers, NumPy scalars) is let in by name,
and none of it is built: a stand-in that keeps nothing takes its place.
"""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from mmbrecq.dependencies import require
from mmbrecq.errors import CheckpointError, NonFiniteError, first_line
from mmbrecq.qtype import QType

_PREPROCESSOR = 'data_preprocessor.'
_BATCH_COUNT = 'num_batches_tracked'
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
    """Returns whether a file is in safetensors' format: the length of its header in 8 bytes, then a header in JSON."""
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


def load_float_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads trained weights into ``model``, on the model's device and in its dtypes.

    The weights are the ``state_dict`` of a file or URL, else its ``model``, else the file itself. Where mmengine's or
    mmcv's ``EMAHook`` ran, these are the averaged weights: the hook swaps the raw ones into ``ema_state_dict`` or, in
    mmcv 1, into the same dict under ``ema_backbone_conv1_weight`` and the like; those are left out.

    Every key must be there and fit, but for two kinds that cannot change an output: ``num_batches_tracked`` of a
    batch norm in evaluation, and all of ``data_preprocessor``, whose mean and std come from the config.

    Raises:
        CheckpointError: The file cannot be read or belongs to another model; the model's weights are then undefined.
        NonFiniteError: A weight in the file is NaN or infinite.
    """
    weights = _weights_of(read_checkpoint(path), path)
    # of DistributedDataParallel
    consume_prefix_in_state_dict_if_present(weights, 'module.')
    own = model.state_dict()
    raw_ema = {f'ema_{name.replace(".", "_")}' for name in own} - own.keys()
    for key in [key for key in weights if key in raw_ema or key.startswith(_PREPROCESSOR)]:
        del weights[key]
    _check_finite(weights, path)
    try:
        # Through the model's own hooks, by which modules adapt the weights of older versions
        missing, unexpected = model.load_state_dict(weights, strict=False)
        misfit = _describe(_that_matter(missing), _that_matter(unexpected))
    except RuntimeError as error:
        misfit = _compare(own, weights, exact=False) or ' '.join(str(error).split())
    if misfit:
        raise CheckpointError(f'{path} does not fit the model: {misfit}')


def load_quantized_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads the ``state_dict`` of a quantized checkpoint: same keys, same shapes, same dtypes, no exception.

    The prepared model is left as it was where the file does not fit.

    Raises:
        CheckpointError: The file cannot be read, or belongs to another model or to other bit-widths.
        NonFiniteError: A weight or a scale in the file is NaN or infinite.
    """
    weights = _weights_of(read_checkpoint(path), path)
    misfit = _compare(model.state_dict(), weights, exact=True)
    if misfit:
        raise CheckpointError(f'{path} does not fit the quantized model: {misfit}')
    _check_finite(weights, path)
    model.load_state_dict(weights, strict=True)


def _compare(own: Mapping[str, Any], weights: Mapping[str, Any], *, exact: bool) -> str:
    """Compares the keys, shapes and, if ``exact``, dtypes of a file with those of a model; see :func:`_describe`."""
    missing, unexpected = [n for n in own if n not in weights], [n for n in weights if n not in own]
    both = {n: (own[n], weights[n]) for n in own if isinstance(own[n], Tensor) and isinstance(weights.get(n), Tensor)}
    shapes = {n: (tuple(a.shape), tuple(b.shape)) for n, (a, b) in both.items() if a.shape != b.shape}
    dtypes = {n: (a.dtype, b.dtype) for n, (a, b) in both.items() if n not in shapes and a.dtype != b.dtype}
    if not exact:
        missing, unexpected, dtypes = _that_matter(missing), _that_matter(unexpected), {}
    return _describe(missing, unexpected, ('shape', shapes), ('dtype', dtypes))


def _describe(
    missing: Sequence[str], unexpected: Sequence[str], *others: tuple[str, Mapping[str, tuple[Any, Any]]]
) -> str:
    """Counts each kind of misfit that occurs and names the first of it; empty where there is none."""
    kinds = (('missing key', missing), ('unexpected key', unexpected))
    parts = [f'{_count(keys, noun)} (first: {_first(keys)})' for noun, keys in kinds if keys]
    for what, found in others:
        for name, (expected, got) in list(found.items())[:1]:
            parts.append(f'{_count(found, "key")} of another {what} (first: {name} expected {expected} but got {got})')
    return ', '.join(parts)


def _that_matter(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if not key.startswith(_PREPROCESSOR) and key.rpartition('.')[2] != _BATCH_COUNT]


def _weights_of(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Finds the weights in a checkpoint; a file that holds none is refused."""
    weights: Any = next((checkpoint[key] for key in ('state_dict', 'model') if key in checkpoint), checkpoint)
    if not isinstance(weights, dict) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f'expected {path} to hold a state_dict, but got the keys {_first(checkpoint)}')
    return weights


def _check_finite(weights: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            count = int((~torch.isfinite(value)).sum())
            raise NonFiniteError(f'{name} in {path} holds {count} non-finite of {value.numel()} values')


def _count(items: Collection[str], noun: str) -> str:
    return f'{len(items)} {noun}{"" if len(items) == 1 else "s"}'


def _first(keys: Iterable[Any]) -> str:
    return ', '.join(str(key) for key in list(keys)[:2]) or 'none'


_WEIGHT = '.parametrizations.weight.0'


def grids_of(model: nn.Module) -> dict[str, str]:
    """Returns the range of the integers of every weight and activation, by the path of its layer or quantizer."""
    grids = {}
    for name, module in model.named_modules():
        qtype = getattr(module, 'qtype', None)
        if isinstance(qtype, QType):
            channels = '' if qtype.ch_axis is None else f' along axis {qtype.ch_axis}'
            grids[name.removesuffix(_WEIGHT)] = f'{qtype.quant_min}..{qtype.quant_max}{channels}'
    return grids


def check_grids(model: nn.Module, grids: Mapping[str, str], path: str) -> None:
    """Raises CheckpointError where ``model`` has other grids than ``grids``, those of the checkpoint ``path``.

    Integers of all bit-widths lie in the same 8-bit containers, so keys, shapes and dtypes alone do not tell.
    """
    own = grids_of(model)
    others = [name for name in own if own[name] != grids.get(name)]
    if others:
        raise CheckpointError(
            f'{path} does not fit the quantizer of the config: {len(others)} of {len(own)} grids differ '
            f"(first: '{others[0]}' expected {own[others[0]]} but got {grids.get(others[0])})"
        )
