"""Post-training quantization by block reconstruction (BRECQ), for any torch model and for OpenMMLab's."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmbrecq.version import __version__

if TYPE_CHECKING:
    from mmbrecq.api import Quantized, load, quantize

__all__ = ['Quantized', '__version__', 'load', 'quantize']


def __getattr__(name: str) -> Any:
    """Imports the public API on first use, so that importing the package costs nothing and needs nothing."""
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module('mmbrecq.api'), name)
