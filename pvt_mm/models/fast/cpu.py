"""What the CPU is, and what is faster on it. Read when the fast path is first taken."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import torch

from pvt_mm.models.context import bf16_is_slow_on_cpu

CPUINFO = '/proc/cpuinfo'
CACHE_SIZE = '/sys/devices/system/cpu/cpu0/cache/index3/size'


class Traits(NamedTuple):
    """What the kernels choose by.

    Attributes:
        chunk: Elements of an intermediate fp32 buffer that stays in the last-level cache: 4 MiB of
            a cache of 32 MiB, 8 of one of 64 MiB or more.
        mkl_is_faster: Whether MKL's fp32 GEMM beats oneDNN's, as with AVX2 alone.
        mkl_is_narrow: Whether MKL uses half of the vector unit in fp32: 256 bits on AMD, where
            Zen 5 (family 26) has 512.
        fused_attention: Whether PyTorch's fused attention, made of MKL's GEMMs, beats the chunked
            one in inference.
        fused_attention_backward: The same for training in fp32.
        bf16_is_slow: Whether oneDNN has no bf16 GEMM here, so that PyTorch uses plain loops.
    """

    chunk: int
    mkl_is_faster: bool
    mkl_is_narrow: bool
    fused_attention: bool
    fused_attention_backward: bool
    bf16_is_slow: bool


@functools.cache
def traits() -> Traits:
    """Return the traits of this machine's CPU."""
    vendor, family = vendor_and_family()
    has_mkl = torch.backends.mkl.is_available()
    mkl_is_faster = has_mkl and torch.backends.cpu.get_cpu_capability() == 'AVX2'
    mkl_is_narrow = vendor == 'AuthenticAMD' and family >= 26
    return Traits(
        chunk=2**21 if last_level_cache() >= 2**26 else 2**20,
        mkl_is_faster=mkl_is_faster,
        mkl_is_narrow=mkl_is_narrow,
        fused_attention=mkl_is_faster or (has_mkl and vendor == 'GenuineIntel'),
        fused_attention_backward=has_mkl and not mkl_is_narrow,
        bf16_is_slow=bf16_is_slow_on_cpu(),
    )


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep up to 64 MiB of what tensors free, once in a process.

    Otherwise it gives large blocks back to the system and gets them again, page by page, in every
    forward pass. It learns from the largest block freed below 32 MiB; nothing is written to it.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def vendor_and_family(path: str = CPUINFO) -> tuple[str, int]:
    """Return the vendor of the CPU, such as ``'GenuineIntel'``, and its family; or '' and 0."""
    text = _start(path)
    vendor = re.search(r'^vendor_id\s*: (\w+)$', text, re.MULTILINE)
    family = re.search(r'^cpu family\s*: (\d+)$', text, re.MULTILINE)
    return vendor[1] if vendor else '', int(family[1]) if family else 0


def last_level_cache(path: str = CACHE_SIZE) -> int:
    """Return the bytes of the cache that cores share, or 0."""
    size = re.fullmatch(r'(\d+)K\s*', _start(path))
    return 1024 * int(size[1]) if size else 0


def _start(path: str) -> str:
    """Return the start of a file, which describes the first core; '' where it cannot be read."""
    try:
        with open(path) as file:
            return file.read(512)
    except OSError:
        return ''
