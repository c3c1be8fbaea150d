"""Registers mmbrecq's own datasets where mmpretrain, whose dataset they extend, is installed."""

from importlib.util import find_spec

from mmbrecq.dependencies import require

__all__: list[str] = []

# The registry imports this package for users of mmdet alone, too
if find_spec('mmpretrain') is not None:
    require('mmpretrain')
    from mmbrecq.data.digits import DigitsDataset

    __all__ += ['DigitsDataset']
