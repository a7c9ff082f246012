"""What mmengine lacks on today's PyTorch: safe reading, launches on CPUs, bf16 on a CPU.

``build_runner`` calls ``setup``. A script that builds its own Runner or inferencer calls it too::

    pvt_mm.runtime.setup(cfg)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.utils import digit_version

from pvt_mm.checkpoint.loaders import register_safe_reading
from pvt_mm.checkpoint.safe_load import read_checkpoint
from pvt_mm.config import iter_dicts, type_name
from pvt_mm.engine.distributed import check_launcher, launch_gloo, shutdown_distributed
from pvt_mm.errors import UserError

__all__ = ['UserError', 'read_checkpoint', 'setup', 'shutdown_distributed']


def setup(cfg: Config | None = None) -> None:
    """Make mmengine read files safely and run without CUDA.

    Without ``cfg``, checkpoints, pickles and YAML are read safely from now on, and nothing else
    changes. With it, data that would still be read unsafely are refused. Without CUDA, the config
    is also adapted in place: ``SyncBN`` becomes ``BN``, mixed precision runs in bf16, and a
    distributed launch uses gloo.

    Args:
        cfg: The config that a Runner will be built from.

    Raises:
        UserError: Where data may run code, or the launcher has not started this process.
    """
    register_safe_reading()
    if cfg is not None:
        if cfg.get('launcher', 'none') != 'none':
            check_launcher(cfg.launcher)
        _refuse_unsafe_data(cfg._cfg_dict)
    if cfg is not None and not torch.cuda.is_available():
        _adapt_to_cpu(cfg)


# Data


def _refuse_unsafe_data(cfg: Any) -> None:
    """Refuse files that mmseg and mmdet unpickle themselves, without mmengine's readers.

    The config is checked, because other processes do the reading.
    """
    for node in iter_dicts(cfg):
        if node.get('decode_backend') == 'pickle':
            raise UserError(
                f"{node.get('type')} with decode_backend='pickle' would run code that an image "
                "file may hold; save the arrays with numpy.save and set decode_backend='numpy'."
            )
        if 'OpenImagesChallenge' in str(node.get('type')) and node.get('hierarchy_file'):
            _refuse_pickled_array(node.get('data_root') or '', node['hierarchy_file'])


def _refuse_pickled_array(root: str, name: str) -> None:
    file = Path(root, name)
    try:
        if '://' in root + name:
            raise ValueError('it is not on this machine')
        np.load(file, allow_pickle=False)
    except FileNotFoundError:
        return  # check_data reports it
    except (ValueError, EOFError, OSError) as error:
        raise UserError(
            f'{file} may run code when it is read ({error}); have a local file, written by '
            'numpy.save from an array of numbers.'
        ) from error


# CPU


def _adapt_to_cpu(cfg: Config) -> None:
    for node in iter_dicts(cfg._cfg_dict):
        if type_name(node) in ('SyncBN', 'MMSyncBN'):
            node['type'] = 'BN'
    cfg.pop('sync_bn', None)  # it would turn BN into SyncBN
    wrapper = cfg.get('optim_wrapper')
    if wrapper and wrapper.get('type') == 'AmpOptimWrapper':
        _compute_in_bf16(cfg)
    if wrapper and wrapper.get('optimizer', {}).get('fused') and not _fuses_on_cpu():
        wrapper.optimizer['fused'] = False
    if cfg.get('launcher', 'none') != 'none':
        launch_gloo(cfg)


def _fuses_on_cpu() -> bool:
    """Tell whether PyTorch has fused optimisers for the CPU: from 2.4 on."""
    return digit_version(torch.__version__.split('+')[0]) >= digit_version('2.4.0')


def _compute_in_bf16(cfg: Config) -> None:
    """Turn mixed precision, which mmengine has for GPUs only, into bf16 in every PVT.

    Necks and heads stay in fp32: mmcv's RoIAlign and NMS have no bf16 on a CPU. bf16 has the range
    of fp32 and needs no loss scaling.
    """
    backbones = [
        node
        for node in iter_dicts(cfg._cfg_dict.get('model'))
        if type_name(node) in ('PVT', 'PVTv2')
    ]
    if not backbones:
        raise UserError(
            'Mixed precision without CUDA runs in the PVT alone, and this config has none; '
            'train without --amp, or with optim_wrapper.type=OptimWrapper.'
        )
    print_log('No CUDA: mixed precision runs in bf16, in the backbone alone.', logger='current')
    for backbone in backbones:
        backbone['compute_dtype'] = 'bfloat16'
    cfg.optim_wrapper['type'] = 'OptimWrapper'
    for key in ('loss_scale', 'dtype', 'use_fsdp'):
        cfg.optim_wrapper.pop(key, None)
