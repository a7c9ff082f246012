"""Kill and resume: the same weights in the end, whole files at any moment, clear errors."""

import contextlib
import copy
import errno
import functools
import importlib.util
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import forget_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from mmengine.runner import Runner
from mmengine.utils import ManagerMixin
from reference import REPO
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pvt_mm.checkpoint.safe_load import read_checkpoint
from pvt_mm.engine import resume, runtime
from pvt_mm.engine.distributed import shutdown_distributed
from pvt_mm.engine.random_state import random_state
from pvt_mm.engine.resumable_checkpoint_hook import AtomicBackend
from pvt_mm.engine.samplers import FreeSkips, ResumableBatchSampler
from pvt_mm.errors import UserError
from pvt_mm.files import PARTIAL, atomic_write

# A training of a second: all that mmengine does around one, and random numbers wherever they may be


@DATASETS.register_module()
class NoisyNumbers(Dataset):
    """Ten numbers with noise from each of the generators that transforms use."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return dict(inputs=torch.tensor([float(index), noise]))


@MODELS.register_module()
class DroppingNet(BaseModel):
    """A net whose dropout and noise draw in the main process."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, inputs, mode):
        noise = random.random() + np.random.rand()
        out = self.layers(torch.stack(inputs))
        return {'loss': (out - noise).square().mean()} if mode == 'loss' else [out]


@METRICS.register_module()
class RandomScore(BaseMetric):
    """A score that a validation draws, so that the best checkpoint changes now and then."""

    def process(self, data_batch, data_samples):
        self.results.append(torch.rand(()).item())

    def compute_metrics(self, results):
        return {'acc': sum(results)}


class Killed(BaseException):
    """Ends a training where it is, like a signal: nothing catches it."""


@HOOKS.register_module()
class Killer(Hook):
    """Kill a training before a moment of an iteration."""

    priority = 'LOWEST'

    def __init__(self, moment, iteration):
        def kill(runner, *args, **kwargs):
            if runner.iter == iteration:
                raise Killed

        setattr(self, moment, kill)


SCHEDULES = {
    'epochs': dict(max_epochs=3, val_interval=1),
    'within_epochs': dict(max_epochs=3, val_interval=2),
    'iterations': dict(max_iters=14, val_interval=5),
    'passes': dict(max_iters=14, val_interval=5),
}
SAVES = {
    'epochs': dict(interval=1, max_keep_ckpts=1, save_best='acc'),
    'within_epochs': dict(interval=2, by_epoch=False),
    'iterations': dict(interval=3, by_epoch=False, max_keep_ckpts=1),
    'passes': dict(interval=3, by_epoch=False, max_keep_ckpts=2),
}


def make_config(work_dir, schedule, workers=0, **more):
    """Return the config of a training with 5 iterations an epoch, EMA, and a validation."""
    loop = 'EpochBasedTrainLoop' if 'epochs' in schedule else 'IterBasedTrainLoop'
    sampler = 'InfiniteSampler' if schedule == 'iterations' else 'DefaultSampler'
    loader = dict(
        batch_size=2, num_workers=workers, persistent_workers=workers > 0,
        dataset=dict(type='NoisyNumbers'), sampler=dict(type=sampler, shuffle=True),
    )  # fmt: skip
    hook = dict(type='CheckpointHook', **SAVES[schedule])
    cfg = dict(
        work_dir=str(work_dir),
        model=dict(type='DroppingNet'),
        train_dataloader=loader,
        val_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=False)),
        train_cfg=dict(type=loop, **SCHEDULES[schedule]),
        val_cfg=dict(),
        val_evaluator=dict(type='RandomScore'),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.1)),
        param_scheduler=[dict(type='LinearLR', start_factor=0.1, end=9, by_epoch=False)],
        default_hooks=dict(checkpoint=hook, logger=dict(type='LoggerHook', interval=100)),
        custom_hooks=[dict(type='EMAHook', momentum=0.1)],
        randomness=dict(seed=4),
        default_scope='mmengine',
    )
    return Config({**cfg, **more})


def train(cfg):
    """Train as tools/train.py does."""
    forget_runs(ManagerMixin)
    runtime.setup(cfg)
    resume.setup(cfg)
    with resume.clear_errors(cfg.work_dir):
        Runner.from_cfg(cfg).train()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Neither ask for the compilers at the start of each Runner, nor wait for a busy disk."""
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    monkeypatch.setattr(os, 'fsync', lambda descriptor: None)


def last_checkpoint(work_dir):
    runtime.setup()
    return read_checkpoint((Path(work_dir) / 'last_checkpoint').read_text())


def outcome(work_dir):
    """Return everything of the last checkpoint that must be the same, flat."""
    checkpoint = last_checkpoint(work_dir)
    keys = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'random_states')
    parts = {key: checkpoint[key] for key in keys}
    parts['losses'] = checkpoint['message_hub']['log_scalars']['train/loss'].data[0].tolist()
    parts['progress'] = [checkpoint['meta'][key] for key in ('epoch', 'iter', 'seed')]
    return dict(flatten(parts))


def flatten(node, name=''):
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        if isinstance(value, (dict, list, tuple)):
            yield from flatten(value, f'{name}.{key}')
        else:
            yield f'{name}.{key}', value.tolist() if hasattr(value, 'tolist') else value


@pytest.fixture(scope='module')
def never_killed(tmp_path_factory):
    """Train a schedule once: never_killed('epochs') -> its outcome."""

    @functools.cache
    def run(schedule):
        folder = tmp_path_factory.mktemp(schedule)
        train(make_config(folder, schedule))
        return outcome(folder)

    return run


MOMENTS = [
    ('after_train_iter', 3),  # before or just after the first save
    ('before_train_iter', 8),
    ('before_val_epoch', 5),  # a validation is not made up for, and must leave no trace
    ('before_val_epoch', 10),
    ('after_train_iter', 12),
]


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_a_killed_training_ends_as_one_never_killed(schedule, never_killed, tmp_path):
    """Killed in every stage, one after the other, a training ends with the same everything."""
    for moment, iteration in MOMENTS:
        cfg = make_config(tmp_path, schedule, resume='auto')
        cfg.custom_hooks.append(dict(type='Killer', moment=moment, iteration=iteration))
        with contextlib.suppress(Killed):
            train(cfg)
    train(make_config(tmp_path, schedule, resume='auto'))
    assert outcome(tmp_path) == never_killed(schedule)
    files = [file.name for file in tmp_path.glob('*.pth') if not file.name.startswith('best_')]
    keep = SAVES[schedule].get('max_keep_ckpts')
    assert keep is None or len(files) == keep, 'those that were to be deleted are'


def apart(function, *args):
    """Run a function in a forked process and return its exit code; 3 where it is killed.

    The workers of a training that stops half way would trouble this process for minutes.
    """
    return code_of(start(function, *args))


def start(function, *args):
    """Start a function in a forked process."""

    def run():
        torch.set_num_threads(1)
        code = 0
        try:
            function(*args)
        except Killed:
            code = 3
        except SystemExit as stop:
            code = stop.code
        for worker in multiprocessing.active_children():
            worker.kill()
        sys.stderr.flush()
        os._exit(code)

    process = multiprocessing.get_context('fork').Process(target=run)
    process.start()
    return process


def code_of(process):
    """Wait for a process, and return its exit code."""
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize('schedule', ['epochs', 'iterations'])
def test_it_does_so_with_workers_and_a_seed_that_nobody_gave(schedule, tmp_path):
    """Two persistent workers, killed and resumed; mmengine alone would shuffle anew."""
    cfg = make_config(tmp_path / 'run', schedule, workers=2, randomness=dict(seed=None))
    cfg.custom_hooks.append(dict(type='Killer', moment='after_train_iter', iteration=11))
    assert apart(train, cfg) == 3
    seed = last_checkpoint(tmp_path / 'run')['meta']['seed']
    cfg = make_config(tmp_path / 'run', schedule, 2, randomness=dict(seed=None), resume=True)
    assert apart(train, cfg) == 0
    cfg = make_config(tmp_path / 'whole', schedule, 0, randomness=dict(seed=seed))
    assert apart(train, cfg) == 0
    assert outcome(tmp_path / 'run') == outcome(tmp_path / 'whole')


def test_without_the_random_states_it_ends_otherwise(never_killed, tmp_path):
    """The comparison can fail, and what the hook adds is needed."""
    cfg = make_config(tmp_path, 'epochs')
    cfg.custom_hooks.append(dict(type='Killer', moment='after_train_iter', iteration=8))
    with pytest.raises(Killed):
        train(cfg)
    file = (tmp_path / 'last_checkpoint').read_text()
    content = read_checkpoint(file)
    del content['random_states']
    torch.save(content, file)
    train(make_config(tmp_path, 'epochs', resume=True))
    assert outcome(tmp_path)['.progress.1'] == 15
    assert outcome(tmp_path) != never_killed('epochs')


@pytest.mark.parametrize('schedule', ['epochs', 'iterations'])
def test_killed_at_any_step_of_a_save(schedule, never_killed, tmp_path, monkeypatch):
    """Before each rename and deletion of a save, one after the other."""
    partial = 0
    for number in range(1, 6):
        countdown = itertools.count(number, -1)

        def step(function, *paths, countdown=countdown):
            if not next(countdown):
                raise Killed
            function(*paths)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(os, 'replace', functools.partial(step, os.replace))
            patch.setattr(os, 'remove', functools.partial(step, os.remove))
            train(make_config(tmp_path, schedule, resume='auto'))
        partial += len(partial_files(tmp_path))
    train(make_config(tmp_path, schedule, resume='auto'))
    assert outcome(tmp_path) == never_killed(schedule)
    assert partial and not partial_files(tmp_path), 'those of killed processes are removed'


def partial_files(folder):
    return list(folder.glob(f'.*{PARTIAL}'))


def test_killed_by_the_system_while_it_saves(never_killed, tmp_path, monkeypatch):
    """A process is ended by SIGKILL while a checkpoint is open, and resumed in this one."""
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', lambda descriptor: time.sleep(0.05))
        for _ in range(2):
            cfg = make_config(tmp_path, 'iterations', resume='auto')
            process = multiprocessing.get_context('fork').Process(target=train, args=(cfg,))
            process.start()
            for _ in range(2):  # the second checkpoint that it writes
                wait_for(lambda: list(tmp_path.glob('.iter_*')), process)
                wait_for(lambda: (tmp_path / 'last_checkpoint').is_file(), process)
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL
    train(make_config(tmp_path, 'iterations', resume='auto'))
    assert outcome(tmp_path) == never_killed('iterations')


def wait_for(condition, process):
    end = time.monotonic() + 30
    while not condition():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.001)


def test_two_processes_go_on_with_a_state_each(tmp_path):
    """Over gloo, with a seed a rank, the resumed ranks draw what they would have drawn."""
    kill = dict(type='Killer', moment='after_train_iter', iteration=4)
    launch(make_gloo_config(tmp_path / 'whole'))
    launch(make_gloo_config(tmp_path / 'run', kill), code=3)
    states = last_checkpoint(tmp_path / 'run')['random_states']
    assert len(states) == 2 and not torch.equal(states[0]['torch'], states[1]['torch'])
    launch(make_gloo_config(tmp_path / 'run', resume=True))
    assert outcome(tmp_path / 'run') == outcome(tmp_path / 'whole')


def make_gloo_config(work_dir, *hooks, **more):
    randomness = dict(seed=4, diff_rank_seed=True)
    cfg = make_config(work_dir, 'epochs', launcher='pytorch', randomness=randomness, **more)
    cfg.custom_hooks.extend(hooks)
    return cfg


def launch(cfg, code=0):
    """Train in two processes, which must end with a code."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    ranks = [start(train_rank, rank, port, cfg) for rank in range(2)]
    assert [code_of(rank) for rank in ranks] == [code, code]


def train_rank(rank, port, cfg):
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR='127.0.0.1')
    train(cfg)
    shutdown_distributed()


# Batches


def make_batches(kind, size, batch_size, **more):
    torch.manual_seed(3)
    sampler = {'infinite': InfiniteSampler, 'finite': DefaultSampler}[kind](range(size), seed=3)
    return ResumableBatchSampler(sampler, batch_size, **more)


def take(batches, number=None):
    return [(batch.indices, batch.key) for batch in itertools.islice(batches, number)]


@given(
    kind=st.sampled_from(['finite', 'infinite']),
    size=st.integers(1, 12),
    batch_size=st.integers(1, 5),
    drop_last=st.booleans(),
    done=st.integers(0, 20),
)
@settings(max_examples=60, deadline=None)
def test_a_loop_by_iterations_goes_on_at_the_right_draw(kind, size, batch_size, drop_last, done):
    """Any sampler, any batch: what follows is the same, and so are its random numbers."""
    make = functools.partial(
        make_batches, kind, size, batch_size, drop_last=drop_last, endless=True
    )
    assert take(make(iteration=done), 9) == take(make(), done + 9)[done:]


@given(
    size=st.integers(1, 12), batch_size=st.integers(1, 5), epoch=st.integers(0, 2), data=st.data()
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_goes_on_at_the_right_draw(size, batch_size, epoch, data):
    """Saved within an epoch, its rest follows, and then the next one."""
    whole = list(epochs(make_batches('finite', size, batch_size), range(4)))
    within = data.draw(st.integers(0, len(whole[0])))
    iteration = epoch * len(whole[0]) + within
    resumed = make_batches('finite', size, batch_size, epoch=epoch, iteration=iteration)
    expected = [whole[epoch][within:], *whole[epoch + 1 :]]
    assert list(epochs(resumed, range(epoch, 4))) == expected


def epochs(batches, numbers):
    for number in numbers:
        batches.sampler.set_epoch(number)
        yield take(batches)


def test_another_batch_size_starts_the_epoch_anew():
    """An iteration number that is of another batch size says nothing about this epoch's rest."""
    whole = take(make_batches('finite', 12, 4))
    for iteration in (0, 30):  # of batches of 8, and of 1
        resumed = make_batches('finite', 12, 4, epoch=1, iteration=iteration)
        assert [indices for indices, _ in take(resumed)] == [indices for indices, _ in whole]


def draw_noise(workers, seed=3, **start):
    """Return what samples of two passes draw."""
    torch.manual_seed(seed)
    sampler = DefaultSampler(range(10), seed=3)
    batches = ResumableBatchSampler(sampler, 2, endless=True, **start)
    loader = DataLoader(NoisyNumbers(), batch_sampler=batches, num_workers=workers, collate_fn=list)
    taken = itertools.islice(loader, 10 - start.get('iteration', 0))
    return [sample['inputs'].tolist() for batch in taken for sample in batch]


def test_a_sample_draws_by_its_number_alone():
    """Not by the worker, nor by what was drawn before; and it leaves the process's state alone."""
    whole = draw_noise(workers=0)
    before = dict(flatten(random_state()))
    assert draw_noise(0) == draw_noise(1) == draw_noise(3) == whole
    assert draw_noise(2, iteration=3) == whole[6:]
    assert dict(flatten(random_state())) == before
    assert not {noise for _, noise in draw_noise(0, seed=5)} & {noise for _, noise in whole}
    assert len({noise for _, noise in whole}) == 20


def test_skipping_costs_nothing_on_either_stack():
    """mmengine takes and drops the batches; newer versions ask the iterator to skip them."""
    for skip in (lambda batches: [next(batches) for _ in range(3)], lambda b: b.skip_iter(3)):
        batches = FreeSkips(iter('ab'), 3)
        skip(batches)
        assert next(batches) == 'a'


# Files


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path):
    """SIGKILL at fifteen moments of writes that never end."""
    file = tmp_path / 'x.pth'
    contents = [bytes([number]) * 300_000 for number in range(4)]

    def write():
        for content in itertools.cycle(contents):
            atomic_write(content, file)

    atomic_write(contents[0], file)
    for _ in range(15):
        process = multiprocessing.get_context('fork').Process(target=write)
        process.start()
        time.sleep(random.random() / 50)
        process.kill()
        process.join()
        assert file.read_bytes() in contents


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """Flushed whole, renamed, and then the folder is flushed."""
    calls = []

    def flush(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append('folder' if folder else os.fstat(descriptor).st_size)

    replace = os.replace
    monkeypatch.setattr(os, 'fsync', flush)
    monkeypatch.setattr(os, 'replace', lambda *paths: (calls.append('rename'), replace(*paths)))
    AtomicBackend().put(b'12345', tmp_path / 'new' / 'x.pth')
    AtomicBackend().put_text('123', tmp_path / 'new' / 'x.txt')
    assert calls == [5, 'rename', 'folder', 3, 'rename', 'folder']
    assert sorted(file.name for file in (tmp_path / 'new').iterdir()) == ['x.pth', 'x.txt']


@pytest.mark.parametrize('schedule', ['epochs', 'iterations'])
def test_there_is_a_whole_checkpoint_at_every_moment(schedule, tmp_path, monkeypatch):
    """With one to keep: around every rename and deletion, the last and the best one are there."""
    seen = set()

    def check():
        whole = [file.name for file in tmp_path.glob('*.pth') if resume.read_training(file)]
        kinds = {name.split('_')[0] for name in whole}
        assert kinds >= seen, 'there was a moment without'
        seen.update(kinds)
        if (tmp_path / 'last_checkpoint').is_file():
            assert Path((tmp_path / 'last_checkpoint').read_text()).name in whole

    def step(function, *paths):
        check()
        function(*paths)
        check()

    monkeypatch.setattr(os, 'replace', functools.partial(step, os.replace))
    monkeypatch.setattr(os, 'remove', functools.partial(step, os.remove))
    train(make_config(tmp_path, schedule))
    assert seen == ({'epoch', 'best'} if schedule == 'epochs' else {'iter'})


# A disk or a data set that fails


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_failing_disk_is_named_and_the_last_checkpoint_intact(
    code, never_killed, tmp_path, monkeypatch
):
    """The second save fails: one sentence, no half file, and the training can go on."""
    calls = itertools.count()

    def flush(descriptor):
        if next(calls) >= 4:
            raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch, pytest.raises(UserError) as stop:
        patch.setattr(os, 'fsync', flush)
        train(make_config(tmp_path, 'iterations'))
    assert f'({os.strerror(code)}: {tmp_path}/iter_6.pth)' in str(stop.value)
    assert str(stop.value).endswith(f'go on with --resume: {tmp_path}/iter_3.pth is whole.')
    assert last_checkpoint(tmp_path)['meta']['iter'] == 3 and not partial_files(tmp_path)
    train(make_config(tmp_path, 'iterations', resume=True))
    assert outcome(tmp_path) == never_killed('iterations')


@HOOKS.register_module()
class Filler(Hook):
    """Fill a disk at the fifth iteration."""

    def before_train_iter(self, runner, **kwargs):
        if runner.iter == 4:
            with contextlib.suppress(OSError), open(f'{runner.work_dir}/big', 'wb', 0) as file:
                while True:
                    file.write(bytes(1000))


@pytest.fixture
def mount(tmp_path):
    """Mount a small disk: mount('size=1m') -> its folder; skips where that is not allowed."""
    folder = tmp_path / 'disk'
    folder.mkdir()

    def run(options):
        command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)]
        if shutil.which('mount') is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip('no right to mount')
        return folder

    yield run
    if os.path.ismount(folder):
        subprocess.run(['umount', '-l', str(folder)], check=True)


def test_a_disk_that_is_really_full(mount, never_killed, capfd):
    """It fills up while the training runs; with room again, the training goes on."""
    work_dir = mount('size=2m')
    cfg = make_config(work_dir, 'iterations')
    cfg.custom_hooks.append(dict(type='Filler'))
    with pytest.raises(UserError, match='No space left on device.*iter_3.pth is whole'):
        train(cfg)
    assert 'Traceback' not in capfd.readouterr().err
    (work_dir / 'big').unlink()
    train(make_config(work_dir, 'iterations', resume=True))
    assert outcome(work_dir) == never_killed('iterations')


def test_a_disk_that_is_really_read_only(mount):
    """The work dir cannot even be made."""
    work_dir = mount('size=2m,ro') / 'run'
    with pytest.raises(UserError, match=r'Read-only file system: .*/run\); mend that, then start'):
        train(make_config(work_dir, 'iterations'))


@HOOKS.register_module()
class Vanisher(Hook):
    """Take a folder away at an iteration."""

    def __init__(self, folder):
        self.folder = folder

    def before_train_iter(self, runner, **kwargs):
        if runner.iter == 4:
            shutil.rmtree(self.folder)


def test_a_data_set_that_vanishes(small_config, run_tool, demo_data, tmp_path, capfd):
    """In mid-training, seen by a worker: a line with the file, and the checkpoint before."""
    data = shutil.copytree(demo_data / 'coco', tmp_path / 'coco')
    hook = dict(type='Vanisher', folder=str(data / 'train2017'))
    extra = (
        f'custom_hooks = [{hook}]\ntrain_cfg.update(max_epochs=4, val_interval=4)\n'
        'train_dataloader.update(num_workers=2, persistent_workers=True)'
    )
    config = small_config('det', extra)
    assert apart(run_tool, 'train', config, '--data-root', data, '--work-dir', 'run') == 1
    error = capfd.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith('error: ')]
    assert 'Traceback' not in error
    assert 'missing file' in line and f'{data}/train2017/0000' in line
    saved = (tmp_path / 'run' / 'last_checkpoint').read_text()
    assert line.endswith(f'then go on with --resume: {saved} is whole.')
    assert f'epoch_{resume.read_training(saved)["meta"]["epoch"]}.pth' == Path(saved).name


# Which checkpoint


def save(work_dir, step, **content):
    """Write a checkpoint of a training and note it."""
    file = work_dir / f'epoch_{step}.pth'
    meta = dict(epoch=step, iter=10 * step, seed=7)
    torch.save(dict(meta=meta, state_dict={'x': torch.ones(1000)}, **content), file)
    (work_dir / 'last_checkpoint').write_text(str(file))
    os.utime(file, (step, step))
    return file


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[content.index(torch.ones(9).numpy().tobytes())] ^= 1
    file.write_bytes(content)


DAMAGES = {
    'cut short': lambda file: os.truncate(file, file.stat().st_size // 2),
    'empty': lambda file: os.truncate(file, 0),
    'one bit': flip_a_bit,
    'zeros': lambda file: file.write_bytes(bytes(file.stat().st_size)),
    'text': lambda file: file.write_text('hello'),
    'weights alone': lambda file: torch.save({'x': torch.ones(1)}, file),
}


@pytest.fixture
def logged(monkeypatch):
    """Collect what is logged before there is a Runner."""
    lines = []
    monkeypatch.setattr(resume, 'print_log', lambda line, *_: lines.append(line))
    return lines


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(damage, tmp_path, logged):
    """Each kind of damage, a single bit included, which PyTorch would load."""
    runtime.setup()
    files = [save(tmp_path, step) for step in (1, 2, 3)]
    DAMAGES[damage](files[2])
    assert resume.latest_valid(tmp_path)[0] == str(files[1])
    assert len(logged) == 1 and str(files[2]) in logged[0]
    for file in files[:2]:
        DAMAGES[damage](file)
    with pytest.raises(UserError, match='None of the 3 checkpoints .* is whole'):
        resume.latest_valid(tmp_path)


def test_the_named_checkpoint_comes_first(tmp_path, logged):
    """Also before newer files of another training; without a name, the newest file does."""
    runtime.setup()
    old, _, newest = (save(tmp_path, step) for step in (1, 2, 3))
    note = tmp_path / 'last_checkpoint'
    note.write_text(str(old))
    assert resume.latest_valid(tmp_path)[0] == str(old)
    for text in ('', str(tmp_path / 'gone.pth')):
        note.write_text(text)
        assert resume.latest_valid(tmp_path)[0] == str(newest)
    note.unlink()
    shutil.copy(old, tmp_path / 'best_acc_epoch_1.pth')  # written last, but without an optimizer
    assert resume.latest_valid(tmp_path)[0] == str(newest)
    assert not logged


def test_a_work_dir_may_be_moved(tmp_path):
    """The name in last_checkpoint is looked for in the folder where that file is now."""
    runtime.setup()
    (tmp_path / 'here').mkdir()
    save(tmp_path / 'here', 1)
    moved = (tmp_path / 'here').rename(tmp_path / 'there')
    assert resume.latest_valid(moved)[0] == str(moved / 'epoch_1.pth')
    (tmp_path / 'apart').mkdir()  # checkpoints elsewhere, as with CheckpointHook's out_dir
    shutil.copy(moved / 'last_checkpoint', tmp_path / 'apart')
    (tmp_path / 'apart' / 'last_checkpoint').write_text(str(moved / 'epoch_1.pth'))
    assert resume.latest_valid(tmp_path / 'apart')[0] == str(moved / 'epoch_1.pth')


# The config


def test_one_command_starts_and_resumes(tmp_path, logged):
    """With 'auto': from load_from where nothing is saved yet, then from what is."""
    cfg = make_config(tmp_path, 'epochs', resume='auto', load_from='pretrained.pth')
    resume.setup(cfg)
    assert cfg.resume is False and cfg.load_from == 'pretrained.pth'
    runtime.setup()
    file = save(tmp_path, 2)
    cfg = make_config(tmp_path, 'epochs', resume='auto', load_from='pretrained.pth')
    resume.setup(cfg)
    assert cfg.resume is True and cfg.load_from == str(file)
    assert cfg.randomness.seed == 7 and 'seed stays 7' in logged[-1]
    assert cfg.train_dataloader.batch_sampler.iteration == 20


def test_weights_alone_cannot_be_resumed(tmp_path):
    runtime.setup()
    torch.save({'state_dict': {'x': torch.ones(1)}}, tmp_path / 'x.pth')
    cfg = make_config(tmp_path, 'epochs', resume=True, load_from=str(tmp_path / 'x.pth'))
    with pytest.raises(UserError, match='weights without the state of a training'):
        resume.setup(cfg)


def test_a_config_may_be_set_up_twice(tmp_path):
    """As one is that a Runner has dumped: nothing is wrapped again."""
    cfg = make_config(tmp_path, 'iterations')
    inner = dict(type='AspectRatioBatchSampler')
    cfg.train_dataloader.update(drop_last=True, batch_sampler=inner)
    resume.setup(cfg)
    before = copy.deepcopy(cfg._cfg_dict)
    assert before.train_dataloader.batch_sampler == dict(
        type='ResumableBatchSampler', batch_sampler=inner, drop_last=True, endless=True,
        epoch=0, iteration=0,
    )  # fmt: skip
    resume.setup(cfg)
    assert cfg._cfg_dict == before


@pytest.mark.parametrize(
    ('hook', 'kind', 'backend'),
    [
        (dict(), 'ResumableCheckpointHook', dict(backend='atomic')),
        (dict(out_dir='s3://x/'), 'ResumableCheckpointHook', None),
        (dict(backend_args=dict(backend='petrel')), 'ResumableCheckpointHook', 'petrel'),
        (dict(type='MyHook'), 'MyHook', None),
    ],
    ids=['plain', 'remote', 'own_backend', 'own_hook'],
)
def test_only_mmengines_own_hook_is_replaced(hook, kind, backend, tmp_path):
    """And local files alone get the backend."""
    cfg = make_config(tmp_path, 'epochs')
    cfg.default_hooks.checkpoint.update(hook)
    resume.setup(cfg)
    found = cfg.default_hooks.checkpoint
    assert found.type == kind
    assert found.get('backend_args') in (backend, dict(backend=backend))


@pytest.mark.parametrize('hooks', [None, {}, dict(checkpoint=None)])
def test_a_config_without_the_hook_gets_mmengines_default(hooks, tmp_path):
    """Unless it says that it wants none."""
    cfg = make_config(tmp_path, 'epochs', default_hooks=hooks)
    resume.setup(cfg)
    if hooks:
        assert cfg.default_hooks.checkpoint is None
    else:
        assert cfg.default_hooks.checkpoint == dict(
            type='ResumableCheckpointHook', interval=1, backend_args=dict(backend='atomic')
        )


# Same seed, same run


def test_deterministic_trainings_are_the_same(small_config, run_tool, demo_data, tmp_path):
    """Two trainings of a detector with one seed have the same losses and weights, bit for bit."""
    config, data = small_config('det'), ('--data-root', demo_data / 'coco')
    for name in ('one', 'other'):
        try:
            run_tool('train', config, *data, '--work-dir', name, '--seed', 5, '--deterministic')
            assert torch.are_deterministic_algorithms_enabled()
        finally:
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.deterministic = False
    one, other = (last_checkpoint(tmp_path / name) for name in ('one', 'other'))
    losses = [part['message_hub']['log_scalars']['train/loss'].data[0] for part in (one, other)]
    assert len(losses[0]) == 3 and losses[0].tolist() == losses[1].tolist()
    assert all(
        torch.equal(one['state_dict'][key], other['state_dict'][key]) for key in one['state_dict']
    )


# The tool that kills processes, tests/stress/stress_resume.py


@pytest.fixture(scope='module')
def stress():
    spec = importlib.util.spec_from_file_location('stress', REPO / 'tests/stress/stress_resume.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules['stress'] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_tool_sees_a_single_bit(stress):
    """Of a weight, of a loss, of a type; and nothing where there is nothing."""
    nest = {'a': [torch.ones(3), {'b': (1, 0.5, None)}], 'c': np.arange(3)}
    assert stress.same(nest, copy.deepcopy(nest))
    changes = [
        lambda nest: nest['a'][0].view(torch.int32).bitwise_xor_(1),
        lambda nest: nest['a'].__setitem__(0, torch.ones(3, dtype=torch.float64)),
        lambda nest: nest['a'][1].update(b=(1, 0.5, 0)),
        lambda nest: nest['c'].__iadd__(1),
        lambda nest: nest.update(d=1),
        lambda nest: nest['a'].pop(),
    ]
    for change in changes:
        other = copy.deepcopy(nest)
        change(other)
        assert not stress.same(nest, other) and not stress.same(other, nest)


@pytest.mark.parametrize(
    ('different', 'saving', 'message'),
    [({'losses'}, 2, 'ended differently'), (set(), 0, 'Too few kills'), (set(), 2, '')],
)
def test_the_tool_fails_where_a_training_ends_differently(
    stress, different, saving, message, monkeypatch, capsys, tmp_path
):
    """Its table says where, and its exit code that."""

    def run(name, kills, *_):
        return stress.Result(kills, saving, 1, [8], {'weights', 'losses'}, different)

    monkeypatch.setattr(stress, 'stress', run)
    monkeypatch.setattr(stress.subprocess, 'run', lambda *_, **__: None)
    monkeypatch.setattr(sys, 'argv', ['stress_resume.py', '--work-dir', str(tmp_path)])
    if message:
        with pytest.raises(SystemExit) as stop:
            stress.main()
        assert stop.value.code == 1
    else:
        stress.main()
    out, err = capsys.readouterr()
    losses = 'different' if different else 'equal'
    row = f'| detection, by epoch | 4 | {saving} | 1 | 8 | equal | - | - | {losses} | - |'
    assert row in re.sub(' +', ' ', out) and '20 kills' in out and message in err
