"""What a registry's exception becomes: the valid types and options with it."""

from __future__ import annotations

from typing import Any

import pytest
from mmengine.registry import METRICS, TRANSFORMS, DefaultScope, Registry

from mmbrecq.build_errors import explain_build_error

CHILD = Registry('metric', parent=METRICS, scope='buildtest', locations=[])
LARGE = Registry('transform', parent=TRANSFORMS, scope='buildtest', locations=[])


@CHILD.register_module()
class Sharpness:
    def __init__(self, radius: int, *, edges: bool = False, **kwargs: Any) -> None:
        if kwargs:
            raise TypeError(f"Sharpness.__init__() got an unexpected keyword argument '{next(iter(kwargs))}'")
        assert radius > 0
        raise ValueError('radius is\n  too large')


@CHILD.register_module()
class Crispness(Sharpness):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


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


def test_unknown_option_lists_the_options() -> None:
    text = explained(METRICS, type='Sharpness', radius=1, colour='red')
    assert text == "unknown option 'colour' of Sharpness: expected one of edges, radius"


def test_the_option_may_be_one_of_a_base_class() -> None:
    text = explained(METRICS, type='Crispness', radius=1, colour='red')
    assert text == "unknown option 'colour' of Sharpness: expected one of edges, radius"


def test_option_of_a_class_that_no_registry_has() -> None:
    error = TypeError("Loader.__init__() got an unexpected keyword argument 'speed'")
    assert explain_build_error(error) == "unknown option 'speed' of Loader"


def test_other_words_stay_in_one_line() -> None:
    assert explained(METRICS, type='Sharpness', radius=1).endswith('radius is too large')
    assert explain_build_error(KeyError('no depth 19')) == 'no depth 19'
    assert explain_build_error(RuntimeError()) == 'RuntimeError'


def test_a_bare_assertion_shows_itself() -> None:
    with pytest.raises(AssertionError) as caught:
        Sharpness(radius=0)
    caught.value.args = ()
    assert explain_build_error(caught.value) == "AssertionError at 'assert radius > 0' in __init__"
