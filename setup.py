"""Packaging, by OpenMMLab's conventions: requirements in files, the mm* packages in an extra."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Reads ``__version__`` without importing the package, which needs torch."""
    text = (ROOT / 'mmbrecq' / 'version.py').read_text(encoding='utf-8')
    match = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    assert match, 'mmbrecq/version.py has no __version__'
    return match[1]


def read_requirements(name: str) -> list[str]:
    """Reads ``requirements/<name>.txt`` without its comments."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8').splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith('#')]


def read_readme() -> str:
    """Reads the README, empty in a checkout that has none."""
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.exists() else ''


def copy_mim_files() -> None:
    """Copies configs, tools and the model index into ``mmbrecq/.mim``, where OpenMIM looks for them when installed."""
    target = ROOT / 'mmbrecq' / '.mim'
    for name in ('configs', 'tools'):
        shutil.copytree(
            ROOT / name, target / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns('__pycache__', 'work_dirs')
        )
    shutil.copy(ROOT / 'model-index.yml', target)


if __name__ == '__main__':
    # An editable install finds both in the checkout
    if {'sdist', 'bdist_wheel'} & set(sys.argv):
        copy_mim_files()
    extras = {name: read_requirements(name) for name in ('mim', 'deploy', 'demo', 'search', 'tests')}
    setup(
        name='mmbrecq',
        version=read_version(),
        description='Post-training quantization by block reconstruction (BRECQ) for OpenMMLab',
        long_description=read_readme(),
        long_description_content_type='text/markdown',
        license='Apache-2.0',
        classifiers=[
            'Development Status :: 3 - Alpha',
            'License :: OSI Approved :: Apache Software License',
            'Programming Language :: Python :: 3',
            'Topic :: Scientific/Engineering :: Artificial Intelligence',
        ],
        packages=find_packages(include=['mmbrecq', 'mmbrecq.*']),
        package_data={'mmbrecq': ['.mim/**/*', 'kernels/*.c', 'report/templates/*']},
        python_requires='>=3.10',
        install_requires=read_requirements('runtime'),
        extras_require={**extras, 'all': sorted({line for lines in extras.values() for line in lines})},
        zip_safe=False,
    )
