"""What the command line tools share: arguments, tables, progress, errors in one sentence."""

from __future__ import annotations

import argparse
import csv
import functools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from mmengine.config import Config, DictAction
from rich.console import Console
from rich.progress import Progress

from pvt_mm.config import load_config
from pvt_mm.engine.runtime import setup
from pvt_mm.errors import ArchError, CheckpointMismatchError, UserError
from pvt_mm.evaluation.options import use_fast_coco_eval
from pvt_mm.models.arguments import find_type
from pvt_mm.requirements import pinned
from pvt_mm.tables import text_table

T = TypeVar('T')


def main_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a tool's ``main``: files are read safely, and bad input is one sentence and code 1.

    Each tool also takes ``--debug``, which prints the traceback.
    """

    @functools.wraps(main)
    def run() -> None:
        # mmengine imports pkg_resources; its warning says nothing to the user of a tool.
        warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
        debug = '--debug' in sys.argv
        sys.argv = [argument for argument in sys.argv if argument != '--debug']
        setup()
        try:
            main()
        except SystemExit as end:
            if end.code == 0 and {'-h', '--help'} & set(sys.argv):  # which was printed
                print('  --debug  print the traceback of an error')
            raise
        except (UserError, ArchError, CheckpointMismatchError, KeyError) as error:
            message = _unregistered(str(error)) if isinstance(error, KeyError) else str(error)
            if not message:  # not bad input but a fault in the code
                raise
            if debug:
                traceback.print_exc()
            print(f'error: {message}', file=sys.stderr)
            sys.exit(1)

    return run


def _unregistered(message: str) -> str:
    """Turn mmengine's error about an unknown type into one sentence; '' for other errors."""
    match = re.search(r'(\S+) is not in the (mmdet|mmseg|mmpretrain)::', message)
    if match is None:
        return ''
    name, package = match.groups()
    name = name.lstrip('\'"')
    if name in ('PVT', 'PVTv2'):
        return (
            f'The config uses {name} without importing it; add '
            "custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)."
        )
    own = find_type(name)
    if own:
        write = ', '.join(f'{key}={value!r}' for key, value in own.items())
        return f'{package} has no {name}; write {write} with custom_imports of pvt_mm.'
    version, pin = import_module(package).__version__, pinned(package)
    found = f'{package} {version}, which is installed, has no {name}'
    if '==' in pin and not pin.endswith(f'=={version}'):
        return f'{found}; the configs of pvt_mm are made for {pin}: pip install {pin}.'
    return (
        f'{found}; check the name. If another package has it, name that package in '
        'custom_imports = dict(imports=[...]).'
    )


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the argument that overrides keys of the config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override the config, e.g. model.backbone.compute_dtype=bfloat16',
    )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that train and test share; ``load_run_config`` applies them."""
    parser.add_argument('--data-root', metavar='DIR', help='where the data set lies, if elsewhere')
    add_config_options(parser)
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='set by the launch scripts (default: none)',
    )
    parser.add_argument(
        '--fast-coco-eval',
        action='store_true',
        help="COCO scores by faster-coco-eval: pycocotools' figures in less time",
    )
    # PyTorch's older launcher passes it; newer ones set the variable.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def load_run_config(args: argparse.Namespace, training_options: Sequence[str] = ()) -> Config:
    """Load the config of train or test, with the arguments that both have applied."""
    cfg = load_config(args.config, args.cfg_options, args.data_root, training_options)
    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', '0')
    if args.work_dir:
        cfg.work_dir = args.work_dir
    if args.fast_coco_eval:
        use_fast_coco_eval(cfg)
    return cfg


def track(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Yield items and draw on stderr how many of them are done: stdout is for results."""
    console = Console(stderr=True)
    # What is printed meanwhile goes above the bar, but never from a pipe to the terminal.
    with Progress(console=console, redirect_stdout=sys.stdout.isatty()) as progress:
        yield from progress.track(items, total, description=description)


def unique_names(paths: Sequence[str]) -> list[str]:
    """Return a name for each path, without folder and ending, numbered where it is taken."""
    names: dict[str, None] = {}
    for path in paths:
        stem = name = Path(path).stem.lstrip('.') or 'image'
        number = 1
        while name in names:
            number += 1
            name = f'{stem}_{number}'
        names[name] = None
    return list(names)


def parse_size(text: str) -> tuple[int, int]:
    """Read ``800x1344`` (height x width) or ``224``."""
    sides = text.split('x')
    if not all(side.isdecimal() and int(side) for side in sides) or len(sides) > 2:
        raise UserError(f'{text} is no image size; write it as 224 or 800x1344 (height x width).')
    return int(sides[0]), int(sides[-1])


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table with aligned columns."""
    print(text_table(head, rows, markdown=True))


def write_csv(path: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table to a file."""
    with open(path, 'w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([head, *rows])
