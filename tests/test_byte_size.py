from __future__ import annotations

import re
from typing import Any

import pytest

from mmbrecq.byte_size import parse_bytes, show_bytes
from mmbrecq.errors import ConfigError


@pytest.mark.parametrize(
    ('value', 'expected'),
    [(1, 1), (3 * 10**9, 3 * 10**9), ('2GiB', 2147483648), ('500MB', 500000000), ('1.5 KiB', 1536), (' 7 B ', 7)],
)
def test_sizes(value: Any, expected: int) -> None:
    assert parse_bytes(value, 'memory_limit') == expected


@pytest.mark.parametrize('value', [0, -1, True, 1.5, '', '2', '2 gib', '-2GiB', 'GiB', '0MB', '0.1B', '1e3MB', [1]])
def test_what_is_no_size(value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        parse_bytes(value, 'reconstructor.memory_limit')
    assert str(error.value) == (
        'expected reconstructor.memory_limit to be a number of bytes, or one with a unit of '
        "['B', 'kB', 'MB', 'GB', 'TB', 'KiB', 'MiB', 'GiB', 'TiB'] such as '2GiB', "
        f'but got {value!r}'
    )
    assert re.escape(repr(value)) in re.escape(str(error.value))


@pytest.mark.parametrize(
    ('count', 'text'),
    [
        (0, '0 B'),
        (999, '999 B'),
        (1000, '1.00 kB'),
        (9_996, '10.0 kB'),
        (99_960, '100 kB'),
        (999_499, '999 kB'),
        (999_600, '1.00 MB'),
        (44_730_000, '44.7 MB'),
        (1_240_000_000, '1.24 GB'),
        (2**60, '1152922 TB'),
    ],
)
def test_sizes_in_words(count: int, text: str) -> None:
    assert show_bytes(count) == text
