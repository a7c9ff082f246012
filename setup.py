"""Builds the pvt-mm distribution; the settings of the development tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version():
    """The version, without importing the package and with it PyTorch."""
    text = (ROOT / 'pvt_mm' / 'version.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '(.+)'$", text, re.MULTILINE).group(1)


def read_pins(stack):
    """The pinned requirements of one stack, comments left out."""
    lines = (ROOT / 'requirements' / f'{stack}.txt').read_text(encoding='utf-8').splitlines()
    return [line for line in lines if line and not line.startswith('#')]


def read_description():
    """README.md, where there is one."""
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.exists() else ''


setup(
    name='pvt-mm',
    version=read_version(),
    description='Pyramid Vision Transformers (PVT, PVT v2) as OpenMMLab backbones',
    long_description=read_description(),
    long_description_content_type='text/markdown',
    author='The pvt_mm authors',
    license='Apache-2.0',
    license_files=['LICENSE'],
    classifiers=[
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    python_requires='>=3.10',
    install_requires=['torch>=2.1', 'numpy'],
    # Both stacks provide the same modules, so neither can be a hard requirement.
    extras_require={stack: read_pins(stack) for stack in ('openmmlab', 'onedl')},
    packages=find_packages(include=['pvt_mm', 'pvt_mm.*']),
    # pvt_mm/.mim, where OpenMMLab's tools look, holds links to the folders at the root.
    include_package_data=False,
    package_data={
        'pvt_mm': [
            '.mim/*.yml',
            '.mim/configs/**/*.py',
            '.mim/configs/**/*.yml',
            '.mim/tools/*.py',
            '.mim/tools/*.sh',
        ]
    },
    exclude_package_data={'pvt_mm': ['.mim/tools/install.sh']},
    zip_safe=False,
)
