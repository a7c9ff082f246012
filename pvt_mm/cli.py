"""What the command line tools share: configs, data roots, and errors in one sentence."""

from __future__ import annotations

import argparse
import csv
import functools
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from mmengine.config import DictAction

from pvt_mm.checkpoint import safe_load
from pvt_mm.engine.runtime import setup
from pvt_mm.errors import ArchError, CheckpointMismatchError, UserError
from pvt_mm.releases import first_with
from pvt_mm.requirements import pinned


def main_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Make a tool's ``main`` read files safely and print bad input as one sentence, with code 1.

    Every such tool takes ``--debug``, which prints the traceback as well.
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
            message = _sentence(error)
            if not message:
                raise
            if debug:
                traceback.print_exc()
            print(f'error: {message}', file=sys.stderr)
            sys.exit(1)

    return run


def _sentence(error: Exception) -> str:
    """Return what is told of an error; empty where it is no bad input."""
    if isinstance(error, CheckpointMismatchError):
        return f'{safe_load.last_read}: {error}'
    return _unregistered(str(error)) if isinstance(error, KeyError) else str(error)


def _unregistered(message: str) -> str:
    """Turn mmengine's error about a type that no one registered into one sentence."""
    match = re.search(r'(\w+) is not in the (mmdet|mmseg)::', message)
    if match is None:
        return ''
    name, package = match.groups()
    if name in ('PVT', 'PVTv2'):
        return (
            f'The config uses {name} without importing it; add '
            "custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)."
        )
    version = import_module(package).__version__
    found = f'{package} {version}, which is installed, has no {name}'
    release, pin = first_with(package, name), pinned(package)
    if release and release.startswith('onedl-') and not pin.startswith('onedl-'):
        return f'{found}; {release}, of the maintained fork, has it: make install STACK=onedl.'
    if pin.endswith(f'=={version}'):
        return (
            f'{found}; check the name, or if another package has it, name that in '
            'custom_imports = dict(imports=[...]).'
        )
    if release:
        return f'{found}; {release} was the first to have it: pip install {pin}.'
    return f'{found}; the configs of pvt_mm are made for {pin}: pip install {pin}.'


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
    """Add the arguments that train and test share."""
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


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines of text with even columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


def unique_names(paths: Sequence[str]) -> list[str]:
    """Return a name for each path, without folder and ending, numbered where it is taken."""
    names: list[str] = []
    for path in paths:
        stem = name = Path(path).stem.lstrip('.') or 'image'
        number = 1
        while name in names:
            number += 1
            name = f'{stem}_{number}'
        names.append(name)
    return names


def parse_size(text: str) -> tuple[int, int]:
    """Read ``800x1344`` (height x width) or ``224``."""
    sides = text.split('x')
    if not all(side.isdecimal() and int(side) for side in sides) or len(sides) > 2:
        raise UserError(f'{text} is no image size; write it as 224 or 800x1344 (height x width).')
    return int(sides[0]), int(sides[-1])


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows as a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    rule = ['-' * width for width in widths]
    for row in (head, rule, *rows):
        print('| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |')


def write_csv(path: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table to a file."""
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows([head, *rows])
