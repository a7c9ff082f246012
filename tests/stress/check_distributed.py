"""Check training in two processes over gloo, as tools/dist_train.sh starts it.

- The gradients of two processes are those of one with the doubled batch.
- Detector and segmentor: after every iteration both ranks hold the same weights and statistics, and
  the loss falls.
- A rank or a data loader's worker that fails, or is killed, ends the launch with its own words.
- A port that is taken is named.

Ends with 1 where one of them does not hold.

Example:
    python tests/stress/check_distributed.py
"""

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODEL_WRAPPERS, MODELS, TRANSFORMS
from torch import Tensor, nn

from pvt_mm import cli
from pvt_mm.engine import runtime
from pvt_mm.engine.distributed import shutdown_distributed
from pvt_mm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
#: The demos' configs, and a schedule of a few iterations.
TASKS = {
    'det': ('demo_retinanet_pvt_t.py', 'train_cfg = dict(max_epochs=10, val_interval=10)'),
    'seg': ('demo_fpn_pvt_t.py', 'train_cfg = dict(max_iters=20, val_interval=20)'),
}
BACKBONES = [dict(type='PVT', arch='tiny'), dict(type='PVTv2', arch='b0')]
#: How a rank or a worker may fail, and one of what the launch must then say.
FAULTS = {
    'rank raises': ('RuntimeError: rank 1 has had enough',),
    'worker raises': ('RuntimeError: a worker of rank 1 has had enough',),
    'rank killed': ('Signal 9 (SIGKILL)',),
    'worker killed': ('is killed by signal: Killed', 'exited unexpectedly'),
}
#: Seconds within which a launch must have ended.
PATIENCE = 60
LIMIT = 600  # seconds after which a launch is ended from here
#: A variable that tells the processes of a launch from others.
MARK = 'PVT_MM_CHECK_DISTRIBUTED'
#: How far apart the gradients of the two ways may be, over the largest one.
TOLERANCE = 2e-5
BATCH, SIDE = 2, 256  # an image large enough for the kernels of attention

# All that a launch needs beside the config: this module, which `launch` puts on Python's path.
CONFIG = """
_base_ = {base!r}
custom_imports = dict(imports=['pvt_mm', 'check_distributed'], allow_failed_imports=False)
custom_hooks = [
    dict(type='PVTCheckpointHook'), dict(type='RankProbe', out={out!r}, fault={fault!r})
]
param_scheduler = []
train_pipeline = [
    dict(type='FailingTransform', out={out!r}, fault={fault!r}), *_base_.train_pipeline
]
train_dataloader = dict(
    num_workers={workers}, persistent_workers={workers} > 0, dataset=dict(pipeline=train_pipeline)
)
{schedule}
"""


# In the launched processes


@HOOKS.register_module(force=True)  # this file may be imported twice
class RankProbe(Hook):
    """Write each rank's loss and a hash of its model after every iteration; fail if told to.

    Args:
        out: Folder of the files: one per rank, with one JSON object per line.
        fault: One of FAULTS, or None; the second rank fails at its third iteration.
    """

    def __init__(self, out: str, fault: str | None = None) -> None:
        self.out = Path(out)
        self.fault = fault

    def before_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Fail, if told to."""
        if self.fault and self.fault.startswith('rank') and runner.rank == 1 and runner.iter == 2:
            fail(self.out, self.fault)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Write a line."""
        digest = hashlib.sha256()
        for value in runner.model.state_dict().values():
            digest.update(value.contiguous().numpy().tobytes())
        line = {'loss': float(outputs['loss']), 'digest': digest.hexdigest()}
        with open(self.out / f'rank_{runner.rank}.jsonl', 'a') as file:
            print(json.dumps(line), file=file)


@TRANSFORMS.register_module(force=True)
class FailingTransform:
    """Fail at the sixth image that the second rank's worker reads, if told to.

    Args:
        out: Folder that takes the time of the fault.
        fault: One of FAULTS, or None.
    """

    def __init__(self, out: str, fault: str | None = None) -> None:
        self.out = Path(out)
        own = fault is not None and fault.startswith('worker') and os.environ['RANK'] == '1'
        self.fault = fault if own else None
        self.count = 0

    def __call__(self, results: dict) -> dict:
        """Return what came, or fail."""
        self.count += 1
        if self.fault and self.count == 6:
            fail(self.out, self.fault)
        return results


def fail(out: Path, fault: str) -> None:
    """Note the time, then raise an error or take this process's life."""
    (out / 'failed_at').write_text(str(time.time()))
    who, how = fault.split()
    if how == 'killed':
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError(f'{"a worker of " * (who == "worker")}rank 1 has had enough')


def gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return the gradients of a mean over samples of each sample's own loss."""
    outs = model(images)
    sum(out.sin().flatten(1).mean(1) for out in outs).mean().backward()
    return [grad for parameter in model.parameters() if (grad := parameter.grad) is not None]


def images(count: int) -> Tensor:
    """Draw images that depend on nothing but their number."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def build(backbone: dict[str, Any]) -> nn.Module:
    """Build a backbone, each time with the same weights."""
    torch.manual_seed(0)
    return MODELS.build(backbone)


def rank_gradients(backbones: list[dict[str, Any]], out: str) -> None:
    """Compute the gradients in one of the launched processes, on its share of the images."""
    cfg = Config(dict(launcher='pytorch'))
    runtime.setup(cfg)
    own = images(2 * BATCH)[get_rank() * BATCH :][:BATCH]
    grads = []
    for backbone in backbones:
        model = MODEL_WRAPPERS.build(dict(**cfg.model_wrapper_cfg, module=build(backbone)))
        grads += gradients(model, own)
    torch.save(grads, f'{out}/gradients_{get_rank()}.pth')
    shutdown_distributed()


# From the outside


def launch(*arguments: Any, **environment: str) -> tuple[int, str]:
    """Run dist_launch.sh with two processes.

    Returns:
        The exit code, or that of a killed process where it did not end, and the output.
    """
    first = dict(PATH=Path(sys.executable).parent, PYTHONPATH=Path(__file__).parent)
    own = {
        name: os.pathsep.join([str(place), *filter(None, [os.environ.get(name)])])
        for name, place in first.items()
    }
    process = subprocess.Popen(
        ['bash', str(ROOT / 'tools/dist_launch.sh'), '2', *map(str, arguments)],
        env={**os.environ, 'PYTHONWARNINGS': 'ignore', **own, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = process.communicate(timeout=LIMIT)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes
        output = process.communicate()[0]
    return process.returncode, output


def train(
    config: Path, schedule: str, data: Path, folder: Path, fault: str | None = None
) -> tuple[int, str]:
    """Train a config in two processes, each with its probe; see :func:`launch`."""
    folder.mkdir(parents=True)
    leaf = folder / 'config.py'
    workers = 1 if fault else 0
    leaf.write_text(
        CONFIG.format(
            base=str(config), out=str(folder), fault=fault, workers=workers, schedule=schedule
        )
    )
    arguments = ('--work-dir', folder / 'run', '--data-root', data, '--seed', 0)
    return launch('train.py', leaf, *arguments, **{MARK: str(folder)})


def check_gradients(backbones: list[dict[str, Any]], folder: Path) -> str:
    """Compare the gradients of two processes with those of one.

    Raises:
        UserError: Where they differ.
    """
    folder.mkdir(parents=True)
    arguments = ('--backbones', json.dumps(backbones), '--out', folder)
    code, output = launch('../tests/stress/check_distributed.py', *arguments)
    if code:
        raise UserError(f'the launch ended with code {code}:\n{output}')
    ranks = [torch.load(folder / f'gradients_{i}.pth', weights_only=True) for i in range(2)]
    if not all(torch.equal(first, second) for first, second in zip(*ranks, strict=True)):
        raise UserError('the two processes have different gradients')
    batch = images(2 * BATCH)
    alone = [grad for backbone in backbones for grad in gradients(build(backbone), batch)]
    apart = max(
        ((ours - grad).abs().max() / grad.abs().max()).item()
        for ours, grad in zip(ranks[0], alone, strict=True)
    )
    if not apart <= TOLERANCE:
        raise UserError(f'gradients are {apart:.1e} of the largest apart')
    return f'{len(alone)} tensors at most {apart:.0e} of their largest value apart'


def check_training(config: Path, schedule: str, data: Path, folder: Path) -> str:
    """Compare the ranks of a training, iteration by iteration.

    Raises:
        UserError: Where they differ or the loss does not fall.
    """
    code, output = train(config, schedule, data, folder)
    if code:
        raise UserError(f'the launch ended with code {code}:\n{output}')
    ranks = [
        [json.loads(line) for line in (folder / f'rank_{i}.jsonl').read_text().splitlines()]
        for i in range(2)
    ]
    digests = [[line['digest'] for line in lines] for lines in ranks]
    if digests[0] != digests[1]:
        raise UserError('the two processes have different models')
    if len(set(digests[0])) != len(digests[0]):
        raise UserError('the models do not change')
    losses = [sum(pair) / 2 for pair in zip(*([line['loss'] for line in lines] for lines in ranks))]
    count = len(losses) // 4
    first, last = sum(losses[:count]) / count, sum(losses[-count:]) / count
    if not last < first:
        raise UserError(f'the loss does not fall: from {first:.3f} to {last:.3f}')
    return f'same after each of {len(losses)} iterations, loss {first:.3f} -> {last:.3f}'


def check_fault(config: Path, schedule: str, data: Path, folder: Path, fault: str) -> str:
    """Let the second rank or its worker fail, and see the launch end.

    Raises:
        UserError: Where it ends well, late or without the words of the fault, or leaves a process.
    """
    code, output = train(config, schedule, data, folder, fault)
    if not (folder / 'failed_at').is_file():
        raise UserError(f'code {code} before the fault:\n{output}')
    failed_at = float((folder / 'failed_at').read_text())
    while left_behind(folder) and time.time() < failed_at + PATIENCE:
        time.sleep(0.5)
    seconds = time.time() - failed_at
    if not code or seconds > PATIENCE:
        raise UserError(f'code {code} after {seconds:.0f} s:\n{output}')
    if processes := left_behind(folder):
        raise UserError(f'the launch left processes {processes}')
    words = next((words for words in FAULTS[fault] if words in output), None)
    if words is None:
        raise UserError(f'the launch does not say {FAULTS[fault]}:\n{output}')
    return f'all gone after {seconds:.1f} s, says "{words}"'


def left_behind(folder: Path) -> list[int]:
    """Return the processes of a launch that are still there."""
    mark, found = f'{MARK}={folder}\0'.encode(), []
    for path in Path('/proc').glob('[0-9]*/environ'):
        try:
            if mark in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:  # it has just ended, or is another user's
            continue
    return found


def check_port() -> str:
    """Ask for a port that is taken.

    Raises:
        UserError: Where the launch does not say so.
    """
    with socket.create_server(('', 0)) as server:
        port = str(server.getsockname()[1])
        code, output = launch('train.py', 'config.py', PORT=port)
    if code != 1 or f'port {port} cannot be used (Address already in use)' not in output:
        raise UserError(f'the launch ended with code {code}:\n{output}')
    return output.partition(':')[2].partition(':')[0].strip()


def all_checks(folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the name of each check, and what runs it."""
    data = folder / 'data'
    make = [sys.executable, str(ROOT / 'tools/demo/make_demo_data.py'), '--out', str(data)]
    subprocess.run([*make, '--train', '16', '--val', '8'], check=True)
    roots = {'det': data / 'coco', 'seg': data / 'ade'}
    yield 'gradients, PVT PVTv2', partial(check_gradients, BACKBONES, folder / 'gradients')
    tasks = {
        task: (ROOT / 'configs' / config, schedule, roots[task])
        for task, (config, schedule) in TASKS.items()
    }
    for task, arguments in tasks.items():
        yield f'ranks, {task}', partial(check_training, *arguments, folder / task)
    for number, fault in enumerate(FAULTS):
        task = ('det', 'seg')[number % 2]
        place = folder / fault.replace(' ', '_')
        yield f'{fault}, {task}', partial(check_fault, *tasks[task], place, fault)
    yield 'port taken', check_port


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # For the processes that this tool launches.
    for name in ('--backbones', '--out', '--launcher'):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    if args.launcher:
        rank_gradients(json.loads(args.backbones), args.out)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, check in all_checks(Path(folder)):
            try:
                print(f'{name:22} {check()}', flush=True)
            except UserError as error:
                failed += 1
                print(f'{name:22} FAILED: {error}', flush=True)
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
