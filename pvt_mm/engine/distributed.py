"""Start and end several processes without CUDA."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import sys

import torch
from mmengine.config import Config

from pvt_mm.errors import UserError

#: What each launcher puts into the environment of its processes, and how it is started.
_LAUNCHERS = {
    'pytorch': (
        ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'),
        'bash tools/dist_train.sh (testing: tools/dist_test.sh), which uses torchrun',
    ),
    'slurm': (
        ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NODELIST'),
        'bash tools/slurm_train.sh (testing: tools/slurm_test.sh), which uses srun',
    ),
    'mpi': (
        ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
        'mpirun, with MASTER_ADDR set',
    ),
}


def check_launcher(launcher: str) -> None:
    """Check that the launcher of a config has started this process.

    Raises:
        UserError: Where it has not, it needs CUDA, or torchrun has started several processes that
            would not know of each other.
    """
    if launcher == 'none':
        if 'TORCHELASTIC_RUN_ID' in os.environ and os.environ.get('WORLD_SIZE', '1') != '1':
            raise UserError(
                f'torchrun has started {os.environ["WORLD_SIZE"]} processes, but each would run '
                'alone; add --launcher pytorch.'
            )
        return
    if launcher != 'pytorch' and not torch.cuda.is_available():
        raise UserError(
            f'--launcher {launcher} needs CUDA; without it, launch with tools/dist_train.sh or '
            'tools/dist_test.sh, which use torchrun.'
        )
    variables, way = _LAUNCHERS.get(launcher, ((), ''))
    missing = [name for name in variables if name not in os.environ]
    if missing:
        raise UserError(
            f'--launcher {launcher} needs {", ".join(missing)} in the environment, which its '
            f'launcher sets; start with {way}, or leave --launcher out for one process.'
        )


def launch_gloo(cfg: Config) -> None:
    """Start the process group, and adapt a config to it: mmengine's own start calls CUDA.

    Raises:
        UserError: Where the model's wrapper needs CUDA.
    """
    wrapper = dict(cfg.get('model_wrapper_cfg') or {})
    kind = wrapper.setdefault('type', 'MMDistributedDataParallel')
    if 'DistributedDataParallel' not in str(kind):
        raise UserError(
            f'model_wrapper_cfg.type={kind} needs CUDA; leave model_wrapper_cfg out, and '
            'MMDistributedDataParallel is taken.'
        )
    if not torch.distributed.is_initialized():
        if os.environ.get('WORLD_SIZE') == os.environ.get('LOCAL_WORLD_SIZE'):
            # One machine: gloo need not look its name up, which may not resolve.
            os.environ.setdefault('GLOO_SOCKET_IFNAME', _loopback())
        torch.distributed.init_process_group('gloo', timeout=_timeout(cfg))
    defaults = dict(
        broadcast_buffers=False, find_unused_parameters=cfg.get('find_unused_parameters', False)
    )
    cfg.model_wrapper_cfg = {**defaults, **wrapper, 'device_ids': None}
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='SharedStatisticsHook')]


def _timeout(cfg: Config) -> datetime.timedelta | None:
    """Return the time after which a process that hears nothing of the others gives up."""
    seconds = ((cfg.get('env_cfg') or {}).get('dist_cfg') or {}).get('timeout')
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or seconds <= 0:
        raise UserError(f'env_cfg.dist_cfg.timeout={seconds!r} must be a number of seconds.')
    return datetime.timedelta(seconds=seconds)


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
