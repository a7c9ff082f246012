"""Train and evaluate PVT on the embedded data set and write pictures and a report.

For each task: make the data, train from random weights, test the saved checkpoint, draw. It ends
with the scores against their targets and exits with 1 where one falls short. With --quick nothing
is compared: the training is cut to a few iterations, to show that every step works.

Example:
    python tools/demo/demo.py --task det --quick
"""

import argparse
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import demo_report as report
import numpy as np
import torch
from make_demo_data import make_demo_data

from pvt_mm.apis.inference import Predictor, read_pixels
from pvt_mm.cli import main_errors
from pvt_mm.config import load_config
from pvt_mm.errors import UserError
from pvt_mm.visualization import logs

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / 'data' / 'demo'
ETA = re.compile(r'\beta: (\d+):(\d\d):(\d\d)')
#: Seconds between two lines that tell the time left.
TOLD_EVERY = 30
#: Seconds of a task's test and pictures, on the machine of ``Task.seconds``.
TEST_AND_PICTURES = 30
QUICK_EPOCHS = [
    'train_cfg.max_epochs=1',
    'train_cfg.val_interval=1',
    'train_dataloader.dataset.indices=48',
]
QUICK_ITERATIONS = ['train_cfg.max_iters=20', 'train_cfg.val_interval=20']


@dataclass
class Task:
    """One task of the demo: its config, its score and what a quick run changes.

    ``seconds`` is what its training took on one machine; it only weighs the steps of the demo, to
    tell the time left.
    """

    title: str
    model: str
    config: str
    metric: str
    key: str
    target: float
    seconds: float
    quick: list[str] = field(default_factory=list)


TASKS = {
    'det': Task(
        'Object detection',
        'RetinaNet, PVT-Tiny',
        'demo_retinanet_pvt_t.py',
        'box AP',
        'coco/bbox_mAP',
        0.60,
        273,
        [*QUICK_EPOCHS, 'default_hooks.checkpoint.interval=1'],
    ),
    'ins': Task(
        'Instance segmentation',
        'Mask R-CNN, PVTv2-B0',
        'demo_mask_rcnn_pvt_v2_b0.py',
        'mask AP',
        'coco/segm_mAP',
        0.50,
        287,
        [*QUICK_EPOCHS, 'default_hooks.checkpoint.interval=1'],
    ),
    'seg': Task(
        'Semantic segmentation',
        'Semantic FPN, PVT-Tiny',
        'demo_fpn_pvt_t.py',
        'mIoU (%)',
        'mIoU',
        75.0,
        170,
        [*QUICK_ITERATIONS, 'default_hooks.checkpoint.interval=20'],
    ),
}


def run_tool(name: str, *args: Any, task: Task | None = None, later: float = 0.0) -> float:
    """Run one of the tools with its output in sight, and return the seconds that it took.

    Args:
        name: The file, such as ``train.py``.
        args: Its arguments.
        task: What it trains, where the time left of the whole demo is to be told.
        later: Seconds of the steps after it, on the machine of ``Task.seconds``.

    Raises:
        UserError: Where it fails.
    """
    start = time.monotonic()
    command = [sys.executable, '-u', '-W', 'ignore', str(ROOT / 'tools' / name), *map(str, args)]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE if task else None
    ) as process:
        if task:
            show(process.stdout or (), task, later)
    code = process.returncode
    if code:
        raise UserError(
            f'tools/{name} {args[0]} failed with exit code {code}; its output is above.'
        )
    return time.monotonic() - start


def show(lines: Iterable[str], task: Task, later: float) -> None:
    """Print a training's lines and, now and then, how long the whole demo still takes.

    Args:
        lines: What the training prints; mmengine's lines tell its own time left.
        task: What it trains.
        later: Seconds of the steps after it, on the machine of ``Task.seconds``.
    """
    start = told = time.monotonic()
    for line in lines:
        print(line, end='', flush=True)
        found, now = ETA.search(line), time.monotonic()
        if found and now - told >= TOLD_EVERY:
            told = now
            hours, minutes, seconds = map(int, found.groups())
            left = 3600 * hours + 60 * minutes + seconds
            slower = (now - start + left) / task.seconds
            minutes = math.ceil((left + slower * later) / 60)
            print(f'--- about {minutes} min left of the whole demo', flush=True)


def announce(text: str) -> None:
    """Print a step's headline between the tools' own output."""
    print(f'\n=== {text}', flush=True)


def newest(folder: Path, pattern: str) -> Path:
    """Return the newest file of a pattern, which sorts by its time stamp.

    Raises:
        UserError: Where there is none.
    """
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(f'There is no {pattern} in {folder}; the run before it wrote none.')
    return files[-1]


def read_score(folder: Path, key: str) -> float:
    """Return a score from what the last test run in a folder wrote.

    It is not a number where the model found nothing at all: COCO's evaluation writes none then.
    """
    scores = json.loads(newest(folder, '*/*.json').read_text())
    return float(scores.get(key, 'nan'))


def train_and_test(
    name: str, work_dir: Path, quick: bool, after: Sequence[str]
) -> tuple[report.Outcome, Path]:
    """Train a task and test the saved checkpoint; return the outcome and the checkpoint.

    ``after`` are the names of the tasks that follow.
    """
    task = TASKS[name]
    config = f'configs/{task.config}'
    options = ['--cfg-options', *task.quick] if quick else []
    announce(f'{task.title}: training {task.model}')
    later = sum(TASKS[other].seconds for other in after) + TEST_AND_PICTURES * (1 + len(after))
    watched = None if quick else task
    arguments = [config, '--work-dir', work_dir, '--seed', 0, *options]
    train_seconds = run_tool('train.py', *arguments, task=watched, later=later)
    checkpoint = Path((work_dir / 'last_checkpoint').read_text().strip())
    announce(f'{task.title}: testing {checkpoint.name}')
    test_seconds = run_tool('test.py', config, checkpoint, '--work-dir', work_dir / 'test')
    score = read_score(work_dir / 'test', task.key)
    outcome = report.Outcome(
        name, task.title, task.model, task.metric, task.target, score, train_seconds, test_seconds
    )
    return outcome, checkpoint


@torch.inference_mode()
def stage_features(predictor: Predictor, image: Path) -> list[np.ndarray]:
    """Return the backbone's features of an image file, as arrays of (C, H, W)."""
    inputs = predictor.model.data_preprocessor(predictor.load(image))['inputs']
    return [feature[0].float().cpu().numpy() for feature in predictor.model.backbone(inputs)]


def draw(
    name: str, outcome: report.Outcome, checkpoint: Path, work_dir: Path, out: Path
) -> report.Section:
    """Draw a task's pictures and return its section of the page."""
    task = TASKS[name]
    curves, predictions, features = (
        out / f'{name}_{kind}.png' for kind in ('curves', 'predictions', 'features')
    )
    run = logs.read_run(work_dir)
    report.plot_curves(curves, run.curve('loss'), run.curve(task.key), outcome)
    predictor = Predictor(load_config(str(ROOT / 'configs' / task.config)), str(checkpoint))
    if name == 'seg':
        images = DATA / 'ade/images/validation'
        labels = DATA / 'ade/annotations/validation'
        report.plot_segments(predictions, predictor, images, labels)
    else:
        images = DATA / 'coco/val2017'
        annotations = DATA / 'coco/annotations/instances_val2017.json'
        report.plot_detections(predictions, predictor, images, annotations, name == 'ins')
    image = sorted(images.glob('*.jpg'))[0]
    report.plot_features(features, read_pixels(image), stage_features(predictor, image))
    minutes = report.format_seconds(outcome.train_seconds)
    score = report.format_score(outcome.score)
    text = f'{task.model}: {task.metric} {score} after {minutes} minutes of training.'
    pictures = [
        ('Loss and score', curves),
        ('Validation images', predictions),
        (
            "The backbone's four stages: each feature's three principal components as colours",
            features,
        ),
    ]
    return task.title, text, pictures


def draw_data(out: Path) -> report.Section:
    """Draw training images and return the data set's section of the page."""
    path = out / 'data.png'
    meta = load_config(str(ROOT / 'configs' / TASKS['det'].config)).metainfo
    report.plot_data(
        path, DATA / 'coco/train2017', DATA / 'coco/annotations/instances_train2017.json', meta
    )
    text = (
        "scikit-learn's scans of handwritten digits as stickers on crops of its two photographs; "
        'validation uses other scans and other parts of the photographs than training.'
    )
    return 'The data', text, [('Training images with their annotations', path)]


def exit_code(outcomes: Sequence[report.Outcome], quick: bool) -> int:
    """Return 1 where a score falls short of its target and the run was one to compare."""
    return 0 if quick or all(outcome.reached for outcome in outcomes) else 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--task',
        choices=[*TASKS, 'all'],
        default='det',
        help='boxes, instances, semantic segmentation or all three (default: %(default)s)',
    )
    parser.add_argument(
        '--quick', action='store_true', help='a few iterations only; compares nothing'
    )
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=ROOT / 'work_dirs' / 'demo',
        help='logs, checkpoints and the report (default: work_dirs/demo)',
    )
    return parser.parse_args()


@main_errors
def main() -> None:
    args = parse_args()
    out = args.work_dir.resolve()
    out.mkdir(parents=True, exist_ok=True)
    announce('The data set')
    make_demo_data(DATA)
    names = list(TASKS) if args.task == 'all' else [args.task]
    outcomes, sections = [], [draw_data(out)]
    for number, name in enumerate(names, 1):
        work_dir = out / name
        outcome, checkpoint = train_and_test(name, work_dir, args.quick, names[number:])
        announce(f'{outcome.title}: drawing')
        outcomes.append(outcome)
        sections.append(draw(name, outcome, checkpoint, work_dir, out))
    page = out / 'report.html'
    report.write_page(page, outcomes, sections, args.quick)
    announce('Scores')
    print(report.format_table(outcomes, args.quick))
    print(f'\nReport: {page}')
    sys.exit(exit_code(outcomes, args.quick))


if __name__ == '__main__':
    main()
