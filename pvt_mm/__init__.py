"""PVT and PVTv2 as backbones for OpenMMLab: importing this package registers them."""

import os
import warnings

from pvt_mm.requirements import check_requirements, register_config_packages

# OpenMP reads it when PyTorch is loaded. Its threads would spin while they wait for each other, and
# on a machine with other work to do they would take most of its time.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
check_requirements()
with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')  # mmengine's import
    register_config_packages()

from pvt_mm import _moved  # noqa: E402, F401
from pvt_mm.apis.swap import swap_backbone  # noqa: E402
from pvt_mm.checkpoint import convert_checkpoint  # noqa: E402
from pvt_mm.engine import (  # noqa: E402
    NonFiniteHook,
    PVTCheckpointHook,
    PVTOptimWrapperConstructor,
    ResumableBatchSampler,
    ResumableCheckpointHook,
)
from pvt_mm.errors import CheckpointMismatchError  # noqa: E402
from pvt_mm.models import PVT, PVTv2  # noqa: E402
from pvt_mm.version import __version__  # noqa: E402

__all__ = [
    'PVT',
    'CheckpointMismatchError',
    'NonFiniteHook',
    'PVTCheckpointHook',
    'PVTOptimWrapperConstructor',
    'PVTv2',
    'ResumableBatchSampler',
    'ResumableCheckpointHook',
    '__version__',
    'convert_checkpoint',
    'swap_backbone',
]
