from __future__ import annotations

import pytest

from mmbrecq.errors import first_line


@pytest.mark.parametrize(
    ('text', 'line'),
    [
        ('\n  one.\ntwo', 'one'),
        ('Exception from src/core.cpp:90:\nCheck \'x\' failed at y.cpp:3:\nUnable to read the model', 'Unable to read the model'),  # noqa: E501
        ('Check failed', 'Check failed'),
        ('', 'RuntimeError'),
    ],
)  # fmt: skip
def test_first_line(text: str, line: str) -> None:
    assert first_line(RuntimeError(text)) == line


def test_an_error_without_text_tells_where_it_was_raised() -> None:
    with pytest.raises(AssertionError) as raised:
        raise AssertionError
    line = raised.value.__traceback__.tb_lineno  # type: ignore[union-attr]
    assert first_line(raised.value) == f'AssertionError in test_errors.py, line {line}'
