"""The config file that a search writes: the config it was asked for, with the bits of every layer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmbrecq.mixed_precision.search.result import SearchResult
from mmbrecq.runs.storage import write_text_atomic

RESULT = 'search.json'
"""File beside the config that has what was chosen, and why."""


def write_bit_config(
    path: Path,
    base: Path,
    float_checkpoint: str,
    result: SearchResult,
    overrides: Sequence[Mapping[str, Any]],
    comment: str,
) -> None:
    """Writes a config that inherits ``base`` and that ``tools/ptq.py`` takes as it is.

    Args:
        path: The file.
        base: The config whose layers the bits are of; named relative to ``path``.
        float_checkpoint: Path from the working directory, or a URL.
        result: What was chosen; it is saved beside the config, as ``search.json``.
        overrides: Those of ``base``, which stay.
        comment: First line of the file.
    """
    inherited = _relative(base, path)
    # a path within a config is looked for beside it, and the new one stands elsewhere
    checkpoint = float_checkpoint if '://' in float_checkpoint else _relative(Path(float_checkpoint), path)
    lines = [f'dict({_arguments(override)})' for override in [*overrides, *result.overrides()]]
    body = ''.join(f'        {line},\n' for line in lines)
    head = f'# {comment}\n_base_ = [{inherited!r}]\nfloat_checkpoint = {checkpoint!r}\n'
    search = f'search = dict(result={RESULT!r})\n'
    result.save(path.with_name(RESULT))
    write_text_atomic(f'{head}quantizer = dict(\n    overrides=[\n{body}    ]\n)\n{search}', path)


def _arguments(override: Mapping[str, Any]) -> str:
    return ', '.join(f'{key}={value!r}' for key, value in override.items())


def _relative(target: Path, path: Path) -> str:
    return os.path.relpath(target.resolve(), path.parent.resolve())
