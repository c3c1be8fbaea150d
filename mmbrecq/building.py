"""Builds registered types and dataclasses of options from configs, with errors that say what is valid."""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from mmengine.registry import Registry

from mmbrecq.errors import ConfigError

T = TypeVar('T')


def build(registry: Registry, cfg: Any, **defaults: Any) -> Any:
    """Builds ``cfg['type']`` with the other keys of ``cfg`` as keywords.

    Args:
        registry: Where the type is registered.
        cfg (dict): Holds ``type``, a registered name or a class; it is not changed.
        **defaults: Keywords for the type that ``cfg`` does not name.

    Returns:
        The instance.

    Raises:
        ConfigError: If ``cfg`` is not a dict, has no ``type`` or an unknown one, names an option that the type does
            not have, or lacks one that it needs.
    """
    if not isinstance(cfg, dict):
        raise ConfigError(f'expected the config of {_a(registry)} to be a dict, but got {cfg!r}')
    if 'type' not in cfg:
        raise ConfigError(f"expected the config of {_a(registry)} to have the key 'type', but got {dict(cfg)}")
    cls = find(registry, cfg['type'])
    given = {key: value for key, value in cfg.items() if key not in ('type', '_scope_')}
    _check_options(cls, cls.__name__, given, defaults)
    # not registry.build: it would look for the type in the scope of the config's model first, and warn
    return cls(**{**defaults, **given})


def find(registry: Registry, name: Any) -> Any:
    """Returns the class or function that ``registry`` knows as ``name``.

    Raises:
        ConfigError: If there is none.
    """
    if not isinstance(name, str):
        if callable(name):
            return name
        raise ConfigError(f'expected the type of {_a(registry)} to be a name or a class, but got {name!r}')
    found = registry.get(name)
    if found is None:
        valid = ', '.join(sorted(registry.module_dict)) or 'none are registered'
        raise ConfigError(f'unknown {registry.name} type {name!r}: expected one of {valid}')
    return found


def _a(registry: Registry) -> str:
    """What the registry holds, with its article."""
    return f'{"an" if registry.name[0] in "aeiou" else "a"} {registry.name}'


def parse_options(cls: type[T], values: Any, where: str, beside: Any = None, **defaults: Any) -> T:
    """Builds a dataclass of options from a config dict.

    Args:
        cls: The dataclass.
        values (dict): Options by name.
        where: Path of the dict in the config, for messages.
        beside: Another dataclass whose options stand in the same dict; they are left alone.
        **defaults: Options that ``values`` need not name.

    Raises:
        ConfigError: If ``values`` is not a dict, names an option that there is not, lacks one that is needed,
            or has one of another type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f'expected {where} to be a dict, but got {values!r}')
    others = () if beside is None else tuple(inspect.signature(beside).parameters)
    _check_options(cls, where, values, others=others)
    return cls(**{**defaults, **{key: values[key] for key in values if key not in others}})


def _check_options(
    cls: Any, owner: str, given: Mapping[str, Any], supplied: Iterable[str] = (), others: Iterable[str] = ()
) -> None:
    """Refuses options that ``cls`` does not have or that are of another type, and the lack of what it needs."""
    parameters = inspect.signature(cls).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    unknown = sorted(set(given) - {*named, *others})
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        valid = ' or '.join([*(name for name in named if name not in supplied), *others]) or 'no option at all'
        raise ConfigError(f'unknown option {unknown[0]!r} of {owner}: expected {valid}')
    hints = _hints(cls)
    for name, parameter in named.items():
        if parameter.default is inspect.Parameter.empty and name not in given and name not in supplied:
            raise ConfigError(f'expected option {name!r} of {owner}, but it was not given')
        hint = hints.get(name, Any)
        if name in given and not _fits(hint, given[name]):
            raise ConfigError(f'expected option {name!r} of {owner} to be {_in_words(hint)}, but got {given[name]!r}')


def _hints(cls: Any) -> dict[str, Any]:
    try:
        return get_type_hints(cls.__init__ if inspect.isclass(cls) else cls)
    except (NameError, TypeError):  # of a user's class, whose names are for type checkers alone
        return {}


_WORDS: dict[Any, str] = {
    **dict.fromkeys((Mapping, dict), 'a dict'), **dict.fromkeys((Sequence, list), 'a list'),
    bool: 'True or False', str: 'a string', types.NoneType: 'None',
}  # fmt: skip


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is of a type hint; numbers have ranges, which their owners check."""
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in (types.UnionType, Union):
        return any(_fits(arg, value) for arg in args)
    if origin in (Sequence, list):
        return isinstance(value, (list, tuple)) and all(_fits(args[0], item) for item in value if args)
    if origin is str:
        return isinstance(value, (str, os.PathLike))
    # any word is true in Python, 'False' too
    return not inspect.isclass(origin) or origin not in _WORDS or isinstance(value, origin)


def _in_words(hint: Any) -> str:
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in (types.UnionType, Union):
        return ' or '.join(map(_in_words, args))
    inner = get_origin(args[0]) or args[0] if args and origin in (Sequence, list) else None
    return f'{_WORDS[origin]}{f", each item {_WORDS[inner]}" if inner in _WORDS else ""}'
