from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest

from mmbrecq import dependencies
from mmbrecq.dependencies import NEEDED, OPTIONAL, check_dependencies, require


def fake(monkeypatch: pytest.MonkeyPatch, name: str, version: object) -> ModuleType:
    module = ModuleType(name)
    if version is not None:
        module.__version__ = version
    monkeypatch.setitem(sys.modules, name, module)
    return module


# First, last and first refused of each range, with the suffixes that builds carry
@pytest.mark.parametrize(
    ('name', 'version'),
    [
        ('torch', '2.6.0'),
        ('torch', '2.11.0+cu130'),
        ('torch', '2.7.0a0+git1234567'),
        ('mmengine', '0.10.0'),
        ('mmengine', '0.11.0rc1'),
        ('mmcv', '2.0.0'),
        ('mmcv', '2.1.99'),
        ('mmpretrain', '1.2.0'),
        ('mmdet', '3.3.0'),
        ('sklearn', '1.9.1'),
        ('openvino', '2026.4.1-22982-e213a147257-releases/2026/4'),
    ],
)
def test_accepts_version(monkeypatch, name, version):
    module = fake(monkeypatch, name, version)
    assert require(name) is module


@pytest.mark.parametrize(
    ('name', 'version', 'expected'),
    [
        ('torch', '2.5.1+cpu', '>=2.6'),
        ('mmengine', '0.9.1', '>=0.10,<1'),
        ('mmengine', '1.0.0', '>=0.10,<1'),
        ('mmcv', '1.7.2', '>=2.0,<2.2'),
        ('mmcv', '2.2.0', '>=2.0,<2.2'),
        ('mmpretrain', '2.0.0', '>=1.0,<2'),
        ('mmdet', '2.28.2', '>=3.0,<4'),
        ('mmdet', 'unreleased', '>=3.0,<4'),
    ],
)
def test_refuses_version(monkeypatch, name, version, expected):
    fake(monkeypatch, name, version)
    install = (NEEDED | OPTIONAL)[name][1]
    with pytest.raises(
        ImportError, match=re.escape(f'expected {name}{expected}, but got {version}; ') + '.*: pip'
    ) as info:
        require(name)
    assert str(info.value).endswith(f'install it with: {install}')


def test_refuses_module_without_version(monkeypatch):
    fake(monkeypatch, 'mmcv', None)
    with pytest.raises(ImportError, match='but got a module without a version'):
        require('mmcv')


def test_missing_package(monkeypatch, tmp_path):
    # Nothing can be found on an empty path, whatever is installed here
    monkeypatch.delitem(sys.modules, 'mmdet', raising=False)
    monkeypatch.setattr(sys, 'path', [str(tmp_path)])
    monkeypatch.setattr(sys, 'meta_path', [finder for finder in sys.meta_path if 'editable' not in repr(finder)])
    with pytest.raises(
        ImportError,
        match=re.escape(
            'expected mmdet>=3.0,<4, but mmdet is not installed; install it with: pip install "mmbrecq[mim]"'
        ),
    ):
        require('mmdet')


@pytest.mark.parametrize('body', ['import no_such_module_anywhere', 'raise ImportError("libGL.so.1: cannot open")'])
def test_broken_package_is_not_called_missing(monkeypatch, tmp_path, body):
    (tmp_path / 'mmdet.py').write_text(body)
    monkeypatch.delitem(sys.modules, 'mmdet', raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r'the installed mmdet fails to import: .*(no_such_module_anywhere|libGL)'):
        require('mmdet')


def test_a_package_of_a_users_own_backend():
    with pytest.raises(ImportError, match='^expected tensorflow, but .*; install it with: pip install tensorflow$'):
        require('tensorflow')
    assert require('math').pi > 3


def test_check_names_the_one_that_is_wrong(monkeypatch):
    check_dependencies()
    fake(monkeypatch, 'mmcv', '2.2.0')
    with pytest.raises(ImportError, match='expected mmcv>=2.0,<2.2, but got 2.2.0'):
        check_dependencies()


def test_check_leaves_optional_packages_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(dependencies, 'require', asked.append)
    check_dependencies()
    assert asked == ['torch', 'mmengine', 'mmcv']
