"""Builds registered types and dataclasses of options from configs; every error lists what is valid."""

import difflib
import inspect
import os
import re
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import mmengine.registry
from mmengine.registry import Registry

from mmbrecq.errors import ConfigError

T = TypeVar('T')

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_UNKNOWN_TYPE = re.compile(r'(\S+) is not in the (?:(\w+)::)?([\w -]+?) registry')


def build(registry: Registry, cfg: Any, **defaults: Any) -> Any:
    """Builds ``cfg['type']`` with the other keys of ``cfg`` as keywords.

    Args:
        registry: Where the type is registered.
        cfg (dict): Holds ``type``, a registered name or a class; it is not changed.
        **defaults: Keywords for the type that ``cfg`` does not name.

    Raises:
        ConfigError: If ``cfg`` is not a dict, has no ``type`` or an unknown one, names an option that the type does
            not have, or lacks one that it needs.

    Example:
        >>> from mmbrecq.registry import OBSERVERS
        >>> from mmbrecq.qtype import QType
        >>> build(OBSERVERS, {'type': 'PercentileObserver', 'percentile': 99.0}, qtype=QType(8)).percentile
        99.0
    """
    if not isinstance(cfg, dict):
        raise ConfigError(f'expected the config of {_a(registry)} to be a dict, but got {cfg!r}')
    if 'type' not in cfg:
        raise ConfigError(f"expected the config of {_a(registry)} to have the key 'type', but got {dict(cfg)}")
    kind = cfg['type']
    cls = registry.get(kind) if isinstance(kind, str) else kind
    if not callable(cls):
        valid = ', '.join(sorted(registry.module_dict)) or 'none are registered'
        raise ConfigError(f'unknown {registry.name} type {kind!r}: expected one of {valid}')
    given = {key: value for key, value in cfg.items() if key not in ('type', '_scope_')}
    check_options(cls, cls.__name__, given, tuple(defaults))
    # not registry.build: it would look for the type in the scope of the config's model first, and warn
    return cls(**{**defaults, **given})


def _a(registry: Registry) -> str:
    return f'{"an" if registry.name[0] in "aeiou" else "a"} {registry.name}'


def parse_options(cls: type[T], values: Any, where: str, **defaults: Any) -> T:
    """Builds a dataclass of options from a config dict.

    Args:
        cls: The dataclass.
        values (dict): Options by name.
        where: Path of the dict in the config, for messages.
        **defaults: Options that ``values`` need not name.

    Raises:
        ConfigError: If ``values`` is not a dict, names an option that there is not, or lacks one that is needed.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f'expected {where} to be a dict, but got {values!r}')
    check_options(cls, where, values)
    return cls(**{**defaults, **values})


def check_options(cls: Any, owner: str, given: Mapping[str, Any], supplied: tuple[str, ...] = ()) -> None:
    """Refuses options that ``cls`` does not have or that are of another type, and the lack of what it needs."""
    parameters = inspect.signature(cls).parameters.values()
    named = {parameter.name: parameter for parameter in parameters if parameter.kind in _NAMED}
    unknown = sorted(set(given) - set(named))
    if unknown and all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
        valid = ' or '.join(name for name in named if name not in supplied) or 'no option at all'
        raise ConfigError(f'unknown option {unknown[0]!r} of {owner}: expected {valid}')
    hints = _hints(cls)
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in given and name not in supplied:
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
    """Returns whether a value is of a type hint; numbers have ranges, which their owners check."""
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


def expect(valid: bool, what: str, value: Any) -> None:
    """Raises ConfigError, which says that ``what`` was expected and which ``value`` was given, unless it is valid."""
    if not valid:
        raise ConfigError(f'expected {what}, but got {value!r}')


def check_integer(value: Any, least: int, where: str) -> None:
    """Raises ConfigError unless ``value``, the option ``where``, is an integer of at least ``least``."""
    expect(type(value) is int and value >= least, f'{where} to be an integer >= {least}', value)


def check_number(value: Any, interval: str, where: str) -> None:
    """Raises ConfigError unless ``value``, the option ``where``, is a number in an interval such as ``'[0, 1)'``."""
    low, high = map(float, interval[1:-1].split(','))
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    excluded = [end for end, bracket in ((low, interval[0]), (high, interval[-1])) if bracket in '()']
    expect(valid and value not in excluded, f'{where} to be a number in {interval}', value)


def explain_build_error(error: BaseException) -> str:
    """Describes in one line an error of one of mmengine's registries, or of the constructor that it called.

    The line names the valid types for an unknown one, the closest if they are more than 30; otherwise it is the
    error's own text.
    """
    # a KeyError shows the repr of its text
    text = ' '.join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    match = _UNKNOWN_TYPE.search(text)
    name, scope, kind = match.groups() if match else ('', '', '')
    # types that a config may name without a scope when `scope` is the current one
    found = [r for r in _registries() if r.name == kind and r.scope in (scope, 'mmengine')]
    names = sorted({n for r in found for n in r.module_dict})
    if names:
        closest = difflib.get_close_matches(name, names, n=5, cutoff=0)
        valid = names if len(names) <= 30 else [f'{len(names)}', f'the closest are {closest[0]}', *closest[1:]]
        return f"unknown {kind} type '{name}': expected one of {', '.join(valid)}"
    if text:
        return text
    # a bare `assert` of a model says nothing of itself
    frames = traceback.extract_tb(error.__traceback__)
    return f'{type(error).__name__} at {frames[-1].line!r} in {frames[-1].name}' if frames else type(error).__name__


def _registries() -> Iterator[Registry]:
    """Yields the roots of mmengine and all below them."""
    stack = [value for value in vars(mmengine.registry).values() if isinstance(value, Registry)]
    while stack:
        registry = stack.pop()
        stack += registry.children.values()
        yield registry
