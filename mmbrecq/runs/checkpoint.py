"""Weights from a checkpoint file into a model: all of them fit, or one sentence says what does not."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from mmbrecq.errors import CheckpointError, NonFiniteError
from mmbrecq.qtype import QType
from mmbrecq.runs.safe_load import read_checkpoint

_PREPROCESSOR = 'data_preprocessor.'
_BATCH_COUNT = 'num_batches_tracked'


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
