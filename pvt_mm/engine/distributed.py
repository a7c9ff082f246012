"""Start and end several processes without CUDA."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object, get_world_size

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
#: Linux's request for the IPv4 address of an interface.
SIOCGIFADDR = 0x8915
#: PyTorch's classes for errors of NCCL and of the store, by name: 2.1 has fewer of them.
_LOST = {'DistError', 'DistBackendError'}
#: What the errors of gloo say, which have no class of their own.
_GLOO = re.compile('/gloo/|Gloo|pair closure|Connection (closed|reset) by peer')


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
        interface = _interface()
        if interface:
            os.environ.setdefault('GLOO_SOCKET_IFNAME', interface)
        with clear_losses('The start'):
            torch.distributed.init_process_group('gloo', timeout=_timeout(cfg))
    defaults = dict(
        broadcast_buffers=False, find_unused_parameters=cfg.get('find_unused_parameters', False)
    )
    cfg.model_wrapper_cfg = {**defaults, **wrapper, 'device_ids': None}
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='SharedStatisticsHook')]


def _timeout(cfg: Config) -> timedelta | None:
    """Return the time after which a process that hears nothing of the others gives up."""
    seconds = ((cfg.get('env_cfg') or {}).get('dist_cfg') or {}).get('timeout')
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or seconds <= 0:
        raise UserError(f'env_cfg.dist_cfg.timeout={seconds!r} must be a number of seconds.')
    return timedelta(seconds=seconds)


def _interface() -> str | None:
    """Return the network interface that the processes can talk over; None where none is known.

    gloo itself looks the machine's own name up, which may not resolve, or to an address that other
    machines cannot reach.
    """
    if os.environ.get('WORLD_SIZE') == os.environ.get('LOCAL_WORLD_SIZE'):  # one machine
        return next(name for _, name in socket.if_nameindex() if name.startswith('lo'))
    try:
        own = _own_address(os.environ.get('MASTER_ADDR', ''))
        return next((name for name, address in _addresses() if address == own), None)
    except OSError:  # no route, or a name that does not resolve: the connection will say so
        return None


def _own_address(other: str) -> str:
    """Return this machine's address on the route to another one; nothing is sent."""
    family, kind, _, _, place = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def _addresses() -> Iterator[tuple[str, str]]:
    """Yield interfaces and their addresses, as Linux tells them."""
    if sys.platform != 'linux':
        return
    from fcntl import ioctl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                answer = ioctl(probe, SIOCGIFADDR, struct.pack('256s', name.encode()))
                yield name, socket.inet_ntoa(answer[20:24])
    for line in Path('/proc/net/if_inet6').read_text().splitlines():
        digits, *_, name = line.split()
        yield name, socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))


@contextlib.contextmanager
def clear_losses(what: str, next_step: str = 'start it again on every machine') -> Iterator[None]:
    """Turn errors of the connections between processes into one sentence.

    Args:
        what: What stops, such as ``'The training in work_dirs/x'``.
        next_step: What to do once the cause is mended.

    Raises:
        UserError: Where another process is gone, or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition('\n')[0]
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if not kinds & _LOST and not _GLOO.search(reason):
            raise
        reason = ' '.join(re.sub(r'\[?/\S+:\d+\]', '', reason).split()).rstrip('.')
        raise UserError(
            f'{what} stopped, because the connection to another process of it was lost ({reason}); '
            'mend what that process says, or else its machine or the network between; then '
            f'{next_step}.'
        ) from error


def check_agreement(value: str, what: str, way_out: str) -> None:
    """Check that all processes have the same value.

    Args:
        value: Each process's own.
        what: The sentence's beginning, for where they differ.
        way_out: Its end.

    Raises:
        UserError: On all of them, where they differ.
    """
    if get_world_size() == 1:
        return
    values = all_gather_object(value)
    if len(set(values)) > 1:
        found = ', '.join(f'{each} in process {rank}' for rank, each in enumerate(values))
        raise UserError(f'{what}: {found}; {way_out}.')


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
