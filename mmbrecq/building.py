"""Builds registered types and dataclasses of options from configs, with errors that say what is valid."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

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
        ConfigError: If ``values`` is not a dict, names an option that there is not, or lacks one that is needed.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f'expected {where} to be a dict, but got {values!r}')
    others = () if beside is None else tuple(inspect.signature(beside).parameters)
    _check_options(cls, where, values, others=others)
    return cls(**{**defaults, **{key: values[key] for key in values if key not in others}})


def _check_options(
    cls: Any, owner: str, given: Mapping[str, Any], supplied: Iterable[str] = (), others: Iterable[str] = ()
) -> None:
    """Refuses options that ``cls`` does not have, switches that are no bool, and the lack of what it needs."""
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
    for name, parameter in named.items():
        if parameter.default is inspect.Parameter.empty and name not in given and name not in supplied:
            raise ConfigError(f'expected option {name!r} of {owner}, but it was not given')
        # any word is true in Python, 'False' too
        if name in given and parameter.annotation in (bool, 'bool') and type(given[name]) is not bool:
            raise ConfigError(f'expected option {name!r} of {owner} to be True or False, but got {given[name]!r}')
