"""What mmengine lacks on today's PyTorch: safe checkpoints, CPU launches, bf16 on a CPU.

One line in a script of one's own does what the bundled tools do::

    pvt_mm.runtime.setup(cfg)
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner.checkpoint import CheckpointLoader

from .nests import dicts


class UserError(Exception):
    """Bad input: one sentence that says what is wrong and the way out."""


def setup(cfg: Config | None = None) -> None:
    """Make mmengine read checkpoints safely and run without CUDA.

    Without ``cfg`` it makes checkpoint loading safe, nothing else. With it, a config about to be
    run is adapted in place where there is no CUDA: ``SyncBN`` becomes ``BN``, mixed precision runs
    in bf16, and a distributed launch talks over gloo.

    Args:
        cfg: The config that a Runner will be built from.

    Raises:
        UserError: Where the launcher cannot start without CUDA.
    """
    _register_safe_loading()
    if cfg is not None and not torch.cuda.is_available():
        _adapt_to_cpu(cfg)


# Checkpoints


def _statistics(owner: Any, name: str) -> Any:
    """Answer the attributes that mmengine's log buffers name in a checkpoint, and no others.

    The real ``getattr`` would let a file walk from any object to any function.
    """
    if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f'a checkpoint may not read {owner!r}.{name}')


def safe_globals() -> list[Any]:
    """Return what a training checkpoint of mmengine names beyond tensors, for torch's allow-list.

    NumPy 1 and 2 keep the same functions in different modules, and files written under one are read
    under the other, so both names are registered.
    """
    functions: list[Any] = [np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]]
    dtypes = {type(np.dtype(kind)) for kind in ('f4', 'f8', 'i4', 'i8', 'u1', 'b1')}
    both = [
        (function, f'numpy.{core}.multiarray.{function.__name__}')
        for function in functions
        for core in ('core', '_core')
    ]
    return [(_statistics, 'builtins.getattr'), HistoryBuffer, np.ndarray, np.dtype, *dtypes, *both]


def read_checkpoint(path: str | Path, map_location: Any = 'cpu') -> dict[str, Any]:
    """Read a checkpoint file without running any code that it may hold.

    Args:
        path: A ``.pth`` or ``.safetensors`` file.
        map_location: As in :func:`torch.load`.

    Raises:
        UserError: Where the file is missing, damaged, no checkpoint, or wants to run code.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f'There is no checkpoint {file}; check the path.')
    if file.stat().st_size == 0:
        raise UserError(f'The checkpoint {file} is empty; download or copy it again.')
    if file.suffix == '.safetensors':
        return _read_safetensors(file, map_location)
    try:
        checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f'The checkpoint {file} was refused: {_reason(error)}.') from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0].rstrip('.') if str(error) else type(error).__name__
        raise UserError(
            f'The checkpoint {file} is damaged or no checkpoint ({reason}); get it again.'
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(
            f'The checkpoint {file} holds a {type(checkpoint).__name__}, not a dict of tensors.'
        )
    return checkpoint


def _read_safetensors(file: Path, map_location: Any) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f'Reading {file} needs a package: pip install safetensors.') from error
    device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
    try:
        return load_file(file, device=str(device))
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0].rstrip('.')
        raise UserError(
            f'The checkpoint {file} is damaged or no checkpoint ({reason}); get it again.'
        ) from error


def _reason(error: pickle.UnpicklingError) -> str:
    """Pick from PyTorch's long advice the line that names what the file wanted."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = ('GLOBAL', 'Unsupported', 'may not read')
    telling = [line for line in lines if any(word in line for word in words)]
    return (telling or lines or ['it is no PyTorch file'])[0].split('. ')[0].rstrip('.')


def _load_url(url: str, map_location: Any = None, progress: bool = True) -> dict[str, Any]:
    """Fetch a URL into torch.hub's cache, checked by the hash in its name if any, and read it."""
    name = url.rsplit('/', 1)[-1]
    file = Path(torch.hub.get_dir()) / 'checkpoints' / name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        digest = torch.hub.HASH_REGEX.search(name)
        try:
            torch.hub.download_url_to_file(
                url, str(file), digest.group(1) if digest else None, progress=progress
            )
        except (OSError, RuntimeError) as error:
            raise UserError(
                f'Could not fetch {url} ({error}); fetch it elsewhere and put it at {file}.'
            ) from error
    return read_checkpoint(file, map_location)


def _load_file(filename: str, map_location: Any = None) -> dict[str, Any]:
    return read_checkpoint(os.path.expanduser(filename), map_location)


def _register_safe_loading() -> None:
    add_safe_globals = getattr(torch.serialization, 'add_safe_globals', None)
    if add_safe_globals is not None:  # PyTorch >= 2.4
        add_safe_globals(safe_globals())
    CheckpointLoader.register_scheme(prefixes='', loader=_load_file, force=True)
    CheckpointLoader.register_scheme(('http://', 'https://'), loader=_load_url, force=True)


# CPU


def _adapt_to_cpu(cfg: Config) -> None:
    for node in dicts(cfg._cfg_dict):
        if node.get('type') in ('SyncBN', 'mmseg.SyncBN'):
            node['type'] = 'BN'
    wrapper = cfg.get('optim_wrapper')
    if wrapper and wrapper.get('type') == 'AmpOptimWrapper':
        _compute_in_bf16(cfg)
    if cfg.get('launcher', 'none') != 'none':
        _launch_gloo(cfg)


def _compute_in_bf16(cfg: Config) -> None:
    """Turn mixed precision, which mmengine has for GPUs only, into bf16 in every PVT.

    Necks and heads stay in fp32: mmcv's RoIAlign and NMS have no bf16 on a CPU. bf16 has the range
    of fp32, so no loss is scaled.
    """
    backbones = [
        node
        for node in dicts(cfg._cfg_dict.get('model'))
        if str(node.get('type')).rpartition('.')[2] in ('PVT', 'PVTv2')
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


def _launch_gloo(cfg: Config) -> None:
    """Start the process group here, since mmengine's own start calls CUDA."""
    if cfg.launcher != 'pytorch':
        raise UserError(
            f'--launcher {cfg.launcher} needs CUDA; without it, launch with tools/dist_train.sh or '
            'tools/dist_test.sh, which use torchrun.'
        )
    if not torch.distributed.is_initialized():
        if os.environ.get('WORLD_SIZE') == os.environ.get('LOCAL_WORLD_SIZE'):
            # One machine: gloo need not look up the machine's name, which may lead nowhere.
            os.environ.setdefault('GLOO_SOCKET_IFNAME', _loopback())
        torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='SharedStatisticsHook')]


def _loopback() -> str:
    return next(name for _, name in socket.if_nameindex() if name.startswith('lo'))


def leave_together() -> None:
    """End a distributed run in step, as the last act of a process.

    A rank that ends first breaks the others' connections. Over gloo it does not return: what gloo's
    threads do while the interpreter takes itself apart now and then aborts a process whose work
    is done.
    """
    if not torch.distributed.is_initialized():
        return
    torch.distributed.barrier()
    if torch.distributed.get_backend() == 'gloo':
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    torch.distributed.destroy_process_group()
