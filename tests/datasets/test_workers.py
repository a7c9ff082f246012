"""Processes that load data: whatever ends one ends the run within seconds, in one sentence."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from mmengine.config import Config
from torch.utils.data import DataLoader, Dataset

from pvt_mm.datasets import guard
from pvt_mm.datasets.guard import clear_worker_errors, guard_workers
from pvt_mm.engine.resume import clear_errors
from pvt_mm.engine.runner import fit_workers
from pvt_mm.errors import UserError

#: Seconds after which a run that lost a worker must have ended.
PATIENCE = 30


class Unsendable:
    """A value that pickle refuses, as a transform of a user's own may leave one in a sample."""

    def __reduce__(self):
        raise TypeError('this cannot be sent')


class Samples(Dataset):
    """Samples, one of which ends its worker or cannot be handed over."""

    def __init__(self, fault):
        self.fault = fault

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 4 and self.fault == 'killed':
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 4 and self.fault == 'ends':
            os._exit(0)
        return Unsendable() if index == 4 and self.fault == 'cannot be sent' else index


def note_worker(worker):
    """An init function of the loader's own."""
    torch.manual_seed(100 + worker)


class FirstRandom(Samples):
    def __getitem__(self, index):
        return torch.initial_seed()


@pytest.mark.parametrize('fault', ['killed', 'ends', 'cannot be sent'])
def test_a_worker_that_ends_ends_the_run(fault, tmp_path):
    """PyTorch alone waits for ever for a batch that its worker cannot hand over."""
    loader = DataLoader(Samples(fault), num_workers=2, collate_fn=list)
    guard_workers(loader)
    start = time.monotonic()
    exited = 'a process that loads data exited unexpectedly'
    with pytest.raises(UserError, match=exited) as caught, clear_errors(tmp_path):
        list(loader)
    assert time.monotonic() - start < PATIENCE
    assert str(caught.value).startswith(f'The training in {tmp_path} stopped: a process')
    assert 'train_dataloader.num_workers=0 val_dataloader.num_workers=0, then start' in str(
        caught.value
    )


def test_a_whole_run_is_as_before():
    """Every batch arrives, and the init function of the config still runs."""
    loader = DataLoader(Samples(None), num_workers=2, collate_fn=list)
    guard_workers(loader)
    assert sorted(sum(loader, [])) == list(range(8))
    loader = DataLoader(
        FirstRandom(None), num_workers=2, collate_fn=list, worker_init_fn=note_worker
    )
    guard_workers(loader)
    assert set(sum(loader, [])) == {100, 101}
    alone = DataLoader(Samples(None))
    guard_workers(alone)
    assert alone.worker_init_fn is None


@pytest.mark.parametrize(
    ('size', 'says'),
    [
        (65536, 'and /dev/shm, by which it hands batches over, has only 0.0625 MiB; give it more '),
        (2**33, 'perhaps for lack of memory; take fewer of them'),
        (None, 'perhaps for lack of memory; take fewer of them'),
    ],
)
def test_the_sentence_is_true_of_the_machine(size, says, monkeypatch):
    """Shared memory is named where it is small, as in a container, and not where it is not."""
    monkeypatch.setattr(guard, '_shared_memory', lambda free=False: size)
    error = RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error.')
    expected = pytest.raises(UserError, match=f'^A process .* unexpectedly, {says}')
    with expected, clear_worker_errors(('test_dataloader',)):
        raise error


@pytest.mark.parametrize('error', [RuntimeError('CUDA out of memory'), OSError(28, 'no space')])
def test_other_errors_pass(error, monkeypatch):
    """A full disk is no full shared memory."""
    monkeypatch.setattr(guard, '_shared_memory', lambda free=False: 2**33)
    with pytest.raises(type(error)) as caught, clear_worker_errors(('test_dataloader',)):
        raise error
    assert caught.value is error


def test_no_room_for_a_lock_is_no_full_disk(monkeypatch):
    """A semaphore's file, which an OSError does not name."""
    monkeypatch.setattr(guard, '_shared_memory', lambda free=False: 0 if free else 16384)
    expected = pytest.raises(UserError, match='has only 0.0156 MiB')
    with expected, clear_worker_errors(('train_dataloader',)):
        raise OSError(28, 'No space left on device')


def test_no_workers_need_no_other_key():
    """What the sentence says to set is enough: PyTorch refuses persistent workers without any."""
    loader = dict(num_workers=0, persistent_workers=True, prefetch_factor=4)
    cfg = Config(dict(train_dataloader=loader, val_dataloader=dict(loader, num_workers=1)))
    fit_workers(cfg)
    DataLoader(Samples(None), **cfg.train_dataloader)
    assert cfg.val_dataloader == dict(loader, num_workers=1)


LOADS = """
import subprocess
import torch
from torch.utils.data import DataLoader
from pvt_mm.datasets.guard import clear_worker_errors, guard_workers
from pvt_mm.errors import UserError

for size in ('64k', '16k'):
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', '/dev/shm']
    subprocess.run(mount, check=True)
    loader = DataLoader([torch.zeros(2**16)] * 4, num_workers=2)
    guard_workers(loader)
    try:
        with clear_worker_errors(('test_dataloader',)):
            list(loader)
    except UserError as error:
        print(error)
"""


def can_mount():
    if not (sys.platform == 'linux' and os.geteuid() == 0 and shutil.which('unshare')):
        return False
    test = ['unshare', '-m', 'mount', '-t', 'tmpfs', 'tmpfs', '/dev/shm']
    return subprocess.run(test, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason='needs the right to mount')
def test_a_small_shared_memory_ends_the_run():
    """With a real one: too small for a batch, and too small for the locks of the workers."""
    run = ['unshare', '-m', sys.executable, '-W', 'ignore', '-c', LOADS]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    found = re.findall(r'exited unexpectedly, and /dev/shm, .* only (\S+) MiB', done.stdout)
    assert found == ['0.0625', '0.0156'], done.stderr
