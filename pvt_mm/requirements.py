"""What pvt_mm needs beside it, and how mmengine finds the configs that pvt_mm carries."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

# Two sets of distributions provide the same modules: OpenMMLab's own and the maintained fork.
_PROVIDERS = {
    'torch': ('torch',),
    'mmengine': ('mmengine', 'mmengine-lite', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'mmcv-lite', 'mmcv-full', 'onedl-mmcv'),
}
_OLDEST = {'torch': '2.1', 'mmengine': '0.10', 'mmcv': '2.0'}
_TORCH = "pip install 'torch>=2.1'"
_BUILD_TOOLS = "pip install 'setuptools<81' ninja wheel"
_COMMANDS = {
    'openmmlab': {
        'torch': _TORCH,
        'mmengine': 'pip install mmengine==0.10.7',
        'mmcv': f'{_BUILD_TOOLS} && pip install mmcv==2.1.0 --no-build-isolation',
    },
    'onedl': {
        'torch': _TORCH,
        'mmengine': 'pip install onedl-mmengine==0.10.12',
        'mmcv': f'{_BUILD_TOOLS} && pip install onedl-mmcv==2.3.6 --no-build-isolation',
    },
}

_PINS = {
    'openmmlab': {'mmdet': 'mmdet==3.3.0', 'mmseg': 'mmsegmentation==1.2.2'},
    'onedl': {'mmdet': 'onedl-mmdetection==3.5.1', 'mmseg': 'onedl-mmsegmentation==1.4.2'},
}


def check_requirements() -> None:
    """Fail early, in one sentence, where PyTorch, mmengine or mmcv is missing or too old.

    Reads versions from the distributions' metadata, so that nothing heavy is imported here.

    Raises:
        ImportError: naming each part at fault and the command that installs it.
    """
    stack = 'onedl' if _is_onedl() else 'openmmlab'
    faults, commands = [], []
    for module, oldest in _OLDEST.items():
        found = _found_version(module)
        if found is None or _release(found) < _release(oldest):
            faults.append(f'{module}>={oldest} ({found or "not"} installed)')
            commands.append(_COMMANDS[stack][module])
    if stack == 'openmmlab' and find_spec('pkg_resources') is None:
        # mmengine asks it where a package lies, at run time; setuptools itself dropped it.
        faults.append('pkg_resources (not installed; mmengine imports it)')
        commands.append("pip install 'setuptools<81'")
    if faults:
        raise ImportError(f'pvt_mm needs {" and ".join(faults)}; run: {" && ".join(commands)}')


def pinned(module: str) -> str:
    """Return the requirement, such as ``mmdet==3.3.0``, that pvt_mm's configs are made for."""
    return _PINS['onedl' if _is_onedl() else 'openmmlab'][module]


def register_config_packages() -> None:
    """Tell mmengine where configs named `pvt_mm::` lie, and on the fork those named `mmseg::`."""
    from mmengine.config.utils import MODULE2PACKAGE

    # mmengine first takes the value for a distribution, and looks for an editable one's files in
    # site-packages, where they are not. No distribution has a submodule's name, so mmengine falls
    # back on the module itself, whose folder is the package's in every kind of installation.
    MODULE2PACKAGE.setdefault('pvt_mm', 'pvt_mm.version')
    if _installed('onedl-mmsegmentation') and not _installed('mmsegmentation'):
        MODULE2PACKAGE['mmseg'] = 'mmseg'


def _found_version(module: str) -> str | None:
    if find_spec(module) is None:
        return None
    for distribution in _PROVIDERS[module]:
        if _installed(distribution):
            return version(distribution)
    # A source tree on PYTHONPATH has no metadata.
    return import_module(module).__version__


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def _is_onedl() -> bool:
    parts = ('mmengine', 'mmcv', 'mmdetection', 'mmsegmentation')
    return any(_installed(f'onedl-{part}') for part in parts)


def _release(text: str) -> tuple[int, ...]:
    """The first two numbers of a version, which all bounds here need."""
    return tuple(int(number) for number in re.findall(r'\d+', text)[:2])
