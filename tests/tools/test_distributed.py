"""Two processes over gloo: gradients, ranks that stay identical, and faults that end a launch."""

import importlib.util
import json
import sys
import time

import pytest
import torch
from reference import REPO, SMALL

from pvt_mm.errors import UserError

spec = importlib.util.spec_from_file_location(
    'check_distributed', REPO / 'tests/stress/check_distributed.py'
)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason='there is CUDA')


@no_cuda
def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    """A mean over samples has the same gradients on two halves as on the whole batch."""
    backbones = [dict(type=name, arch=SMALL) for name in ('PVT', 'PVTv2')]
    assert 'tensors at most' in tool.check_gradients(backbones, tmp_path / 'gradients')


@no_cuda
def test_ranks_stay_identical_and_the_loss_falls(small_config, demo_data, tmp_path):
    """Weights and BatchNorm's statistics are the same after every iteration; SyncBN is replaced."""
    schedule = 'train_cfg = dict(max_iters=10, val_interval=10)'
    folder = tmp_path / 'dist'
    says = tool.check_training(small_config('seg'), schedule, demo_data / 'ade', folder)
    assert says.startswith('same after each of 10 iterations')
    log = next(folder.glob('run/*/*.log')).read_text()
    assert 'SyncBN' not in log.split('Config:')[-1], 'SyncBN needs CUDA'
    assert 'Distributed launcher: pytorch' in log and 'GPU number: 2' in log
    assert 'mIoU' in log, 'validated'


@no_cuda
def test_a_killed_worker_ends_the_launch(small_config, demo_data, tmp_path):
    """What the system kills without a word of its own is named, and no process stays behind."""
    schedule = 'train_cfg = dict(max_epochs=9, val_interval=9)'
    config, data = small_config('det'), demo_data / 'coco'
    says = tool.check_fault(config, schedule, data, tmp_path / 'fault', 'worker killed')
    assert says.startswith('all gone after')


# What the checks must notice


def write_ranks(folder, losses, digests):
    for i, own in enumerate(digests):
        lines = [json.dumps(dict(loss=loss, digest=d)) for loss, d in zip(losses, own)]
        (folder / f'rank_{i}.jsonl').write_text('\n'.join(lines))


@pytest.mark.parametrize(
    ('losses', 'digests', 'code', 'fault'),
    [
        ((4, 3, 2, 1), ('abcd', 'abcd'), 1, 'ended with code 1:\nwords'),
        ((4, 3, 2, 1), ('abcd', 'abxd'), 0, 'different models'),
        ((4, 3, 2, 1), ('aaaa', 'aaaa'), 0, 'do not change'),
        ((1, 2, 3, 4), ('abcd', 'abcd'), 0, 'does not fall: from 1.000 to 4.000'),
        ((4, 3, 2, float('nan')), ('abcd', 'abcd'), 0, 'does not fall'),
    ],
)
def test_ranks_that_part_are_noticed(monkeypatch, tmp_path, losses, digests, code, fault):
    """A failed launch, ranks apart, a model that stands still, a loss that does not fall."""
    write_ranks(tmp_path, losses, digests)
    monkeypatch.setattr(tool, 'train', lambda *arguments: (code, 'words'))
    with pytest.raises(UserError, match=fault):
        tool.check_training(None, '', None, tmp_path)


@pytest.mark.parametrize(
    ('code', 'output', 'seconds', 'fault'),
    [
        (0, 'is killed by signal: Killed', 1, 'code 0 after'),
        (1, 'is killed by signal: Killed', 99, 'code 1 after 99 s'),
        (1, 'something else', 1, 'does not say'),
        (1, '', None, 'code 1 before the fault'),
    ],
)
def test_launches_that_end_badly_are_noticed(monkeypatch, tmp_path, code, output, seconds, fault):
    """A fault that ends nothing, ends it late, or goes unmentioned, or one that never came."""
    if seconds is not None:
        (tmp_path / 'failed_at').write_text(str(time.time() - seconds))
    monkeypatch.setattr(tool, 'train', lambda *arguments: (code, output))
    with pytest.raises(UserError, match=fault):
        tool.check_fault(None, '', None, tmp_path, 'worker killed')


def test_a_process_left_behind_is_found(tmp_path):
    """Processes of a launch are known by their environment."""
    assert tool.left_behind(tmp_path) == []
    command = [sys.executable, '-c', 'input()']
    environment = {tool.MARK: str(tmp_path)}
    with tool.subprocess.Popen(command, env=environment, stdin=tool.subprocess.PIPE) as process:
        while not tool.left_behind(tmp_path):
            time.sleep(0.01)
        assert tool.left_behind(tmp_path) == [process.pid]


def test_gradients_apart_are_noticed(monkeypatch, tmp_path):
    """Ranks that differ, or agree on something else than one process finds."""
    backbones = [dict(type='PVT', arch=SMALL)]
    grads = tool.gradients(tool.build(backbones[0]), tool.images(4))
    for part, factors, fault in (
        ('first', (1, 1.1), 'the two processes have different gradients'),
        ('second', (1.1, 1.1), 'of the largest apart'),
    ):

        def launch(*arguments, part=part, factors=factors):
            for i, factor in enumerate(factors):
                scaled = [grad * factor for grad in grads]
                torch.save(scaled, tmp_path / part / f'gradients_{i}.pth')
            return 0, ''

        monkeypatch.setattr(tool, 'launch', launch)
        with pytest.raises(UserError, match=fault):
            tool.check_gradients(backbones, tmp_path / part)
