"""Lets the tests of this folder and of the reconstruction import ``small_grids``: the folders are no packages."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
