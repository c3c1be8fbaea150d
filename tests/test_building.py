from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from mmengine.config import ConfigDict
from mmengine.registry import METRICS, TRANSFORMS, DefaultScope, Registry

from mmbrecq.building import build, check_number, explain_build_error, parse_options
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
        ({'type': 3}, r'unknown tool type 3: expected one of Bare, Box, Hammer'),
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


def test_build_refuses_a_scope_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match='unknown tool type'):
        build(TOOLS, {'type': 'nowhere.at.all.Hammer'})


@dataclass(frozen=True)
class Handle:
    length: int
    round: bool = True
    spares: Sequence[Mapping[str, int]] | None = None
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Head:
    weight: float = 1.0


@pytest.mark.parametrize(
    ('interval', 'inside', 'outside'),
    [
        ('[0, 1)', [0, 0.5], [-1e-9, 1, float('nan'), '0.5', None, True]),
        ('(0, inf]', [1e-9, 3, float('inf')], [0, -1]),
        ('(0, inf)', [7.5], [0, float('inf')]),
    ],
)
def test_numbers_of_an_interval(interval: str, inside: list[Any], outside: list[Any]) -> None:
    for value in inside:
        check_number(value, interval, 'share')
    for value in outside:
        with pytest.raises(ConfigError, match=rf'^expected share to be a number in {re.escape(interval)}, but got '):
            check_number(value, interval, 'share')


def test_options_of_a_dataclass() -> None:
    assert parse_options(Handle, {'length': 3}, 'tool') == Handle(3)
    assert parse_options(Head, {}, 'tool', weight=4.0) == Head(4.0)
    assert parse_options(Head, {'weight': 5.0}, 'tool', weight=4.0) == Head(5.0)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (4, 'expected tool.handle to be a dict, but got 4'),
        ({'lenght': 3}, "unknown option 'lenght' of tool.handle: expected length or round or spares or names"),
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
        parse_options(Handle, values, 'tool.handle')


CHILD = Registry('metric', parent=METRICS, scope='buildtest', locations=[])
LARGE = Registry('transform', parent=TRANSFORMS, scope='buildtest', locations=[])


@CHILD.register_module()
class Sharpness:
    def __init__(self, radius: int, *, edges: bool = False, **kwargs: Any) -> None:
        if kwargs:
            raise TypeError(f"Sharpness.__init__() got an unexpected keyword argument '{next(iter(kwargs))}'")
        assert radius > 0
        raise ValueError('radius is\n  too large')


for number in range(40):
    LARGE.register_module(name=f'Transform{number}', module=type(f'Transform{number}', (), {}))


def explained(registry: Registry, **cfg: Any) -> str:
    with DefaultScope.overwrite_default_scope('buildtest'), pytest.raises(Exception) as caught:
        registry.build(cfg)
    return explain_build_error(caught.value)


def test_unknown_type_lists_those_of_the_scope_and_of_mmengine() -> None:
    text = explained(METRICS, type='Sharpnes')
    start, _, listed = text.partition(': expected one of ')
    assert start == "unknown metric type 'Sharpnes'"
    assert listed.split(', ') == sorted({*CHILD.module_dict, *METRICS.module_dict})


def test_unknown_type_among_many_gives_the_closest() -> None:
    count = len({*LARGE.module_dict, *TRANSFORMS.module_dict})
    expected = f"unknown transform type 'Transform39x': expected one of {count}, the closest are Transform39, "
    assert count > 30
    text = explained(TRANSFORMS, type='Transform39x')
    assert text.startswith(expected)


def test_an_unknown_option_is_named_with_its_class() -> None:
    text = explained(METRICS, type='Sharpness', radius=1, colour='red')
    assert text == "Sharpness.__init__() got an unexpected keyword argument 'colour'"


def test_other_words_stay_in_one_line() -> None:
    assert explained(METRICS, type='Sharpness', radius=1).endswith('radius is too large')
    assert explain_build_error(KeyError('no depth 19')) == 'no depth 19'
    assert explain_build_error(RuntimeError()) == 'RuntimeError'


def test_a_bare_assertion_shows_itself() -> None:
    with pytest.raises(AssertionError) as caught:
        Sharpness(radius=0)
    caught.value.args = ()
    assert explain_build_error(caught.value) == "AssertionError at 'assert radius > 0' in __init__"
