"""PVT and PVTv2 as backbones for OpenMMLab: importing this package registers them."""

import warnings

from ._install import check_requirements, register_config_packages

check_requirements()
with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')  # mmengine's import
    register_config_packages()

from .checkpoint import CheckpointMismatchError, convert_checkpoint  # noqa: E402
from .hooks import NonFiniteHook, PVTCheckpointHook  # noqa: E402
from .optim import PVTOptimWrapperConstructor  # noqa: E402
from .pvt import PVT  # noqa: E402
from .pvt_v2 import PVTv2  # noqa: E402
from .resume import ResumableBatchSampler, ResumableCheckpointHook  # noqa: E402
from .swap import swap_backbone  # noqa: E402
from .version import __version__  # noqa: E402

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
