"""What the benchmarks ask of the machine: whether it is idle, how fast it is, memory in use."""

import ctypes
import functools
import gc
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

BUSY = 0.15  # cores that other processes may use


class OtherLoad:
    """How many cores other processes keep busy, from its making on; 0 where none can tell.

    Args:
        own: Gives the CPU seconds of children that are still running.
    """

    def __init__(self, own: Callable[[], float] = float) -> None:
        self.own = own
        self.start = self._read()

    def _read(self) -> tuple[float, float]:
        """Return the clock, and the CPU seconds of all processes but this one and its children."""
        if sys.platform != 'linux':
            return time.perf_counter(), 0.0
        # user, nice, system, idle, iowait, irq, softirq, steal, ...
        fields = Path('/proc/stat').read_text().splitlines()[0].split()[1:9]
        ticks = [int(field) for field in fields]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf('SC_CLK_TCK')
        return time.perf_counter(), busy - sum(os.times()[:4]) - self.own()

    def cores(self) -> float:
        """Return the mean since the start."""
        (then, before), (now, busy) = self.start, self._read()
        return max(0.0, (busy - before) / (now - then))


def check_idle() -> None:
    """Refuse to measure beside another busy process.

    Raises:
        UserError: Where other processes use the CPU.
    """
    from pvt_mm.errors import UserError

    others = OtherLoad()
    time.sleep(1)
    if others.cores() > BUSY:
        raise UserError(
            f'Other processes use {others.cores():.1f} of {os.cpu_count()} cores, which makes '
            'figures worthless; wait for them to end, or measure all the same with --anyway.'
        )


def describe(device: str) -> str:
    """Return the processor, the threads in use and PyTorch's version."""
    if device != 'cpu':
        return f'{torch.cuda.get_device_name()}; PyTorch {torch.__version__}'
    name = platform.processor() or platform.machine()
    if sys.platform == 'linux':
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next((li.split(': ')[1] for li in lines if li.startswith('model name')), name)
    return f'{name}; {torch.get_num_threads()} threads; PyTorch {torch.__version__}'


def synchronize(device: str) -> None:
    """Wait for a GPU to finish, so that its work is in the time taken."""
    if device != 'cpu':
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], device: str) -> float:
    """Return how long a call takes."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def gemm_rate(device: str) -> float:
    """Return the best fp32 rate of large GEMMs on this machine, in FLOP/s.

    Each GEMM is computed as a linear layer and as a 1x1 convolution, which run in different
    libraries. The best is taken over the shapes; a shape's own rate is the median of some runs.
    """
    rates = []
    for tokens, width in itertools.product((2048, 4096), (256, 512, 1024)):
        x = torch.randn(tokens, width, device=device)
        weight = torch.randn(width, width, device=device)
        image = x.view(1, 64, -1, width).permute(0, 3, 1, 2)  # channels-last
        kernels = (
            functools.partial(F.linear, x, weight),
            functools.partial(F.conv2d, image, weight[..., None, None]),
        )
        for kernel in kernels:
            runs = [seconds(kernel, device) for _ in range(8)]
            rates.append(2 * tokens * width**2 / statistics.median(runs[1:]))
    return max(rates)


def can_measure_memory(device: str) -> bool:
    """Tell whether :func:`peak_mib` works here."""
    return device != 'cpu' or sys.platform == 'linux'


def peak_mib(work: Callable[[], Any], device: str) -> float:
    """Return the peak of memory during a call, over what was in use before, in MiB."""
    gc.collect()
    if device != 'cpu':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # give back what was freed
    Path('/proc/self/clear_refs').write_text('5')  # reset the peak
    before = _status('VmRSS')
    work()
    return (_status('VmHWM') - before) / 2**20


def _status(name: str) -> int:
    """Return an entry of this process's status in bytes, such as its resident memory."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
