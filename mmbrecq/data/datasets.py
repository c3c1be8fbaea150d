"""Registers mmbrecq's own datasets where mmpretrain, whose dataset they extend, is installed."""

from importlib.util import find_spec

from mmbrecq.dependencies import require

# The registry imports this package for users of mmdet alone, too
if find_spec('mmpretrain') is not None:
    require('mmpretrain')
    import mmbrecq.data.digits  # noqa: F401 - which registers itself
