"""Times test and training, idle and beside one busy process, by how OpenMP's threads wait.

Runs tools/train.py and tools/test.py on the demo's data: with threads that sleep while they wait,
as the tools have them, and with threads that first spin 300,000 times, as OpenMP (libgomp) has them
otherwise. Needs a machine that is otherwise idle, and about 15 minutes on two cores. Prints seconds
per iteration, medians of the repeats.

Example:
    python tests/stress/busy_machine.py --repeats 3
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = 'configs/demo_retinanet_pvt_t.py'
WAITS = {
    'spinning': {'GOMP_SPINCOUNT': '300000'},
    'sleeping': {'OMP_WAIT_POLICY': 'PASSIVE'},
}
TRAINING = [
    'train_cfg.max_epochs=1',
    'train_cfg.val_interval=9',
    'train_dataloader.dataset.indices=96',
    'default_hooks.checkpoint.interval=9',
    'default_hooks.logger.interval=1',
    'default_hooks.checkpoint.save_last=True',
]


@contextlib.contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """Keep one core busy meanwhile, by a process that never waits."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, '-c', 'while True: pass'])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run_tool(wait: str, tool: str, *arguments: str) -> None:
    """Run a tool of ours with a way to wait."""
    command = [sys.executable, '-W', 'ignore', f'tools/{tool}', CONFIG, *arguments]
    environment = os.environ | WAITS[wait]
    subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)


def seconds_of_training(wait: str, folder: Path) -> float:
    """Return the median seconds of a training iteration, the first ones left out."""
    run_tool(wait, 'train.py', '--work-dir', str(folder), '--seed', '0', '--cfg-options', *TRAINING)
    (log,) = folder.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return statistics.median(line['time'] for line in lines[4:] if 'loss' in line)


def seconds_of_test(wait: str, folder: Path, checkpoint: Path) -> float:
    """Return the mean seconds of a test iteration."""
    run_tool(wait, 'test.py', str(checkpoint), '--work-dir', str(folder))
    (scores,) = folder.glob('*/*.json')
    return json.loads(scores.read_text())['time']


def measure(repeats: int) -> dict[tuple[str, str, bool], float]:
    """Return the median seconds by what is run, how threads wait, and whether a core is busy."""
    seconds: dict[tuple[str, str, bool], list[float]] = {}
    for _ in range(repeats):
        for wait in WAITS:
            for loaded in (False, True):
                time.sleep(5)
                with tempfile.TemporaryDirectory() as name, busy(loaded):
                    folder = Path(name)
                    training = seconds_of_training(wait, folder / 'train')
                    checkpoint = next((folder / 'train').glob('*.pth'))
                    test = seconds_of_test(wait, folder / 'test', checkpoint)
                seconds.setdefault(('training', wait, loaded), []).append(training)
                seconds.setdefault(('test', wait, loaded), []).append(test)
    return {key: statistics.median(values) for key, values in seconds.items()}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--repeats', type=int, default=3, help='times that each is run (default: %(default)s)'
    )
    args = parser.parse_args()
    subprocess.run([sys.executable, 'tools/demo/make_demo_data.py'], cwd=ROOT, check=True)
    seconds = measure(args.repeats)
    print(f'{"":10}{"threads":10}{"idle, s":>10}{"busy, s":>10}{"busy : idle":>14}')
    for task in ('training', 'test'):
        for wait in WAITS:
            idle, loaded = (seconds[task, wait, state] for state in (False, True))
            print(f'{task:10}{wait:10}{idle:10.3f}{loaded:10.3f}{loaded / idle:14.2f}')


if __name__ == '__main__':
    main()
