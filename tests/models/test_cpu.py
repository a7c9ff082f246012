"""What the kernels take from the machine: the processor, its cache, the C library's memory."""

import importlib.util
import platform
import subprocess
import sys

import pytest
import torch

from pvt_mm.models.fast import cpu, kernels


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
def test_the_processor_chooses_the_road(
    monkeypatch, vendor, family, capability, mkl, fused, training, narrow
):
    """AVX2 alone, Zen 4, Zen 5 and Intel; the general one where nothing is known."""
    monkeypatch.setattr(cpu, 'vendor_and_family', lambda: (vendor, family))
    monkeypatch.setattr(torch.backends.mkl, 'is_available', lambda: True)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    roads = fresh_kernels()
    products = roads.MKL_IS_FASTER, roads.MKL_IS_NARROW
    attention = roads.FUSED_ATTENTION_IS_FASTER, roads.FUSED_TRAINING_IS_FASTER
    assert products == (mkl, narrow) and attention == (fused, training)


def test_without_mkl_nothing_is_left_to_it(monkeypatch):
    """On Intel or not."""
    monkeypatch.setattr(cpu, 'vendor_and_family', lambda: ('GenuineIntel', 6))
    monkeypatch.setattr(torch.backends.mkl, 'is_available', lambda: False)
    roads = fresh_kernels()
    assert not roads.MKL_IS_FASTER
    assert not roads.FUSED_ATTENTION_IS_FASTER and not roads.FUSED_TRAINING_IS_FASTER


@pytest.mark.parametrize(
    ('mib', 'piece'), [(0, 2**20), (32, 2**20), (63, 2**20), (64, 2**21), (480, 2**21)]
)
def test_pieces_fit_the_cache(monkeypatch, mib, piece):
    """Twice as large from 64 MiB on; small where nothing is known."""
    monkeypatch.setattr(cpu, 'last_level_cache', lambda: mib * 2**20)
    chosen = fresh_kernels().PIECE
    assert chosen == piece


def fresh_kernels():
    """A second copy of the kernels, which asks the machine anew."""
    spec = importlib.util.spec_from_file_location('pvt_mm._kernels_again', kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GLIBC = """
import resource, sys
import torch
if sys.argv[1] == 'pvt_mm':
    import pvt_mm.kernels
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
def test_freed_memory_is_kept():
    """Buffers freed and made again cost no page faults, of which there were thousands a pass."""
    faults = {}
    for name in ('pvt_mm', 'none'):
        command = [sys.executable, '-c', GLIBC, name]
        faults[name] = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert faults['pvt_mm'] < 2000 < faults['none']
