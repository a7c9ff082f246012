"""What the kernels take from the machine: the processor, its cache, the C library's memory."""

import platform
import subprocess
import sys

import pytest
import torch

from pvt_mm.models.fast import cpu


def test_the_processor_is_told_by_linux(tmp_path):
    """Of the first core; nothing where the file is missing or in other words."""
    path = tmp_path / 'cpuinfo'
    assert cpu.vendor_and_family(path) == ('', 0)
    path.write_text('processor\t: 0\nmodel name\t: An ARM\n')
    assert cpu.vendor_and_family(path) == ('', 0)
    path.write_text('vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 17\n' * 99)
    assert cpu.vendor_and_family(path) == ('AuthenticAMD', 26)


@pytest.mark.parametrize(
    ('text', 'size'), [('32768K\n', 2**25), ('491520K\n', 480 * 2**20), ('32M', 0), ('', 0)]
)
def test_the_last_level_cache_is_told_by_linux(tmp_path, text, size):
    """In bytes; 0 where nothing can be read."""
    path = tmp_path / 'size'
    assert cpu.last_level_cache(path) == 0
    path.write_text(text)
    assert cpu.last_level_cache(path) == size


@pytest.mark.parametrize(
    ('vendor', 'family', 'capability', 'mkl', 'fused', 'training', 'narrow'),
    [
        ('AuthenticAMD', 25, 'AVX2', True, True, True, False),
        ('AuthenticAMD', 25, 'AVX512', False, False, True, False),
        ('AuthenticAMD', 26, 'AVX512', False, False, False, True),
        ('GenuineIntel', 6, 'AVX512', False, True, True, False),
        ('GenuineIntel', 207, 'AVX512', False, True, True, False),
        ('', 0, 'AVX512', False, False, True, False),
    ],
)
def test_the_processor_chooses_the_kernels(
    monkeypatch, vendor, family, capability, mkl, fused, training, narrow
):
    """AVX2 alone, Zen 4, Zen 5 and Intel; the general one where nothing is known."""
    monkeypatch.setattr(cpu, 'vendor_and_family', lambda: (vendor, family))
    monkeypatch.setattr(torch.backends.mkl, 'is_available', lambda: True)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    traits = cpu.traits.__wrapped__()
    assert (traits.mkl_is_faster, traits.mkl_is_narrow) == (mkl, narrow)
    assert (traits.fused_attention, traits.fused_attention_backward) == (fused, training)


def test_without_mkl_nothing_is_left_to_it(monkeypatch):
    """On Intel or not."""
    monkeypatch.setattr(cpu, 'vendor_and_family', lambda: ('GenuineIntel', 6))
    monkeypatch.setattr(torch.backends.mkl, 'is_available', lambda: False)
    traits = cpu.traits.__wrapped__()
    assert not traits.mkl_is_faster
    assert not traits.fused_attention and not traits.fused_attention_backward


@pytest.mark.parametrize(
    ('mib', 'chunk'), [(0, 2**20), (32, 2**20), (63, 2**20), (64, 2**21), (480, 2**21)]
)
def test_chunks_fit_the_cache(monkeypatch, mib, chunk):
    """Twice as large from 64 MiB on; small where nothing is known."""
    monkeypatch.setattr(cpu, 'last_level_cache', lambda: mib * 2**20)
    assert cpu.traits.__wrapped__().chunk == chunk


GLIBC = """
import resource, sys
import torch
if sys.argv[1] == 'forward':
    import pvt_mm
    with torch.no_grad():
        pvt_mm.PVTv2('b0')(torch.zeros(1, 3, 64, 64))
def passes(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        hidden = [torch.ones(2**22) for _ in range(3)]  # 16 MiB each
        del hidden
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
passes(3)
print(passes(10))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='how glibc keeps memory')
def test_freed_memory_is_kept_once_the_fast_path_was_taken():
    """Buffers freed and allocated again cost no page faults then; before, thousands."""
    faults = {}
    for name in ('forward', 'none'):
        command = [sys.executable, '-W', 'ignore', '-c', GLIBC, name]
        faults[name] = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert faults['forward'] < 2000 < faults['none']


def test_importing_asks_nothing_of_the_machine():
    """Neither /proc is read nor a trait worked out before the fast path is first taken."""
    code = (
        'import pvt_mm; from pvt_mm.models.fast import cpu; '
        'assert cpu.traits.cache_info().misses == 0; '
        'assert cpu.keep_freed_memory.cache_info().misses == 0'
    )
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)
