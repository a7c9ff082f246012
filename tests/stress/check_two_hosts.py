"""Check training on two machines: two network namespaces of this one, joined by a cable of its own.

Each is a host with an address, an interface and a name that nothing resolves, and starts
``bash tools/dist_train.sh CONFIG 1`` with NNODES=2, NODE_RANK and MASTER_ADDR.

- It trains and validates; after every iteration both hosts hold the same weights.
- It resumes, both hosts where they stopped.
- A host that finds no checkpoint where the other one does is named, on both.
- A host whose cable is cut, or whose processes are killed, ends the other one with a sentence.

Needs Linux, root and iproute2. Ends with 1 where one of them does not hold.

Example:
    python tests/stress/check_two_hosts.py
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import check_distributed
from check_distributed import ROOT

from pvt_mm import cli
from pvt_mm.errors import UserError

#: Names of the namespaces, and the addresses of the cable's ends (documentation's, RFC 5737).
HOSTS = ('pvt_mm_a', 'pvt_mm_b')
ADDRESSES = ('192.0.2.1', '192.0.2.2')
CABLE = ('pvt_mm0', 'pvt_mm1')
#: Seconds that a host waits for the other, and that ending may take beside them.
TIMEOUT, PATIENCE = 20, 60
LIMIT = 400  # seconds after which a launch is ended from here
#: What both say who lose the other.
LOST = 'the connection to another process of it was lost'
SMALL = (
    'arch=dict(dims=(16, 32, 40, 64), depths=(1, 1, 1, 1), num_heads=(1, 2, 5, 8), '
    'mlp_ratios=(2, 2, 2, 2), sr_ratios=(8, 4, 2, 1))'
)
#: Over check_distributed's CONFIG: a small model, and a checkpoint at the end.
MODEL = f"""
env_cfg = dict(dist_cfg=dict(timeout={TIMEOUT}))
default_hooks = dict(checkpoint=dict(interval=4), logger=dict(interval=1))
val_dataloader = dict(num_workers=0, persistent_workers=False)
model = dict(
    backbone=dict(_delete_=True, type='PVT', {SMALL}),
    neck=dict(in_channels=[16, 32, 40, 64], out_channels=32),
    decode_head=dict(in_channels=[32, 32, 32, 32], channels=32))
"""


def ip(*words: str) -> None:
    subprocess.run(['ip', *words], check=True)


def connect() -> None:
    """Make the two hosts and their cable."""
    for host in HOSTS:
        ip('netns', 'add', host)
        ip('-n', host, 'link', 'set', 'lo', 'up')
    ends = [word for host, end in zip(HOSTS, CABLE) for word in (end, host)]
    ip('link', 'add', ends[0], 'netns', ends[1], 'type', 'veth', 'peer', ends[2], 'netns', ends[3])
    for host, end, address in zip(HOSTS, CABLE, ADDRESSES):
        ip('-n', host, 'address', 'add', f'{address}/24', 'dev', end)
        ip('-n', host, 'link', 'set', end, 'up')


def disconnect() -> None:
    """Remove the hosts, with what still runs in them."""
    for host in HOSTS:
        kill(host)
        subprocess.run(['ip', 'netns', 'delete', host], stderr=subprocess.DEVNULL)


def processes(host: str) -> list[int]:
    """Return the processes that run on a host."""
    found = subprocess.run(['ip', 'netns', 'pids', host], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def kill(host: str) -> None:
    """End all processes of a host at once, as when its power fails."""
    for process in processes(host):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:  # it has just ended
            continue


class Launch:
    """One training on both hosts.

    Args:
        config: Its config.
        folder: Takes each host's output.
        arguments: More of train.py's, one list a host.
    """

    def __init__(self, config: Path, folder: Path, arguments: tuple[list[str], list[str]]) -> None:
        self.outputs = [folder / f'host_{rank}.txt' for rank in range(2)]
        self.started = [self._start(rank, config, arguments[rank]) for rank in range(2)]

    def _start(self, rank: int, config: Path, arguments: list[str]) -> subprocess.Popen:
        paths = [str(Path(check_distributed.__file__).parent), os.environ.get('PYTHONPATH', '')]
        environment = {
            'NNODES': '2',
            'NODE_RANK': str(rank),
            'MASTER_ADDR': ADDRESSES[0],
            'OMP_NUM_THREADS': '1',
            'PYTHONWARNINGS': 'ignore',
            'PYTHONPATH': os.pathsep.join(filter(None, paths)),
            'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
        }
        script = f'hostname host-{rank}; exec bash "$@"'
        train = [str(ROOT / 'tools/dist_train.sh'), str(config), '1', *arguments]
        with self.outputs[rank].open('w') as output:
            return subprocess.Popen(
                [
                    'ip',
                    'netns',
                    'exec',
                    HOSTS[rank],
                    'unshare',
                    '--uts',
                    'sh',
                    '-c',
                    script,
                    'sh',
                    *train,
                ],
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self, seconds: float = LIMIT) -> list[int]:
        """Return the exit codes; a host that does not end in time is ended, with -9."""
        end = time.monotonic() + seconds
        for started, host in zip(self.started, HOSTS):
            try:
                started.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                kill(host)
                started.wait()
        return [started.returncode for started in self.started]

    def says(self) -> list[str]:
        """Return what each host printed so far."""
        return [output.read_text() for output in self.outputs]


def write(folder: Path, data: Path, schedule: str) -> Path:
    """Write a config whose ranks note what they have after every iteration."""
    folder.mkdir(parents=True, exist_ok=True)
    base, out = str(ROOT / 'configs' / check_distributed.TASKS['seg'][0]), str(folder)
    text = check_distributed.CONFIG.format(
        base=base, out=out, fault=None, workers=0, schedule=schedule
    )
    config = folder / 'config.py'
    config.write_text(f'{text}{MODEL}\ndata_root = {str(data)!r}\n')
    return config


def iterations(folder: Path) -> list[list[str]]:
    """Return each host's hashes of its weights, one an iteration."""
    files = [folder / f'rank_{rank}.jsonl' for rank in range(2)]
    lines = [file.read_text().splitlines() if file.is_file() else [] for file in files]
    return [[json.loads(line)['digest'] for line in own] for own in lines]


def expect(fact: bool, complaint: str, launch: Launch) -> None:
    """Stop where something does not hold, with the end of what both hosts said."""
    if not fact:
        ends = '\n'.join(
            f'--- host {rank}\n{text[-2500:]}' for rank, text in enumerate(launch.says())
        )
        raise UserError(f'{complaint}\n{ends}')


def check_training(data: Path, folder: Path) -> str:
    """Train and validate."""
    config = write(folder, data, 'train_cfg = dict(max_iters=4, val_interval=4)')
    launch = start(config, folder, data)
    codes = launch.wait()
    expect(codes == [0, 0], f'ended with {codes}', launch)
    first, second = iterations(folder)
    expect(len(first) == 4 and first == second and len(set(first)) == 4, 'weights differ', launch)
    expect('mIoU' in launch.says()[0], 'not validated', launch)
    return '4 iterations, the same weights on both after each, validated'


def check_resume(data: Path, folder: Path) -> str:
    """Go on with the training of :func:`check_training`."""
    config = write(folder, data, 'train_cfg = dict(max_iters=8, val_interval=4)')
    launch = start(config, folder, data, ['--resume'], ['--resume'])
    codes = launch.wait()
    expect(codes == [0, 0], f'ended with {codes}', launch)
    first, second = iterations(folder)
    expect(len(first) == 8 and first == second and len(set(first)) == 8, 'weights differ', launch)
    return 'iterations 5 to 8, the same weights on both after each'


def check_apart(data: Path, folder: Path) -> str:
    """Resume with a work dir that has a checkpoint on the first host alone."""
    config = write(folder, data, 'train_cfg = dict(max_iters=12, val_interval=4)')
    elsewhere = ['--resume', '--work-dir', str(folder / 'other')]
    launch = start(config, folder, data, ['--resume'], elsewhere)
    codes = launch.wait(2 * PATIENCE)
    words = 'The processes would not resume from the same checkpoint'
    told = [words in text for text in launch.says()]
    expect(codes == [1, 1] and all(told), f'ended with {codes}', launch)
    expect(len(iterations(folder)[0]) == 8, 'trained on', launch)
    return sentence(launch.says()[0], words)


def check_cut(data: Path, folder: Path, how: str) -> str:
    """Take one host away in the middle of a training."""
    config = write(folder, data, 'train_cfg = dict(max_iters=100000, val_interval=100000)')
    launch = start(config, folder, data)
    begun = time.monotonic()
    while min(map(len, iterations(folder))) < 3:
        expect(time.monotonic() < begun + LIMIT, 'never began', launch)
        expect(all(s.poll() is None for s in launch.started), 'ended before the cut', launch)
        time.sleep(0.2)
    lost = [0, 1]
    if how == 'cable cut':
        ip('-n', HOSTS[1], 'link', 'set', CABLE[1], 'down')
    else:
        gone = int(how.split()[1])
        lost.remove(gone)
        kill(HOSTS[gone])
    cut = time.monotonic()
    codes = launch.wait(TIMEOUT + PATIENCE)
    seconds = time.monotonic() - cut
    ip('-n', HOSTS[1], 'link', 'set', CABLE[1], 'up')
    for rank in lost:
        expect(codes[rank] == 1, f'host {rank} ended with {codes[rank]}', launch)
        expect(LOST in launch.says()[rank], f'host {rank} does not say why', launch)
        expect(not processes(HOSTS[rank]), f'host {rank} has processes left', launch)
    return f'{"both end" if len(lost) == 2 else "the other ends"} after {seconds:.0f} s'


def sentence(output: str, words: str) -> str:
    """Return the line of an output that has some words."""
    return next(line for line in output.splitlines() if words in line).removeprefix('error: ')


def start(config: Path, folder: Path, data: Path, *more: list[str]) -> Launch:
    """Launch a training on both hosts."""
    common = ['--work-dir', str(folder / 'run'), '--data-root', str(data), '--seed', '0']
    first, second = more or ([], [])
    return Launch(config, folder, (common + first, common + second))


def all_checks(folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the name of each check, and what runs it."""
    data = folder / 'data'
    make = [sys.executable, str(ROOT / 'tools/demo/make_demo_data.py'), '--out', str(data)]
    subprocess.run([*make, '--train', '8', '--val', '2'], check=True, stdout=subprocess.DEVNULL)
    yield 'trains, validates', partial(check_training, data / 'ade', folder / 'run')
    yield 'resumes', partial(check_resume, data / 'ade', folder / 'run')
    yield 'checkpoint on one host', partial(check_apart, data / 'ade', folder / 'run')
    for how in ('cable cut', 'host 1 killed', 'host 0 killed'):
        yield how, partial(check_cut, data / 'ade', folder / how.replace(' ', '_'), how)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    parse_args()
    if sys.platform != 'linux' or os.geteuid():
        raise UserError('Network namespaces need Linux and root; run it there with sudo.')
    if shutil.which('ip') is None:
        raise UserError('Network namespaces need the command ip: apt-get install iproute2.')
    failed = 0
    disconnect()  # what an interrupted run has left
    connect()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, check in all_checks(Path(folder)):
                try:
                    print(f'{name:22} {check()}', flush=True)
                except UserError as error:
                    failed += 1
                    print(f'{name:22} FAILED: {error}', flush=True)
    finally:
        disconnect()
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
