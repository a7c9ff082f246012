"""What pvt_mm needs beside it, and how mmengine finds the configs that pvt_mm carries."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

# Two sets of distributions provide the same modules: OpenMMLab's own and the maintained fork.
_PROVIDERS = {
    'torch': ('torch',),
    'mmengine': ('mmengine', 'mmengine-lite', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'mmcv-lite', 'mmcv-full', 'onedl-mmcv'),
}
_OLDEST = {'torch': '2.1', 'mmengine': '0.10', 'mmcv': '2.0'}
#: The distribution of each module: that of OpenMMLab, that of the fork.
_DISTRIBUTIONS = {
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
}


def check_requirements() -> None:
    """Fail early, in one sentence, where PyTorch or mmengine is missing or one of them too old.

    The backbones need no mmcv; where there is one, as detectors and segmentors want it, its age
    counts too. Versions come from the metadata of the distributions: nothing heavy is imported.

    Raises:
        ImportError: Naming each package at fault and the command that installs it.
    """
    faults, commands = [], []
    for module, oldest in _OLDEST.items():
        found = _found_version(module)
        if found is None and module == 'mmcv':
            continue
        if found is None or _release(found) < _release(oldest):
            faults.append(f'{module}>={oldest} ({found or "not"} installed)')
            commands.append(_command(module))
    if not _is_onedl() and find_spec('pkg_resources') is None:
        # mmengine asks it at run time where a package lies; newer setuptools do not have it.
        faults.append('pkg_resources (not installed; mmengine imports it)')
        commands.append("pip install 'setuptools<81'")
    if faults:
        raise ImportError(f'pvt_mm needs {" and ".join(faults)}; run: {" && ".join(commands)}')


def _command(module: str) -> str:
    if module == 'torch':
        return f"pip install 'torch>={_OLDEST[module]}'"
    if module == 'mmcv':  # it is compiled
        tools = "pip install 'setuptools<81' ninja wheel"
        return f'{tools} && pip install {pinned(module)} --no-build-isolation'
    return f'pip install {pinned(module)}'


def pinned(module: str) -> str:
    """Return the requirement, such as ``mmdet==3.3.0``, that pvt_mm's configs are made for.

    The pins are in pvt_mm's own metadata, as extras. A source tree on PYTHONPATH has no metadata:
    there the requirement has no version.
    """
    distribution = _DISTRIBUTIONS[module][_is_onedl()]
    try:
        lines = requires('pvt-mm') or []
    except PackageNotFoundError:
        lines = []
    for line in lines:
        requirement = line.partition(';')[0].strip()
        if re.split('[^a-z-]', requirement)[0] == distribution:
            return requirement
    return distribution


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
    return any(_installed(fork) for _, fork in _DISTRIBUTIONS.values())


def _release(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version, which all bounds here need."""
    return tuple(int(number) for number in re.findall(r'\d+', text)[:2])
