"""Train every recipe for a few iterations, evaluate it and load its checkpoint again.

The images are those of tools/demo/make_demo_data.py. A recipe keeps its model, losses, optimiser
and augmentation; data (a few images of five classes), image sizes, batch and schedule shrink,
published weights are left out, and the score threshold, which an untrained model does not reach,
is 0. So a score shows that the evaluation runs, and no more. Every config runs in a process of its
own. What fails is listed at the end, with exit code 1; what is done is not done again.
Classification is skipped, and said to be, where mmpretrain is not installed.

Example:
    python tests/stress/check_configs.py --pattern 'retinanet_*' 'fpn_*'
"""

import argparse
import copy
import glob
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from pvt_mm import cli
from pvt_mm.apis.inference import read_pixels
from pvt_mm.checkpoint.safe_load import read_checkpoint
from pvt_mm.config import (
    CODEBASES,
    LOADERS,
    datasets,
    iter_dicts,
    load_config,
    nearest,
    set_data_root,
    task_of,
)
from pvt_mm.engine import build_runner
from pvt_mm.engine.options import without_pretrained
from pvt_mm.errors import UserError
from pvt_mm.tables import text_table

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs'
CLASSES = ('zero', 'one', 'two', 'three', 'four')
PALETTE = [[230, 60, 60], [60, 170, 60], [50, 110, 230], [240, 180, 0], [200, 60, 200]]
TRAIN_IMAGES, VAL_IMAGES = 8, 2
BATCH = 2
#: The shorter side of a test image; training sizes shrink in the same proportion.
SIDE = 128
#: DINO picks 900 queries among an image's tokens, so the image must have as many.
SIDES = {'DINO': 352}
FOLDERS = {'mmdet': 'coco', 'mmseg': 'ade', 'mmpretrain': 'classes'}
SCORES = {
    'coco/bbox_mAP': 'box AP',
    'coco/segm_mAP': 'mask AP',
    'mIoU': 'mIoU',
    'accuracy/top1': 'top-1',
}
LIMIT = 900  # seconds after which a run has failed
HEADER = ('config', 'parameters, million', 'first loss', 'last loss', 'evaluated', 'seconds')

PAGE = """# Every recipe, run

`python tests/stress/check_configs.py --markdown docs/check_configs.md` made this page. It trains
each recipe for {iterations} iterations on the generated data set, in which every parameter must get
a gradient, evaluates it, and loads its checkpoint (strictly) into a new model, which must predict
the same. Model, losses, optimiser and augmentation are the recipe's. Data, classes, image sizes,
batch and schedule are cut, weights are random and the score threshold is 0: the scores show that
the evaluation runs, and no more. Parameters are those with 5 classes, 6 for segmentation.

{count} of {total} recipes, {failed} failed, {minutes:.0f} minutes on a CPU with {cores} cores;
mixed precision is bf16 there. {stack}.{skipped}
"""
SKIPPED = (
    '{count} classification recipes are skipped: they need mmpretrain and torchvision, which `pip '
    "install 'pvt-mm[classification]'` brings."
)


@dataclass
class Row:
    """What came of one config; ``error`` is empty where all went well."""

    config: str
    parameters: int = 0
    first_loss: float = math.nan
    last_loss: float = math.nan
    scores: str = ''
    seconds: float = 0.0
    error: str = ''

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        if self.error:
            return (self.config, '', '', '', f'FAILED: {self.error}', f'{self.seconds:.0f}')
        return (
            self.config,
            f'{self.parameters / 1e6:.1f}',
            f'{self.first_loss:.3f}',
            f'{self.last_loss:.3f}',
            self.scores,
            f'{self.seconds:.0f}',
        )


# A recipe made small


def shrink(cfg: Config, data: Path, iterations: int, work_dir: Path) -> None:
    """Cut a recipe down to the embedded data set and a few iterations, in place."""
    task = task_of(cfg, CODEBASES)
    without_pretrained(cfg)
    shrink_images(cfg)
    set_classes(cfg, task, data)
    for name in LOADERS:
        batch = BATCH if name == 'train_dataloader' else 1
        cfg[name].update(batch_size=batch, num_workers=0, persistent_workers=False)
    shorten(cfg, iterations)
    cfg.work_dir = str(work_dir)
    cfg.randomness = dict(seed=0)


def shrink_images(cfg: Config) -> None:
    """Scale every image size of a recipe alike, so that test images have a short side of SIDE."""
    sizes = [
        step['scale']
        for step in iter_dicts(cfg.test_dataloader.dataset.pipeline)
        if step.get('type') in ('Resize', 'ResizeEdge')
    ]
    factor = SIDES.get(cfg.model.type, SIDE) / np.min(sizes[0])

    def scaled(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(scaled(item) for item in value)
        return max(1, round(value * factor))

    for loader in LOADERS:
        for step in iter_dicts(cfg[loader].dataset.pipeline):
            for key in {'scale', 'scales', 'crop_size'} & set(step):
                step[key] = scaled(step[key])
    if cfg.model.data_preprocessor.get('size'):
        cfg.model.data_preprocessor['size'] = scaled(cfg.model.data_preprocessor['size'])


def set_classes(cfg: Config, task: str, data: Path) -> None:
    """Point the data sets to the embedded one and every head to its classes."""
    classes, palette = list(CLASSES), PALETTE
    if task == 'mmseg':
        classes, palette = ['background', *CLASSES], [[200, 200, 200], *PALETTE]
    set_data_root(cfg, str(data / FOLDERS[task]))
    for dataset in datasets(cfg):
        dataset['metainfo'] = dict(classes=tuple(classes), palette=palette)
        if task == 'mmseg':  # ADE20KDataset accepts its own 150 classes alone; this is its base
            dataset.update(type='BaseSegDataset', reduce_zero_label=True)
        elif task == 'mmpretrain':  # ImageNet's base, for other classes than its 1000
            dataset.update(type='CustomDataset', data_prefix=dataset.pop('split'))
    for part in iter_dicts(cfg.model):
        if 'num_classes' in part:
            part['num_classes'] = len(classes)
        if 'score_thr' in part:
            part['score_thr'] = 0.0


def shorten(cfg: Config, iterations: int) -> None:
    """Train for a few iterations, log each, evaluate and save once, at the end."""
    hooks = cfg.default_hooks
    hooks.logger['interval'] = 1
    if cfg.train_cfg.get('max_epochs'):
        epochs = math.ceil(iterations * BATCH / TRAIN_IMAGES)
        for dataset in datasets(cfg, ('train_dataloader',)):
            dataset['indices'] = math.ceil(iterations / epochs) * BATCH
        cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)
        hooks.checkpoint['interval'] = epochs
    else:
        cfg.train_cfg.update(max_iters=iterations, val_interval=iterations)
        hooks.checkpoint['interval'] = iterations
    for scheduler in cfg.param_scheduler:
        if scheduler.type == 'LinearLR':
            scheduler['end'] = 2  # the warm-up: one iteration
        elif scheduler.type == 'PolyLR':
            scheduler.update(begin=min(scheduler.get('begin', 0), 1), end=iterations + 1)


# One run, in a process of its own


def check_config(path: Path, data: Path, iterations: int, folder: Path) -> Row:
    """Train a recipe, evaluate it and load its checkpoint again.

    Raises:
        UserError: Where a loss is not finite, a parameter got no gradient, nothing was evaluated,
            or the checkpoint does not bring the same predictions.
    """
    start = time.monotonic()
    cfg = load_config(str(path))
    shrink(cfg, data, iterations, folder / 'run')
    runner = build_runner(cfg, config=str(path), train=True)
    runner.train()
    losses, _ = runner.message_hub.get_scalar('train/loss').data
    if not np.isfinite(losses).all():
        raise UserError(f'the losses are not finite: {losses.tolist()}')
    check_gradients(runner.model, runner.optim_wrapper.optimizer)
    logged = runner.message_hub.log_scalars
    scores = [
        f'{name} {logged[f"val/{key}"].current():.3f}'
        for key, name in SCORES.items()
        if f'val/{key}' in logged
    ]
    if not scores:
        raise UserError('the evaluation gave no score')
    check_reload(runner)
    return Row(
        path.name,
        sum(parameter.numel() for parameter in runner.model.parameters()),
        float(losses[0]),
        float(losses[-1]),
        ', '.join(scores),
        time.monotonic() - start,
    )


def check_gradients(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that every parameter was trained, as several GPUs demand.

    Raises:
        UserError: Naming those that never got a gradient.
    """
    # The optimiser keeps a state of what it has moved.
    unmoved = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter not in optimizer.state
    ]
    if unmoved:
        raise UserError(f'no gradient reached {", ".join(unmoved)}')


def check_reload(runner: Runner) -> None:
    """Build the model again from its checkpoint: it must predict what the trained one does.

    Raises:
        UserError: Where there is nothing predicted to compare, or it differs.
    """
    file = (Path(runner.work_dir) / 'last_checkpoint').read_text().strip()
    model = runner.build_model(copy.deepcopy(runner.cfg.model))
    model.load_state_dict(read_checkpoint(file)['state_dict'], strict=True)
    batch = next(iter(runner.val_dataloader))
    expected, found = (predict(part, copy.deepcopy(batch)) for part in (runner.model, model))
    if not any(tensor.numel() for sample in expected for tensor in sample.values()):
        raise UserError('the trained model predicts nothing, so nothing was compared')
    try:
        torch.testing.assert_close(found, expected)
    except AssertionError as error:
        first = str(error).splitlines()[0]
        raise UserError(f'the checkpoint predicts something else: {first}') from error


@torch.no_grad()
def predict(model: Any, batch: Any) -> list[dict[str, torch.Tensor]]:
    """Return the boxes, scores, labels and masks, or the logits, of each image of a batch."""
    samples = model.eval().test_step(batch)
    if 'pred_score' in samples[0]:
        return [{'scores': sample.pred_score} for sample in samples]
    key = 'pred_instances' if 'pred_instances' in samples[0] else 'seg_logits'
    return [dict(sample.get(key).items()) for sample in samples]


def run(path: Path, data: Path, iterations: int, folder: Path) -> None:
    """Check a config in this process, its output in ``log.txt`` and its row in ``row.json``."""
    log = open(folder / 'log.txt', 'w', buffering=1)  # noqa: SIM115  # until the process ends
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    sys.stdout = sys.stderr = log
    row = check_config(path, data, iterations, folder)
    (folder / 'row.json').write_text(json.dumps(asdict(row)))


def run_apart(path: Path, data: Path, iterations: int, folder: Path) -> Row:
    """Check a config in a forked process, so that neither a crash nor memory outlives it."""
    start = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    process = multiprocessing.get_context('fork').Process(
        target=run, args=(path, data, iterations, folder)
    )
    process.start()
    process.join(LIMIT)
    error = ''
    if process.is_alive():
        process.kill()
        process.join()
        error = f'still running after {LIMIT} seconds'
    elif process.exitcode:
        lines = [line for line in (folder / 'log.txt').read_text().splitlines() if line.strip()]
        error = lines[-1].strip() if lines else f'exit code {process.exitcode}'
        if process.exitcode < 0:
            error = f'ended by signal {-process.exitcode}'
    shutil.rmtree(folder / 'run', ignore_errors=True)  # checkpoints of up to 1 GB
    if error:
        return Row(path.name, seconds=time.monotonic() - start, error=error)
    return Row(**json.loads((folder / 'row.json').read_text()))


# All runs


def find_configs(patterns: list[str]) -> list[Path]:
    """Return the configs that match any pattern, the demos left out.

    Raises:
        UserError: Where a pattern matches none.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = {Path(match) for match in glob.glob(str(CONFIGS / pattern))}
        matches = {
            path for path in matches if path.suffix == '.py' and not path.name.startswith('demo_')
        }
        if not matches:
            hint = nearest(pattern.strip('*'), (path.name for path in find_configs(['*.py'])))
            raise UserError(
                f'--pattern {pattern}: no config has such a name; '
                f'{hint or "quote it and see configs/."}'
            )
        found |= matches
    return sorted(found)


def is_classification(path: Path) -> bool:
    """Tell by its name whether a recipe needs mmpretrain."""
    return path.stem.endswith('_in1k')


def split_off_classification(paths: list[Path]) -> tuple[list[Path], str]:
    """Return the configs that can run here, and a sentence about those that cannot, or nothing.

    Raises:
        UserError: Where none is left.
    """
    if find_spec('mmpretrain') is not None:
        return paths, ''
    left = [path for path in paths if not is_classification(path)]
    sentence = SKIPPED.format(count=len(paths) - len(left)) if len(left) < len(paths) else ''
    if not left:
        raise UserError(sentence)
    return left, sentence


def crop_objects(data: Path) -> None:
    """Cut the objects of the COCO data set out, into one folder a class, for classification."""
    for split in ('train', 'val'):
        folders = [data / FOLDERS['mmpretrain'] / split / name for name in CLASSES]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        coco = json.loads((data / f'coco/annotations/instances_{split}2017.json').read_text())
        names = {image['id']: image['file_name'] for image in coco['images']}
        order = sorted(category['id'] for category in coco['categories'])
        for object_ in coco['annotations']:
            image = read_pixels(data / f'coco/{split}2017' / names[object_['image_id']])
            left, top, width, height = (round(value) for value in object_['bbox'])
            folder = folders[order.index(object_['category_id'])]
            crop = image[top : top + height, left : left + width]
            cv2.imwrite(str(folder / f'{object_["id"]}.png'), crop[:, :, ::-1])


def digest(path: Path, iterations: int) -> str:
    """Hash what a run depends on: the config, its bases, the package and this tool."""
    files = [path, Path(__file__), *CONFIGS.glob('_base_/*/*.py'), *(ROOT / 'pvt_mm').glob('*.py')]
    content = hashlib.sha256(str(iterations).encode())
    for file in sorted(files):
        content.update(file.read_bytes())
    return content.hexdigest()


class Results:
    """The rows so far, kept in a file, so that a later call goes on from there."""

    def __init__(self, file: Path):
        self.file = file
        self.rows: dict[str, dict] = json.loads(file.read_text()) if file.is_file() else {}

    def get(self, path: Path, key: str) -> Row | None:
        """Return the row of a config that was checked as it is now, without error."""
        entry = self.rows.get(str(path))
        if entry is None or entry['digest'] != key or entry['row']['error']:
            return None
        return Row(**entry['row'])

    def put(self, path: Path, key: str, row: Row) -> None:
        """Save a row to disc at once."""
        self.rows[str(path)] = {'digest': key, 'row': asdict(row)}
        self.file.write_text(json.dumps(self.rows, indent=1))


def check_all(
    paths: list[Path], data: Path, iterations: int, work_dir: Path, force: bool
) -> list[Row]:
    """Check configs one after the other and say how long the rest will take."""
    results = Results(work_dir / 'rows.json')
    keys = {path: digest(path, iterations) for path in paths}
    rows = {path: None if force else results.get(path, keys[path]) for path in paths}
    todo = [path for path in paths if rows[path] is None]
    if len(todo) < len(paths):
        print(f'{len(paths) - len(todo)} of {len(paths)} are done already; --force runs them again')
    for path in cli.track(todo, len(todo), 'configs'):
        rows[path] = row = run_apart(path, data, iterations, work_dir / path.stem)
        results.put(path, keys[path], row)
        print(f'{"  ".join(row.cells())} s', flush=True)
    return [row for row in rows.values() if row]


def markdown_page(rows: list[Row], iterations: int, skipped: str = '') -> str:
    """Return the page of docs/: what was run with what, and the table."""
    packages = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg')
    stack = ', '.join(f'{name} {import_module(name).__version__}' for name in packages)
    return '\n'.join(
        [
            PAGE.format(
                iterations=iterations,
                stack=stack,
                skipped=skipped and f'\n\n{skipped}',
                cores=os.cpu_count(),
                failed=sum(bool(row.error) for row in rows),
                count=len(rows),
                total=len(find_configs(['*.py'])),
                minutes=sum(row.seconds for row in rows) / 60,
            ),
            f'| {" | ".join(HEADER)} |',
            '|---|---:|---:|---:|---|---:|',
            *(f'| {" | ".join(row.cells())} |' for row in rows),
            '',
        ]
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--pattern',
        nargs='+',
        default=['*.py'],
        metavar='GLOB',
        help='names below configs/, or paths of your own configs (default: all but the demos)',
    )
    parser.add_argument('--iters', type=int, default=3, help='training iterations (default: 3)')
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/check_configs'),
        help='data, logs and the rows so far (default: %(default)s)',
    )
    parser.add_argument('--markdown', type=Path, metavar='FILE', help='write the table as a page')
    parser.add_argument('--force', action='store_true', help='also run what is done already')
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    if args.iters < 1:
        raise UserError(f'--iters {args.iters}: train for 1 iteration or more.')
    paths, skipped = split_off_classification(find_configs(args.pattern))
    work_dir = args.work_dir.resolve()
    data = work_dir / 'data'
    make = [sys.executable, str(ROOT / 'tools/demo/make_demo_data.py'), '--out', str(data)]
    subprocess.run(
        [*make, '--train', str(TRAIN_IMAGES), '--val', str(VAL_IMAGES)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    if any(is_classification(path) for path in paths):
        crop_objects(data)
    rows = check_all(paths, data, args.iters, work_dir, args.force)
    print(f'\n{text_table(HEADER, (row.cells() for row in rows))}')
    if skipped:
        print(f'\n{skipped}')
    if args.markdown:
        args.markdown.write_text(markdown_page(rows, args.iters, skipped))
    failed = [row for row in rows if row.error]
    print(f'\n{len(rows) - len(failed)} of {len(rows)} trained, evaluated and loaded again')
    for row in failed:
        log = work_dir / Path(row.config).stem / 'log.txt'
        print(f'FAILED {row.config}: {row.error}\n    {log}', file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
