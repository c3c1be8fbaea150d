"""Builds registered types from configs, with errors that say what is valid."""

from __future__ import annotations

import inspect
from typing import Any

from mmengine.registry import Registry

from mmbrecq.errors import ConfigError


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
    given = {key for key in cfg if key not in ('type', '_scope_')}
    _check_options(cls, given, set(defaults))
    # not registry.build: it would look for the type in the scope of the config's model first, and warn
    return cls(**{**defaults, **{key: cfg[key] for key in given}})


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


def _check_options(cls: Any, given: set[str], defaults: set[str]) -> None:
    """Refuses options that ``cls`` does not have, and the lack of those that it needs."""
    parameters = inspect.signature(cls).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    unknown = sorted(given - set(named))
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        valid = ' or '.join(name for name in named if name not in defaults) or 'no option at all'
        raise ConfigError(f'unknown option {unknown[0]!r} of {cls.__name__}: expected {valid}')
    missing = [
        name
        for name, parameter in named.items()
        if parameter.default is inspect.Parameter.empty and name not in given | defaults
    ]
    if missing:
        raise ConfigError(f'expected option {missing[0]!r} of {cls.__name__}, but it was not given')
