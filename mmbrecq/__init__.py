"""Post-training quantization by block reconstruction (BRECQ) for OpenMMLab."""

from __future__ import annotations

from mmbrecq.dependencies import check_dependencies
from mmbrecq.version import __version__

check_dependencies()

__all__ = ['__version__']
