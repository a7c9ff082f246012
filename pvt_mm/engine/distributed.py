"""Start and end several processes without CUDA."""

from __future__ import annotations

import logging
import os
import socket
import sys

import torch
from mmengine.config import Config

from pvt_mm.errors import UserError


def launch_gloo(cfg: Config) -> None:
    """Start the process group, and adapt a config to it: mmengine's own start calls CUDA.

    Raises:
        UserError: Where the launcher needs CUDA.
    """
    if cfg.launcher != 'pytorch':
        raise UserError(
            f'--launcher {cfg.launcher} needs CUDA; without it, launch with tools/dist_train.sh or '
            'tools/dist_test.sh, which use torchrun.'
        )
    if not torch.distributed.is_initialized():
        if os.environ.get('WORLD_SIZE') == os.environ.get('LOCAL_WORLD_SIZE'):
            # One machine: gloo need not look its name up, which may not resolve.
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


def shutdown_distributed() -> None:
    """End all ranks together, as the last call of a process; over gloo it does not return.

    A rank that ends first breaks the connections of the others. The threads of gloo now and then
    abort a process while Python shuts down, so that it is ended here at once.
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
