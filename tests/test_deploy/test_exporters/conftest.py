"""Lets the tests of this folder import ``small_models`` of the graph's tests: the folders are no packages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / 'test_graph'))


@pytest.fixture(scope='session', autouse=True)
def no_usage_reports() -> Iterator[None]:
    """``openvino.convert_model`` reports its use over the network, and waits; not where it believes to be in CI."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CI', 'true')
        yield
