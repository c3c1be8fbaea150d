"""Lets the tests of this folder import ``graphs``: the folder is no package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope='session', autouse=True)
def no_usage_reports() -> Iterator[None]:
    """``openvino.convert_model`` reports its use over the network, and waits; not where it believes to be in CI."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CI', 'true')
        yield
