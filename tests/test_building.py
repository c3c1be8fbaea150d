from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from mmengine.config import ConfigDict
from mmengine.registry import Registry

from mmbrecq.building import build, find, parse_options
from mmbrecq.errors import ConfigError

TOOLS = Registry('tool', scope='mmbrecq_test')


@TOOLS.register_module()
class Hammer:
    def __init__(self, owner: str, weight: float = 1.0) -> None:
        self.owner, self.weight = owner, weight


@TOOLS.register_module()
class Box:
    def __init__(self, **contents: Any) -> None:
        self.contents = contents


@TOOLS.register_module()
class Bare:
    pass


def test_build_passes_options_and_defaults() -> None:
    cfg = {'type': 'Hammer', 'weight': 2.0}
    built = build(TOOLS, cfg, owner='me')
    assert (built.owner, built.weight) == ('me', 2.0)
    assert cfg == {'type': 'Hammer', 'weight': 2.0}


def test_build_prefers_the_config_to_a_default() -> None:
    assert build(TOOLS, {'type': 'Hammer', 'owner': 'you'}, owner='me').owner == 'you'


def test_build_takes_config_dicts_classes_and_free_keywords() -> None:
    assert build(TOOLS, ConfigDict(type='Hammer', owner='me')).owner == 'me'
    assert build(TOOLS, {'type': Hammer, 'owner': 'me'}).owner == 'me'
    assert build(TOOLS, {'type': 'Box', 'anything': 3}).contents == {'anything': 3}


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        ('Hammer', r"expected the config of a tool to be a dict, but got 'Hammer'"),
        ({'weight': 1}, r"to have the key 'type', but got \{'weight': 1\}"),
        ({'type': 'Hamer'}, r"unknown tool type 'Hamer': expected one of Bare, Box, Hammer"),
        ({'type': 3}, r'expected the type of a tool to be a name or a class, but got 3'),
        ({'type': 'Hammer', 'wait': 1}, r"unknown option 'wait' of Hammer: expected weight"),
        ({'type': 'Bare', 'wait': 1}, r"unknown option 'wait' of Bare: expected no option at all"),
    ],
)
def test_build_refuses(cfg: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(TOOLS, cfg, owner='me')


def test_build_names_a_missing_option() -> None:
    with pytest.raises(ConfigError, match=r"expected option 'owner' of Hammer, but it was not given"):
        build(TOOLS, {'type': 'Hammer'})


def test_find_refuses_a_scope_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match='unknown tool type'):
        find(TOOLS, 'nowhere.at.all.Hammer')


@dataclass(frozen=True)
class Handle:
    length: int
    round: bool = True
    spares: Sequence[Mapping[str, int]] | None = None
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Head:
    weight: float = 1.0


def test_options_of_two_dataclasses_stand_side_by_side() -> None:
    values = {'length': 3, 'weight': 2.0}
    assert parse_options(Handle, values, 'tool', beside=Head) == Handle(3)
    assert parse_options(Head, values, 'tool', beside=Handle) == Head(2.0)
    assert parse_options(Head, {}, 'tool', weight=4.0) == Head(4.0)
    assert parse_options(Head, {'weight': 5.0}, 'tool', weight=4.0) == Head(5.0)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (4, 'expected tool.handle to be a dict, but got 4'),
        ({'lenght': 3}, "unknown option 'lenght' of tool.handle: expected length or round or spares or names or w"),
        ({'round': False}, "expected option 'length' of tool.handle, but it was not given"),
        (
            {'length': 3, 'round': 'False'},
            "expected option 'round' of tool.handle to be True or False, but got 'False'",
        ),
        (
            {'length': 3, 'spares': 'abc'},
            "expected option 'spares' of tool.handle to be a list, each item a dict or None, but got 'abc'",
        ),
        (
            {'length': 3, 'spares': [{}, 3]},
            r"expected option 'spares' of tool.handle to be a list, each item a dict or None, but got \[{}, 3\]",
        ),
        (
            {'length': 3, 'names': [3]},
            r"expected option 'names' of tool.handle to be a list, each item a string, but got \[3\]",
        ),
    ],
)
def test_options_that_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f'^{message}'):
        parse_options(Handle, values, 'tool.handle', beside=Head)
