"""Kill trainings at random moments, resume them, and compare them with trainings never killed.

Each training is a process of its own: tools/train.py with a small model on the generated data set,
with 2 persistent workers, flip, several scales and drop path. It is killed (SIGKILL), half of the
times while a checkpoint is being written, and started again by the same command, with --resume. In
the end its checkpoint must be the same, bit for bit, as that of a training that ran through.

Example:
    python tests/stress/stress_resume.py --kills 20
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pvt_mm import cli
from pvt_mm.checkpoint.safe_load import read_checkpoint
from pvt_mm.errors import UserError
from pvt_mm.files import PARTIAL
from pvt_mm.tables import text_table

ROOT = Path(__file__).resolve().parents[2]
TRAIN_IMAGES, VAL_IMAGES = 16, 2
SEED = 1
#: Seconds that a training may take; it takes about 15.
LIMIT = 300
MEMBERS = ('weights', 'optimizer', 'EMA', 'losses', 'random state')

COMMON = """
_base_ = {base!r}
arch = dict(
    dims=(16, 32, 40, 64), depths=(1, 1, 1, 1), num_heads=(1, 2, 5, 8), mlp_ratios=(2, 2, 2, 2),
    sr_ratios=(8, 4, 2, 1))
model = dict(
    backbone=dict(_delete_=True, type={backbone!r}, arch=arch, drop_path_rate=0.1),
    neck=dict(in_channels=[16, 32, 40, 64], out_channels=32))
train_dataloader = dict(batch_size=2, num_workers=2, persistent_workers=True)
val_dataloader = dict(batch_size=1, num_workers=1, persistent_workers=True)
default_hooks = dict(logger=dict(interval=4))
"""
DETECTION = """
flip_and_scale = [
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomChoiceResize', scales=[(96, 96), (112, 112), (128, 128)], keep_ratio=True),
]
train_dataloader['dataset'] = dict(
    pipeline=[*_base_.train_pipeline[:2], *flip_and_scale, dict(type='PackDetInputs')])
"""
RETINANET = """
model['bbox_head'] = dict(in_channels=32, feat_channels=32, stacked_convs=1)
"""
MASK_RCNN = """
model['rpn_head'] = dict(in_channels=32, feat_channels=32)
model['roi_head'] = dict(
    bbox_roi_extractor=dict(out_channels=32),
    mask_roi_extractor=dict(out_channels=32),
    bbox_head=dict(in_channels=32, fc_out_channels=64),
    mask_head=dict(in_channels=32, num_convs=1, conv_out_channels=32))
"""
SEGMENTATION = """
model['decode_head'] = dict(in_channels=[32, 32, 32, 32], channels=32)
model['data_preprocessor'] = dict(size=(96, 96))
train_dataloader['dataset'] = dict(pipeline=[
    *_base_.train_pipeline[:2],
    dict(type='RandomResize', scale=(480, 120), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(96, 96), cat_max_ratio=0.9),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')])
"""
BY_EPOCH = """
train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=4, val_interval=2)
train_dataloader['sampler'] = dict(_delete_=True, type='DefaultSampler', shuffle=True)
default_hooks['checkpoint'] = dict(by_epoch=True, interval=1, max_keep_ckpts=1)
"""
BY_ITERATION = """
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=32, val_interval=16)
train_dataloader['sampler'] = dict(_delete_=True, type='InfiniteSampler', shuffle=True)
default_hooks['checkpoint'] = dict(by_epoch=False, interval=7, max_keep_ckpts=2)
"""
EMA = """
custom_hooks = [dict(type='PVTCheckpointHook'), dict(type='EMAHook', momentum=0.1)]
"""
BEST = """
default_hooks['checkpoint'].update(save_best='mIoU')
"""
WITHIN_EPOCHS = """
default_hooks['checkpoint'].update(by_epoch=False, interval=3)
"""
RETINANET_BASE = ('demo_retinanet_pvt_t.py', 'PVT', DETECTION + RETINANET)
MASK_RCNN_BASE = ('demo_mask_rcnn_pvt_v2_b0.py', 'PVTv2', DETECTION + MASK_RCNN)
FPN_BASE = ('demo_fpn_pvt_t.py', 'PVT', SEGMENTATION)
#: Name -> base config, backbone, and what is different.
VARIANTS = {
    'detection, by epoch': (*RETINANET_BASE, BY_EPOCH),
    'instances, by iteration, EMA': (*MASK_RCNN_BASE, BY_ITERATION + EMA),
    'segmentation, by epoch, best kept': (*FPN_BASE, BY_EPOCH + BEST),
    'segmentation, by iteration': (*FPN_BASE, BY_ITERATION),
    'detection, saved within epochs': (*RETINANET_BASE, BY_EPOCH + WITHIN_EPOCHS),
}


@dataclass
class Result:
    """What a variant's trainings went through, and what was different in the end."""

    kills: int = 0
    while_saving: int = 0
    trainings: int = 0
    resumed_from: list[int] = field(default_factory=list)
    members: set[str] = field(default_factory=set)
    different: set[str] = field(default_factory=set)


# One process


class Training:
    """A training that can be started, killed and started again."""

    def __init__(self, config: Path, data: Path, work_dir: Path) -> None:
        self.work_dir = work_dir
        self.log = work_dir.with_suffix('.log')
        self.left: set[tuple[str, int]] = set()
        shutil.rmtree(work_dir, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        self.command = [
            *(sys.executable, ROOT / 'tools/train.py', config, '--data-root', data),
            *('--work-dir', work_dir, '--seed', SEED, '--deterministic', '--resume'),
        ]  # fmt: skip

    def start(self) -> subprocess.Popen:
        """Start a process, in a session of its own so that its workers can be killed with it."""
        with self.log.open('a') as log:
            return subprocess.Popen(
                [str(part) for part in self.command],
                cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def partial(self) -> set[tuple[str, int]]:
        """Return name and time of the checkpoints that are being written, not those left before."""
        found = set()
        for file in self.work_dir.glob(f'.*.pth{PARTIAL}'):
            with contextlib.suppress(FileNotFoundError):  # it was renamed since
                found.add((file.name, file.stat().st_mtime_ns))
        return found - self.left

    def killed_while_saving(self) -> bool:
        """Tell whether the last kill has left a file half written."""
        found = self.partial()
        self.left |= found
        return bool(found)

    def runs(self) -> int:
        """Count the runs that have come as far as opening their log."""
        return len(list(self.work_dir.glob('*/*.log')))

    def saved(self) -> int:
        """Return the step of the last checkpoint, 0 without one."""
        note = self.work_dir / 'last_checkpoint'
        return int(re.findall(r'\d+', Path(note.read_text()).stem)[-1]) if note.is_file() else 0

    def resumed_from(self) -> list[int]:
        """Return the iterations that processes started from, but for the first of them."""
        starts = re.findall(r'resumed epoch: \d+, iter: (\d+)|no checkpoint yet', self.text())
        return [int(found or 0) for found in starts[1:]]

    def text(self) -> str:
        return self.log.read_text()

    def checkpoint(self) -> dict[str, Any]:
        """Read the last checkpoint."""
        return read_checkpoint((self.work_dir / 'last_checkpoint').read_text())


def finish(training: Training, process: subprocess.Popen) -> None:
    """Wait for the end of a process that nobody kills.

    Raises:
        UserError: Where it fails.
    """
    try:
        code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        kill(process)
        code = -signal.SIGKILL
    if code:
        tail = '\n'.join(training.text().splitlines()[-15:])
        raise UserError(f'a training ended with code {code}; see {training.log}:\n{tail}')


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Any, process: subprocess.Popen) -> bool:
    """Wait until a condition holds; return False where the process ends first."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.0002)
    return False


def reach_save(training: Training, process: subprocess.Popen, number: int) -> bool:
    """Wait until a process writes a checkpoint, its first, second, ...; False where it ends."""
    for last in range(number, 0, -1):
        if not wait_for(training.partial, process):
            return False
        if last > 1:
            wait_for(lambda: not training.partial(), process)
    return True


# One variant


def full_run(training: Training) -> float:
    """Train without interruption and return the seconds from the opening of the log to the end."""
    process = training.start()
    wait_for(training.runs, process)
    start = time.monotonic()
    finish(training, process)
    return time.monotonic() - start


def killed_run(
    training: Training, kills: int, seconds: float, last: int, rng: random.Random, result: Result
) -> None:
    """Train with some kills, as long as the training does not end before one of them."""
    for number in range(kills):
        before = training.runs()
        process = training.start()
        if number % 2 == 0:
            alive = reach_save(training, process, rng.randint(1, 3))
        else:
            alive = wait_for(lambda: training.runs() > before, process)  # noqa: B023
            end = time.monotonic() + rng.random() * seconds * (1 - training.saved() / last)
            alive = alive and wait_for(lambda: time.monotonic() > end, process)  # noqa: B023
        if not alive:
            break
        kill(process)
        result.kills += 1
        result.while_saving += training.killed_while_saving()
    else:
        process = training.start()
    finish(training, process)


def members(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what is compared of a checkpoint, by name."""
    logs = checkpoint['message_hub']['log_scalars']
    losses = {
        key: log.data
        for key, log in logs.items()
        if key.startswith('train/') and not key.endswith(('time', 'memory'))
    }
    progress = {key: checkpoint['meta'][key] for key in ('epoch', 'iter', 'seed')}
    return {
        'weights': checkpoint['state_dict'],
        'optimizer': [checkpoint['optimizer'], checkpoint['param_schedulers'], progress],
        'EMA': checkpoint.get('ema_state_dict'),
        'losses': losses,
        'random state': checkpoint['random_states'],
    }


def same(one: Any, other: Any) -> bool:
    """Tell whether two nests of dicts, lists, tensors and numbers are equal, bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return one == other


def stress(name: str, kills: int, data: Path, folder: Path, rng: random.Random) -> Result:
    """Train a variant without kills, then with them, as often as it takes.

    Raises:
        UserError: Where a training fails, or leaves a file half written.
    """
    base, backbone, parts, schedule = VARIANTS[name]
    config = folder / f'{name.replace(", ", "_").replace(" ", "_")}.py'
    text = COMMON.format(base=str(ROOT / 'configs' / base), backbone=backbone)
    config.write_text(text + parts + schedule)
    data = data / ('ade' if parts == SEGMENTATION else 'coco')
    whole = Training(config, data, config.with_name(f'{config.stem}_whole'))
    seconds = full_run(whole)
    expected = members(whole.checkpoint())
    result = Result(members={key for key in expected if expected[key] is not None})
    while result.kills < kills:
        result.trainings += 1
        killed = Training(
            config, data, config.with_name(f'{config.stem}_killed_{result.trainings}')
        )
        killed_run(killed, kills - result.kills, seconds, whole.saved(), rng, result)
        result.resumed_from += killed.resumed_from()
        if list(killed.work_dir.glob(f'.*{PARTIAL}')):
            raise UserError(f'{killed.work_dir} holds a file half written.')
        found = members(killed.checkpoint())
        result.different |= {key for key in expected if not same(expected[key], found[key])}
    return result


# All variants


def table(results: dict[str, Result]) -> str:
    """Return the table in Markdown."""
    head = ('training', 'kills', 'while saving', 'trainings', 'resumed from iteration', *MEMBERS)
    rows = []
    for name, result in results.items():
        equal = [
            'different'
            if member in result.different
            else 'equal'
            if member in result.members
            else '-'
            for member in MEMBERS
        ]
        steps = ', '.join(map(str, sorted(result.resumed_from)))
        counts = (result.kills, result.while_saving, result.trainings)
        rows.append((name, *map(str, counts), steps, *equal))
    return text_table(head, rows, markdown=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kills', type=int, default=20, help='in all (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of the moments (default: 0)')
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/stress_resume'),
        help='data, logs and checkpoints (default: %(default)s)',
    )
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    if args.kills < 1:
        raise UserError(f'--kills {args.kills}: kill at least once.')
    folder = args.work_dir.resolve()
    make = [sys.executable, str(ROOT / 'tools/demo/make_demo_data.py')]
    make += ['--out', str(folder / 'data')]
    subprocess.run(
        [*make, '--train', str(TRAIN_IMAGES), '--val', str(VAL_IMAGES)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    rng = random.Random(args.seed)
    results: dict[str, Result] = {}
    names = list(VARIANTS)[: args.kills]
    start = time.monotonic()
    for place, name in cli.track(enumerate(names), len(names), 'trainings'):
        kills = len(range(place, args.kills, len(names)))
        results[name] = result = stress(name, kills, folder / 'data', folder, rng)
        print(
            f'{name}: {result.kills} kills, '
            f'different: {", ".join(sorted(result.different)) or "nothing"}',
            flush=True,
        )
    print(f'\n{table(results)}\n')
    kills = sum(result.kills for result in results.values())
    saving = sum(result.while_saving for result in results.values())
    print(f'{kills} kills, {saving} of them while a checkpoint was being written', end='')
    print(f'; {(time.monotonic() - start) / 60:.1f} minutes')
    if any(result.different for result in results.values()):
        raise UserError('A resumed training ended differently; see the table.')
    if saving < kills // 4:
        raise UserError('Too few kills fell into a save to tell; try another --seed.')


if __name__ == '__main__':
    main()
