"""Converts typed dataclasses to plain JSON values and back, driven by the type hints."""

import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from mmbrecq.building import check_options
from mmbrecq.errors import ConfigError, TableError
from mmbrecq.runs.storage import write_text_atomic

T = TypeVar('T')


def encode(value: Any) -> Any:
    """Returns a dataclass, or a nested collection of them and of plain values, as values of strict JSON.

    NaN and infinities become None, which JSON lacks, and NumPy scalars Python numbers; TypeError for other types.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {' '.join(key) if isinstance(key, tuple) else str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    raise TypeError(f'expected a JSON value, but got {type(value).__name__}')


def decode(hint: Any, value: Any, where: str) -> Any:
    """Returns the value of the type ``hint`` for a JSON value: the inverse of :func:`encode`.

    An absent key has its field's default, so that the file of an unfinished run can be read.
    None for a plain ``float`` is NaN.

    Args:
        hint: A dataclass, ``list[T]``, ``tuple[T, U]``, ``tuple[T, ...]``, ``T | None``, ``str``, ``bool``, ``int``,
            ``float``, ``Any``, or ``dict[K, T]`` with keys ``str``, ``int`` or a tuple of words.
        value: The JSON value.
        where: The key's path, for messages.

    Raises:
        ConfigError: For an unknown key, a missing key without default, or a value of another type.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, Union):
        inner = next(arg for arg in args if arg is not type(None))
        return None if value is None else decode(inner, value, where)
    if is_dataclass(hint):
        return _decode_record(hint, value, where)
    if origin is dict and isinstance(value, Mapping):
        return {_key(args[0], key, where): decode(args[1], item, f'{where}[{key!r}]') for key, item in value.items()}
    if origin in (list, tuple) and isinstance(value, Sequence) and not isinstance(value, str):
        hints = args if origin is tuple and args[-1] is not ... else [args[0]] * len(value)
        if len(hints) == len(value):
            return origin(
                decode(of, item, f'{where}[{i}]') for i, (of, item) in enumerate(zip(hints, value, strict=True))
            )
    if hint is float and value is None:
        return math.nan
    if hint in (int, float) and not isinstance(value, bool) and isinstance(value, Integral if hint is int else Real):
        return hint(value)
    if hint in (str, bool) and isinstance(value, hint):
        return value
    expected = hint.__name__ if origin is None else origin.__name__
    raise ConfigError(f'{where}: expected {expected}, but got {value!r}')


def _key(hint: Any, key: str, where: str) -> Any:
    if hint in (str, int):
        return hint(key)
    words = tuple(key.split(' '))
    if len(words) != len(get_args(hint)):
        raise ConfigError(f'{where}: expected keys of {len(get_args(hint))} words, but got {key!r}')
    return words


def _decode_record(record: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f'{where}: expected dict, but got {value!r}')
    check_options(record, where, value)
    hints = get_type_hints(record)
    return record(**{key: decode(hints[key], item, f'{where}.{key}') for key, item in value.items()})


def save_json(value: Any, path: Path) -> None:
    """Writes a dataclass as JSON, whole or not at all, see :func:`encode`."""
    write_text_atomic(json.dumps(encode(value), indent=1) + '\n', path)


def load_json(cls: type[T], path: Path, writer: str) -> T:
    """Reads what :func:`save_json` wrote; TableError where the file is missing, or not what ``writer`` writes."""
    try:
        found: T = decode(cls, json.loads(path.read_text(encoding='utf-8')), 'content')
    except OSError as error:
        raise TableError(f'{path}: cannot be read: {error.strerror}') from error
    except ValueError as error:
        raise TableError(f'{path}: expected what {writer} writes, but it is not: {error}') from error
    return found
