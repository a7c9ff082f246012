"""Damage a valid annotation file at random: check, training and testing end in a sentence, or well.

Each case deletes, changes or nests values of a file in COCO's format, or its text. Then
``check_dataset`` runs on it, a training of one epoch with a validation, and a test, by a model that
predicts the annotations. A traceback of any of them is a fault, and so is a case that one of them
refuses and the other takes. Ends with 1 where there was one.

Example:
    python tests/stress/fuzz_annotations.py --cases 2000 --seed 0
"""

import argparse
import contextlib
import copy
import gc
import io
import json
import logging
import random
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from matplotlib import pyplot
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from mmengine.utils import ManagerMixin
from PIL import Image
from pycocotools import mask as mask_api

from pvt_mm import cli
from pvt_mm.datasets import checks
from pvt_mm.datasets.consistency import check_data
from pvt_mm.engine import build_runner, runner, runtime
from pvt_mm.errors import UserError

WIDTH, HEIGHT, IMAGES = 48, 32, 4
CLASSES = ('cat', 'dog')
SECONDS = 60  # that a case may take
DEEP = 100_000
#: What is written in the place of a value.
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        2,
        -1,
        0.5,
        -0.0,
        48.0,
        10**6,
        10**30,
        2**63,
        10**400,
        1e308,
        -1e308,
    ),
    *(float('nan'), float('inf'), -float('inf'), '', 'cat', '1', '0', 'a\\b.jpg', 'a\0b', '\ud800'),
    *(
        'x' * 300,
        '../..',
        [],
        {},
        [[]],
        [None],
        [1],
        [1, 2, 3, 4],
        [[1, 2, 3, 4]],
        ['1', '2'],
        [{}],
    ),
    *({'a': 1}, {'size': [HEIGHT, WIDTH], 'counts': 'ppp'}, {'size': [1, 1], 'counts': [1]}),
    *({'size': [HEIGHT, WIDTH], 'counts': [5, 6]}, {'counts': None, 'size': None}),
)


@MODELS.register_module(force=True)
class PredictsAnnotations(BaseModel):
    """A model without a network: its predictions are the annotations, with a score of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = 'tensor') -> Any:
        if mode == 'loss':
            return dict(loss=self.weight.sum())
        for sample in data_samples:
            truth = sample.gt_instances
            found = InstanceData(
                bboxes=truth.bboxes.tensor, labels=truth.labels, scores=torch.ones(len(truth))
            )
            if 'masks' in truth:
                found.masks = torch.from_numpy(truth.masks.to_ndarray().astype(bool))
            sample.pred_instances = found
        return data_samples


def valid_file() -> dict[str, Any]:
    """Return an annotation file: two objects an image, one of them a crowd, polygons and RLE."""
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for number in range(1, IMAGES + 1):
        images.append(dict(id=number, file_name=f'{number}.jpg', width=WIDTH, height=HEIGHT))
        for place in range(2):
            x, y, w, h = 3 + 20 * place, 4 + number, 14, 12
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            found = dict(
                id=len(objects) + 1,
                image_id=number,
                category_id=1 + (number + place) % 2,
                bbox=[x, y, w, h],
                area=w * h,
                iscrowd=0,
                segmentation=[corners],
            )
            if number == 2:
                (runs,) = mask_api.frPyObjects([corners], HEIGHT, WIDTH)
                found['segmentation'] = dict(runs, counts=runs['counts'].decode())
                found['iscrowd'] = place
            objects.append(found)
    categories = [dict(id=number, name=name) for number, name in enumerate(CLASSES, 1)]
    return dict(info={}, images=images, annotations=objects, categories=categories)


# Damage


def places(node: Any, path: tuple = ()) -> list[tuple]:
    """Return the paths of all values below a node."""
    inner = node.items() if isinstance(node, dict) else enumerate(node)
    found = []
    for key, value in inner:
        found.append((*path, key))
        if isinstance(value, (dict, list)):
            found += places(value, (*path, key))
    return found


def change(node: Any, key: Any, rng: random.Random, kind: str, value: Any) -> None:
    """Damage one value."""
    if kind == 'delete':
        del node[key]
    elif kind == 'set':
        node[key] = copy.deepcopy(value)
    elif kind == 'nest':
        node[key] = rng.choice((lambda v: [v], lambda v: {'a': v}, lambda v: [[v], v]))(node[key])
    elif kind == 'unnest' and isinstance(node[key], (list, dict)) and node[key]:
        node[key] = next(iter(node[key].values() if isinstance(node[key], dict) else node[key]))
    elif kind == 'text':
        node[key] = str(node[key])
    elif kind == 'scale' and type(node[key]) in (int, float):
        node[key] *= rng.choice((-1, 0, 0.5, 1000, 1e9))
    elif kind == 'twice' and isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    elif kind == 'keyed' and isinstance(node[key], list):
        node[key] = {str(index): each for index, each in enumerate(node[key])}


KINDS = ('delete', 'set', 'set', 'set', 'nest', 'unnest', 'text', 'scale', 'twice', 'keyed')


def damaged(rng: random.Random) -> str:
    """Return a valid file's text with up to three damages."""
    content = valid_file()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = places(content)
        if not found:
            break
        path = rng.choice(found)
        kind, value = rng.choice(KINDS), rng.choice(VALUES)
        paths = [path]
        if rng.random() < 0.3 and len(path) > 2:  # the same field of all entries
            paths = [other for other in found if other[::2] == path[::2] and other[0] == path[0]]
            paths = [other for other in paths if len(other) == len(path) and other[2:] == path[2:]]
        for each in reversed(paths):
            with contextlib.suppress(LookupError, TypeError):  # changed by one before
                node = content
                for key in each[:-1]:
                    node = node[key]
                change(node, each[-1], rng, kind, value)
    text = json.dumps(content)
    if rng.random() < 0.04:
        cut = rng.randrange(len(text))
        text = rng.choice((
            text[:cut], text[:cut] + rng.choice('[]{}":,0x') + text[cut:], '\ufeff' + text, '',
            '[' * DEEP, text[:-1] + ', "x": ' + '[' * DEEP, text.replace('1', '1' * 5000, 1),
        ))  # fmt: skip
    return text


# Runs


def make_config(root: Path, masks: bool, train: str, val: str) -> Config:
    """Return the config of a training on two annotation files of the same images."""
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=masks),
        dict(type='PackDetInputs'),
    ]

    def loader(file: str, test_mode: bool) -> dict:
        return dict(
            batch_size=2,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
            dataset=dict(
                type='CocoDataset',
                data_root=str(root),
                ann_file=file,
                data_prefix=dict(img='images/'),
                metainfo=dict(classes=CLASSES),
                filter_cfg=dict(filter_empty_gt=True, min_size=8),
                test_mode=test_mode,
                pipeline=pipeline,
            ),
        )

    metric = ['bbox', 'segm'] if masks else 'bbox'
    evaluator = dict(type='CocoMetric', ann_file=str(root / val), metric=metric)
    return Config(
        dict(
            default_scope='mmdet',
            model=dict(type='PredictsAnnotations'),
            train_dataloader=loader(train, False),
            val_dataloader=loader(val, True),
            test_dataloader=loader(val, True),
            val_evaluator=evaluator,
            test_evaluator=evaluator,
            train_cfg=dict(by_epoch=True, max_epochs=1),
            val_cfg=dict(),
            test_cfg=dict(),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            default_hooks=dict(checkpoint=None),
            work_dir=str(root / 'run'),
            log_level='ERROR',
        )
    )


def outcome(function: Any) -> str:
    """Return how a run ends: well, refused, or the traceback's error."""
    forget_runs()
    try:
        function()
    except UserError as error:
        if '\n' in str(error) or len(str(error)) > 1000:
            return f'a long message: {str(error)[:200]!r}'
        return 'refused'
    except Exception as error:
        return f'{type(error).__name__}: {error}'.splitlines()[0][:150]
    return 'well'


def forget_runs(cls: type = ManagerMixin) -> None:
    """Drop the loggers and visualisers that mmengine keeps for the life of a process."""
    getattr(cls, '_instance_dict', {}).clear()
    children: list[type] = cls.__subclasses__()
    for child in children:
        forget_runs(child)


def check(cfg: Config, loaders: tuple[str, ...]) -> None:
    """Do what ``check_dataset`` does."""
    check_data(cfg, loaders)
    findings, images = checks.check_config(cfg, 'config.py', loaders)
    checks.report(findings, images).encode()
    stopping = checks.stops(findings)
    if stopping:
        raise UserError(stopping[0].kind)


def start(cfg: Config, train: bool) -> None:
    """Train, or test without weights, as the tools do."""
    made = build_runner(copy.deepcopy(cfg), config='config.py', train=train)
    made.train() if train else made.test()


def run_case(seed: int, root: Path) -> dict[str, str]:
    """Return how check, training and testing end on one damaged file."""
    rng = random.Random(seed)
    text = damaged(rng)
    (root / 'good.json').write_text(json.dumps(valid_file()))
    (root / 'bad.json').write_text(text, encoding='utf-8', errors='surrogatepass')
    train, val = rng.choice((('bad', 'bad'), ('bad', 'good'), ('good', 'bad')))
    cfg = make_config(root, rng.random() < 0.5, f'{train}.json', f'{val}.json')
    if rng.random() < 0.1:  # a test that only writes its predictions
        cfg.test_evaluator.update(format_only=True, outfile_prefix=str(root / 'out'))
    shutil.rmtree(root / 'run', ignore_errors=True)
    both, test = ('train_dataloader', 'val_dataloader'), ('test_dataloader',)
    signal.alarm(SECONDS)
    ends = {
        'check': outcome(lambda: check(cfg, both)),
        'train': outcome(lambda: start(cfg, train=True)),
    }
    if val == 'bad':
        ends['check of test'] = outcome(lambda: check(cfg, test))
        ends['test'] = outcome(lambda: start(cfg, train=False))
    signal.alarm(0)
    pyplot.close('all')  # each Runner's visualiser has some
    return ends


def faults(ends: dict[str, str]) -> list[str]:
    """Return what is wrong with the ends of a case."""
    found = [f'{name}: {end}' for name, end in ends.items() if end not in ('well', 'refused')]
    if not found:
        for checked, run in (('check', 'train'), ('check of test', 'test')):
            if ends.get(checked) != ends.get(run):
                found.append(f'{checked}: {ends[checked]}, {run}: {ends[run]}')
    return found


def make_images(root: Path) -> None:
    """Write the images of the valid file."""
    (root / 'images').mkdir()
    noise = np.random.RandomState(0)
    for number in range(1, IMAGES + 1):
        pixels = noise.randint(0, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f'images/{number}.jpg')


class InThisProcess:
    """A pool of no processes: to start them takes longer than a case."""

    def __init__(self, cores: int, initializer: Any, initargs: tuple) -> None:
        checks._dataset, checks._ignored = initargs

    def map(self, function: Any, items: Any, chunksize: int) -> Any:
        return map(function, items)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None:
        return


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what takes most of the time of so short a run, and hide what it logs."""
    gc.collect()
    gc.freeze()  # a data set collects all garbage as it is built
    logging.disable(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(runner.Runner, '_log_env'))
        stack.enter_context(mock.patch.object(Config, 'pretty_text', ''))
        stack.enter_context(mock.patch.object(Config, 'dump'))
        stack.enter_context(mock.patch.object(checks, 'ProcessPoolExecutor', InThisProcess))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        warnings.simplefilter('ignore')
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            gc.unfreeze()


def run_cases(cases: int, seed: int, progress: Any = None) -> tuple[Counter, list[str]]:
    """Run cases; return counts of how they ended, and the faults."""
    counts: Counter = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root)
        with quiet():
            for number in (progress or iter)(range(seed, seed + cases)):
                ends = run_case(number, root)
                for name, end in ends.items():
                    counts[name, end if end in ('well', 'refused') else 'traceback'] += 1
                wrong += [f'seed {number}: {fault}' for fault in faults(ends)]
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--cases', type=int, default=2000, metavar='N', help='how many (default: %(default)s)'
    )
    parser.add_argument(
        '--seed', type=int, default=0, metavar='N', help='of the first case (default: %(default)s)'
    )
    args = parser.parse_args()
    runtime.setup()
    progress = lambda items: cli.track(items, len(items), 'cases')  # noqa: E731
    counts, wrong = run_cases(args.cases, args.seed, progress)
    ends = ('well', 'refused', 'traceback')
    names = dict.fromkeys(name for name, _ in counts)
    rows = [(name, *(str(counts[name, end]) for end in ends)) for name in names]
    cli.print_table(('', *ends), rows)
    print('\n'.join([f'\n{args.cases} cases, {len(wrong)} faults', *wrong]))
    sys.exit(1 if wrong else 0)


if __name__ == '__main__':
    main()
