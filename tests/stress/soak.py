"""Train and test a detector and a segmentor for long and watch their memory (on Linux).

The demo's models run on generated images, with a data loader's worker that lives as long as they
do. After as many to warm up, the resident memory of the process and of its workers must stay flat
over N iterations and N images: a straight line through it may rise by LIMIT megabytes at most.
Ends with 1 where it rises by more.

Example:
    python tests/stress/soak.py --iterations 500
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner

from pvt_mm import cli
from pvt_mm.config import LOADERS, load_config
from pvt_mm.engine import build_runner
from pvt_mm.errors import UserError
from pvt_mm.tables import text_table

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {'det': 'demo_retinanet_pvt_t.py', 'seg': 'demo_fpn_pvt_t.py'}
DATA = {'det': 'coco', 'seg': 'ade'}
TRAIN_IMAGES = 240
WARM_UP = 0.5  # of a run: the allocator has met most sizes of batches by then
LIMIT = 20.0  # megabytes that a line through the samples may rise by
PRINTED = 6  # columns of the table


@dataclass
class Series:
    """Resident memory, in megabytes, after so many iterations or images."""

    name: str
    counts: list[int] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)

    def rise(self) -> float:
        """Return how far a straight line rises from the end of the warm-up to the last sample."""
        counts, sizes = np.array(self.counts), np.array(self.sizes)
        late = counts >= counts[-1] * WARM_UP
        slope = np.polyfit(counts[late], sizes[late], 1)[0]
        return float(slope * (counts[-1] - counts[late][0]))

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        marks = [self.counts[-1] * (i + 1) / PRINTED for i in range(PRINTED)]
        printed = [self.sizes[int(np.searchsorted(self.counts, mark))] for mark in marks]
        return (self.name, *(f'{size:.0f}' for size in printed), f'{self.rise():+.1f}')


class MemoryHook(Hook):
    """Note the memory every few iterations of training and images of testing."""

    priority = 'LOWEST'

    def __init__(self, task: str, every: int = 5) -> None:
        self.every = every
        self.training, self.testing = Series(f'{task}, training'), Series(f'{task}, testing')
        self.images = 0

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Take a sample."""
        self.take(self.training, runner.iter + 1)

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Take a sample."""
        self.images += len(outputs)
        self.take(self.testing, self.images)

    def take(self, series: Series, count: int) -> None:
        """Add a sample to a series if it is time."""
        if not series.counts or count >= series.counts[-1] + self.every:
            series.counts.append(count)
            series.sizes.append(resident())


def resident() -> float:
    """Return the resident megabytes of this process and of the workers that it has started.

    A page that several processes share counts once, in shares (PSS): a forked worker has its
    parent's pages, and each that it touches would seem to be new.
    """
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    rollups = [Path(f'/proc/{pid}/smaps_rollup').read_text() for pid in processes]
    return sum(int(re.findall(r'^Pss: +(\d+) kB$', text, re.M)[0]) for text in rollups) / 1024


def watch(task: str, config: str, data: str, iterations: int, work_dir: str) -> list[Series]:
    """Train a config for so many iterations, test it, and return the memory of both."""
    cfg = load_config(config, data_root=data)
    for loader in LOADERS:
        cfg[loader].update(num_workers=1, persistent_workers=True)
    cfg.train_cfg = dict(by_epoch=False, max_iters=iterations, val_interval=iterations + 1)
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', by_epoch=False, interval=max(iterations // PRINTED, 1),
        max_keep_ckpts=1,
    )  # fmt: skip
    cfg.log_processor = dict(by_epoch=False)
    cfg.param_scheduler = []
    cfg.work_dir = work_dir
    runner = build_runner(cfg, config=config, train=True)
    hook = MemoryHook(task)
    runner.register_hook(hook)
    runner.train()
    runner.test()
    return [hook.training, hook.testing]


def soak(iterations: int) -> list[Series]:
    """Watch every task, each in a new process, which starts with nothing to spare."""
    rows: list[Series] = []
    total = round(iterations / (1 - WARM_UP))
    with tempfile.TemporaryDirectory() as folder:
        make = [sys.executable, str(ROOT / 'tools/demo/make_demo_data.py')]
        make += ['--out', f'{folder}/data', '--train', str(TRAIN_IMAGES), '--val', str(total)]
        subprocess.run(make, check=True)
        for task, config in CONFIGS.items():
            path, data = str(ROOT / 'configs' / config), f'{folder}/data/{DATA[task]}'
            arguments = (task, path, data, total, f'{folder}/{task}')
            with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
                rows += pool.submit(watch, *arguments).result()
    return rows


def memory_table(rows: list[Series]) -> str:
    """Return lines of what was run, the memory on the way and how far the line rises."""
    marks = (f'{i + 1}/{PRINTED}' for i in range(PRINTED))
    return text_table(('MB resident after', *marks, 'rise'), (row.cells() for row in rows))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--iterations',
        type=int,
        default=500,
        metavar='N',
        help='of training, and images of testing, after as many to warm up (default: 500)',
    )
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    iterations = parse_args().iterations
    if iterations < 50:
        raise UserError(f'--iterations {iterations}: a line needs 50 or more.')
    rows = soak(iterations)
    print(f'\n{memory_table(rows)}')
    grown = ', '.join(row.name for row in rows if row.rise() > LIMIT)
    print(f'\n{iterations} iterations and images each, after as many to warm up; ', end='')
    print(f'grown: {grown or "none"}')
    sys.exit(1 if grown else 0)


if __name__ == '__main__':
    main()
