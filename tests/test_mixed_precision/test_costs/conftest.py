"""Lets the tests of this folder import ``small_models`` of the graph's tests: the folders are no packages."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / 'test_graph'))
