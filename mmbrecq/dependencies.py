"""Checks the packages that mmbrecq needs, and their versions.

The mm* packages are no hard requirement of the distribution, as in all of OpenMMLab: ``mmcv`` comes as ``mmcv``, as
``mmcv-lite`` or from a fork of the same import name. So the version is read from the imported module, never from the
metadata of a distribution.
"""

from importlib import import_module
from types import ModuleType

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from mmbrecq.errors import DependencyError

_MIM, _DEPLOY, _SEARCH = (f'pip install "mmbrecq[{extra}]"' for extra in ('mim', 'deploy', 'search'))

# By import name, the accepted versions and the command that installs them. Without these nothing of mmbrecq works:
# checked when it is imported
NEEDED = {
    'torch': ('>=2.6', 'pip install "torch>=2.6"'),
    'mmengine': ('>=0.10,<1', _MIM),
    'mmcv': ('>=2.0,<2.2', _MIM),
}
# Each serves a part of mmbrecq: checked by `require` where that part begins
OPTIONAL = {
    'mmpretrain': ('>=1.0,<2', _MIM),
    'mmdet': ('>=3.0,<4', _MIM),
    'sklearn': ('>=1.0', 'pip install "mmbrecq[demo]"'),
    'onnx': ('>=1.16', _DEPLOY),
    'onnxruntime': ('>=1.18', _DEPLOY),
    'openvino': ('>=2024.4', _DEPLOY),
    'pymoo': ('>=0.6', _SEARCH),
    'scipy': ('>=1.9', _SEARCH),
    'safetensors': ('>=0.4', 'pip install safetensors'),
}


def require(name: str) -> ModuleType:
    """Imports and returns a package; DependencyError if it is missing, broken, or of a version outside of its range."""
    versions, install = (NEEDED | OPTIONAL).get(name, ('', f'pip install {name}'))
    expected, advice = f'expected {name}{versions}', f'install it with: {install}'
    try:
        module = import_module(name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        found = f'{name} is not installed; {advice}' if missing else f'the installed {name} fails to import: {error}'
        raise DependencyError(f'{expected}, but {found}') from error
    version = getattr(module, '__version__', None)
    if versions and not _accepts(versions, version):
        found = 'a module without a version' if version is None else version
        raise DependencyError(f'{expected}, but got {found}; {advice}')
    return module


def check_dependencies() -> None:
    """Imports and checks all of ``NEEDED``; raises DependencyError as ``require`` does."""
    for name in NEEDED:
        require(name)


def _accepts(versions: str, version: str | None) -> bool:
    """Returns whether ``version`` lies in the range ``versions``, builds such as ``2.11.0+cu130`` included."""
    if version is None:
        return False
    try:
        # str: torch.__version__ is a subclass of str with a comparison of its own; openvino's names a branch, too
        return SpecifierSet(versions).contains(Version(str(version).partition('-')[0]), prereleases=True)
    except InvalidVersion:
        return False
