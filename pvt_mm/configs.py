"""Finds configs by their path or their name."""

from __future__ import annotations

import difflib
import glob
import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from mmengine.config import Config

from .runtime import UserError

#: The configs that pvt_mm carries.
BUNDLED = Path(__file__).parent / '.mim' / 'configs' / 'pvt'


def load(name: str | Path, import_custom_modules: bool = True) -> Config:
    """Load a config by its path or its ``PACKAGE::DIR/FILE.py`` name.

    Raises:
        UserError: Where there is none, naming the nearest, or it does not load.
    """
    file = find(str(name))
    try:
        return Config.fromfile(file, import_custom_modules=import_custom_modules)
    except (SyntaxError, KeyError, TypeError, ImportError, OSError) as error:
        reason = str(error).splitlines()[0].rstrip('.')
        raise UserError(f'The config {name} does not load: {reason}.') from error


def find(name: str) -> Path:
    """Return the file of a config named by its path or as ``PACKAGE::DIR/FILE.py``.

    Raises:
        UserError: Where there is none, naming the nearest.
    """
    package, is_named, path = name.rpartition('::')
    folder = folder_of(package) if is_named else Path()
    file = folder / path
    if file.is_file():
        return file
    if is_named:
        known = [f'{package}::{other}' for other in names_in(folder)]
        fallback = f'see {folder}.'
    else:
        fallback = 'check the path.'
        known = [
            os.path.relpath(other) if other.is_relative_to(Path.cwd()) else str(other)
            for place in (BUNDLED.resolve(), file.parent.resolve())
            for other in sorted(place.glob('*.py'))
        ]
    hint = nearest(file.stem, known, key=lambda other: Path(other).stem)
    raise UserError(f'There is no config {name}; {hint or fallback}')


def folder_of(package: str) -> Path:
    """Return the folder of the configs that an installed package carries.

    Raises:
        UserError: Where it is not installed, or carries none.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    for place in (spec.submodule_search_locations if spec else None) or ():
        folder = Path(place) / '.mim' / 'configs'
        if folder.is_dir():
            return folder
    raise UserError(f'No installed package {package} carries configs; choose mmdet or mmseg.')


def names_in(folder: Path) -> list[str]:
    """Return the paths, relative to a folder, of the configs in it that are no mere bases."""
    paths = map(Path, glob.glob('**/*.py', root_dir=folder, recursive=True))  # follows links
    return sorted(path.as_posix() for path in paths if '_base_' not in path.parts)


def nearest(wanted: str, names: Iterable[str], key: Callable[[str], str] = str) -> str:
    """Ask for one of the names that come nearest to one that is not there; '' where none does.

    Args:
        wanted: What is not there; it may be the beginning of a name.
        names: Those that are there.
        key: What of such a name is compared.
    """
    matcher = difflib.SequenceMatcher(b=wanted, autojunk=False)

    def likeness(name: str) -> float:
        ratios = []
        for text in (key(name), key(name)[: len(wanted)]):
            matcher.set_seq1(text)
            ratios.append(matcher.ratio())
        return max(ratios)

    ranked = sorted((-likeness(name), len(name), name) for name in set(names))[:3]
    near = [name for minus_ratio, _, name in ranked if minus_ratio < -0.6]
    return f'did you mean {" or ".join(near)}?' if near else ''
