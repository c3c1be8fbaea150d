"""What goes wrong while mmengine's registries build a config, in one sentence that lists what is valid."""

from __future__ import annotations

import difflib
import inspect
import re
import traceback
from collections.abc import Iterator

import mmengine.registry
from mmengine.registry import Registry

_UNKNOWN_TYPE = re.compile(r'(\S+) is not in the (?:(\w+)::)?([\w -]+?) registry')
_UNKNOWN_OPTION = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")
_MOST_LISTED = 30


def explain_build_error(error: BaseException) -> str:
    """One line for an exception that building a config raised.

    Args:
        error: From a registry, or from the constructor of what it built.

    Returns:
        For an unknown type the valid ones, the closest where they are more than 30; for an unknown option the valid
        ones; else the exception's own words.
    """
    # a KeyError shows the repr of its text
    text = ' '.join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if match := _UNKNOWN_TYPE.search(text):
        name, scope, kind = match.groups()
        names = {n for registry in _registries() if registry.name == kind for n in _names(registry, scope)}
        return f"unknown {kind} type '{name}'{_listed(name, names)}"
    if match := _UNKNOWN_OPTION.search(text):
        owner, option = match.groups()
        return f"unknown option '{option}' of {owner}{_listed(option, _options(error, owner))}"
    return text or _where(error)


def _where(error: BaseException) -> str:
    """What a bare ``assert`` of a model says of itself: its source line."""
    frames = traceback.extract_tb(error.__traceback__)
    return f'{type(error).__name__} at {frames[-1].line!r} in {frames[-1].name}' if frames else type(error).__name__


def _listed(name: str, valid: set[str]) -> str:
    if not valid:
        return ''
    if len(valid) <= _MOST_LISTED:
        return f': expected one of {", ".join(sorted(valid))}'
    closest = difflib.get_close_matches(name, sorted(valid), n=5, cutoff=0)
    return f': expected one of {len(valid)}, the closest are {", ".join(closest)}'


def _registries() -> Iterator[Registry]:
    """The roots of mmengine and all below them."""
    stack = [value for value in vars(mmengine.registry).values() if isinstance(value, Registry)]
    while stack:
        registry = stack.pop()
        stack += registry.children.values()
        yield registry


def _names(registry: Registry, scope: str | None) -> set[str]:
    """Types that a config may name without a scope when ``scope`` is the current one."""
    return set(registry.module_dict) if registry.scope in (scope, 'mmengine') else set()


def _options(error: BaseException, owner: str) -> set[str]:
    """Options of the class ``owner`` that was being built when ``error`` came, or of its base of that name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        # so mmengine's build_from_cfg calls it; many packages may have registered a class of this name
        built = frame.f_locals.get('obj_cls')
        for cls in built.__mro__ if inspect.isclass(built) else ():
            if cls.__name__ == owner:
                return {p.name for p in inspect.signature(cls).parameters.values() if p.kind in kinds}
    return set()
