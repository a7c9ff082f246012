"""Data sets of mmseg: which files a config means, and which labels the maps hold."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.registry import DATASETS, init_default_scope

from pvt_mm.config import datasets, evaluators, is_format_only, type_name
from pvt_mm.datasets.consistency import with_inner
from pvt_mm.datasets.guard import GuardedLoader, data_error
from pvt_mm.datasets.ignore_index import IGNORED
from pvt_mm.errors import DataError, UserError
from pvt_mm.files import IMAGE_SUFFIXES

#: Label maps that a summary reads at most; and at least, where all classes are seen before.
MOST, ENOUGH = 500, 32

NO_IMAGE = 'no image of this suffix'
OTHER_SUFFIX = 'images of another suffix'
SPLIT_FILE = 'faulty split file'
NO_MAP = 'no label map'
NO_LABEL = 'no label in any map'
ABSENT = 'class in no label map'
MOSTLY_IGNORED = 'most pixels ignored'
#: What is found in a data set as a whole.
KINDS = {NO_IMAGE, OTHER_SUFFIX, SPLIT_FILE, NO_MAP, NO_LABEL, ABSENT, MOSTLY_IGNORED}


# Splits that are not scored


def drop_unread_maps(cfg: Config, loaders: Sequence[str]) -> None:
    """Leave out the label maps of splits that are predicted and not scored, in place.

    Such a split has ``format_only=True`` in its evaluators, and mostly no label maps.

    Raises:
        UserError: Where an evaluator has no folder for the predictions.
    """
    if cfg.get('default_scope') != 'mmseg':
        return
    for loader in loaders:
        if not is_format_only(cfg, loader):
            continue
        name = loader.replace('dataloader', 'evaluator')
        if not all(evaluator.get('output_dir') for evaluator in evaluators(cfg, loader)):
            raise UserError(
                f'{name} has format_only=True without output_dir, so that the predictions would be '
                f'lost; --out DIR of tools/test.py, or {name}.output_dir=DIR.'
            )
        for data in datasets(cfg, [loader]):
            data['pipeline'] = _without_maps(data.get('pipeline', []))
            if isinstance(data.get('data_prefix'), dict):
                data['data_prefix'].pop('seg_map_path', None)


def _without_maps(steps: Sequence[Any]) -> list[Any]:
    """Leave out what loads label maps, also inside test-time augmentation."""
    kept: list[Any] = []
    for step in steps:
        if isinstance(step, (list, tuple)):
            kept += [inner] if (inner := _without_maps(step)) else []
        elif not isinstance(step, dict):
            kept.append(step)
        elif not _loads_maps(step):
            inside = step.get('transforms')
            kept.append(ConfigDict(step, transforms=_without_maps(inside)) if inside else step)
    return kept


def _loads_maps(step: dict) -> bool:
    name = type_name(step)
    return name.startswith('Load') and 'Annotation' in name


def _needs_maps(steps: Sequence[Any]) -> bool:
    return _without_maps(steps) != list(steps)


# Files


def check_files(cfg: Config, loaders: Sequence[str]) -> None:
    """Check that mmseg's data sets find their images and label maps; warn of images left out.

    Raises:
        DataError: Naming the folder or split file, what is wrong and what to write.
    """
    if cfg.get('default_scope') != 'mmseg':
        return
    init_default_scope('mmseg')
    for data in datasets(cfg, loaders):
        for error in file_problems(data):
            if error.kind != OTHER_SUFFIX:
                raise error
            print_log(str(error), logger='current', level=logging.WARNING)


def file_problems(data: ConfigDict) -> Iterator[DataError]:
    """Yield why a data set of mmseg would not find its files, or only some of them.

    Args:
        data: The data set's part of a config.
    """
    try:
        dataset = DATASETS.build(dict(data, lazy_init=True, pipeline=[]))
    except Exception:  # the Runner will raise it again
        return
    if not _lists_as_mmseg(dataset):
        return
    images, maps = (str(dataset.data_prefix.get(key) or '') for key in ('img_path', 'seg_map_path'))
    if dataset.backend_args or '://' in images or not os.path.isdir(images):
        return
    has_split = bool(dataset.ann_file) and not os.path.isdir(dataset.ann_file)
    faults = list((_split_faults if has_split else _suffix_faults)(dataset, images, maps))
    yield from faults
    listed = all(error.kind == OTHER_SUFFIX for error in faults)
    if listed and _needs_maps(data.get('pipeline', [])):
        yield from _map_faults(dataset, images, maps)


def _lists_as_mmseg(dataset: Any) -> bool:
    return any(
        kind.__name__ == 'BaseSegDataset'
        and type(dataset).load_data_list is vars(kind).get('load_data_list')
        for kind in type(dataset).__mro__
    )


def _suffix_faults(dataset: Any, images: str, maps: str) -> Iterator[DataError]:
    """Compare ``img_suffix`` with the files in the folder of images."""
    suffix, found, others = dataset.img_suffix, 0, Counter[str]()
    for folder, _, names in os.walk(images, followlinks=True):
        beside = bool(maps) and Path(folder).is_relative_to(maps)
        for name in names:
            if name.endswith(suffix):
                found += 1
            elif _is_image(name) and not (beside and name.endswith(dataset.seg_map_suffix)):
                others[os.path.splitext(name)[1]] += 1
    listed = ', '.join(f'{count} end in {ending}' for ending, count in others.most_common(3))
    if not found:
        way = 'and none is an image; check img_path in data_prefix'
        if others:
            way = f'but {listed}: set img_suffix={others.most_common(1)[0][0]!r}'
        yield data_error(NO_IMAGE, f'no file here ends in {suffix!r}, {way}', images)
    elif others:
        yield data_error(OTHER_SUFFIX, f'{listed}, and img_suffix is {suffix!r}', images)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith('.')


def _split_faults(dataset: Any, images: str, maps: str) -> Iterator[DataError]:
    """Compare the lines of a split file with the files in the folder of images."""
    file, suffix = dataset.ann_file, dataset.img_suffix
    try:
        lines = Path(file).read_bytes().decode().removesuffix('\n').split('\n')  # as mmseg does
    except UnicodeDecodeError:
        yield data_error(SPLIT_FILE, 'it is not in UTF-8; save it as UTF-8', file)
        return
    except OSError:  # check_data reports it
        return
    if not any(line.strip() for line in lines):
        yield data_error(SPLIT_FILE, 'it names no image', file)
        return
    blank = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if blank:
        what = f'{len(blank)} of {len(lines)} lines are blank, such as line {blank[0]}; remove them'
        yield data_error(SPLIT_FILE, what, file)
    wrong = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if name and (meant := _meant(name, images, suffix)):
            wrong[number] = name, meant
    if wrong:
        number, (name, meant) = next(iter(wrong.items()))
        what = (
            f'{len(wrong)} of {len(lines)} lines are not the path of an image below img_path, '
            f'without img_suffix; in line {number}, instead of {name!r}, write {meant!r}'
        )
        yield data_error(SPLIT_FILE, what, file)
    names = [line.strip() for line in lines]
    if blank or wrong or any(os.path.isfile(os.path.join(images, name + suffix)) for name in names):
        return
    others = [end for end in _endings(Path(images, names[0])) if end.lower() in IMAGE_SUFFIXES]
    way = f'set img_suffix={others[0]!r}' if others else _holds(images)
    what = f'there is no {names[0]}{suffix}, and no image of the {len(names)} lines; {way}'
    yield data_error(NO_IMAGE, what, images)


def _meant(name: str, images: str, suffix: str) -> str:
    """Return what a line of a split file should be; '' where it is right, or nothing is known."""
    plain = name.isprintable() and not set(name) & set('\\/ \t.')
    if plain or os.path.isfile(os.path.join(images, name + suffix)):
        return ''
    whole = name.lstrip('\ufeff').replace('\\', '/')
    for text in (whole, whole.split()[0]):
        parts = [part for part in text.split('/') if part not in ('', '.')]
        for start in range(len(parts)):
            tail = '/'.join(parts[start:])
            for path in (tail, os.path.splitext(tail)[0]):
                if path != name and os.path.isfile(os.path.join(images, path + suffix)):
                    return path
    return ''


def _endings(stem: Path) -> list[str]:
    """Return what follows a name in the files that begin with it."""
    if not stem.parent.is_dir():
        return []
    names = sorted(os.listdir(stem.parent))
    return [name[len(stem.name) :] for name in names if name.startswith(stem.name)]


def _holds(folder: str) -> str:
    files = [path for path in sorted(Path(folder).rglob('*')) if path.is_file()][:3]
    names = ', '.join(str(path.relative_to(folder)) for path in files) or 'no file'
    return f'the folder holds {names}'


def _map_faults(dataset: Any, images: str, maps: str) -> Iterator[DataError]:
    """Tell of label maps of which none exists."""
    if not maps:
        what = (
            'data_prefix has no seg_map_path, and the pipeline has LoadAnnotations; a test split '
            'without label maps takes format_only=True in its evaluator'
        )
        yield data_error(NO_MAP, what, images)
        return
    expected = [Path(info['seg_map_path']) for info in dataset.load_data_list()]
    if not os.path.isdir(maps) or any(path.is_file() for path in expected):
        return
    suffix = dataset.seg_map_suffix
    stems = [path.with_name(path.name.removesuffix(suffix)) for path in expected[:10]]
    endings = Counter(ending for stem in stems for ending in _endings(stem))
    missing = os.path.relpath(expected[0], maps)
    if missing.startswith('..'):
        stem = os.path.relpath(stems[0], images)
        way = f'the split file has absolute paths; write {stem!r} and so on'
    elif endings:
        way = f'set seg_map_suffix={endings.most_common(1)[0][0]!r}'
    else:
        way = f'{_holds(maps)}; check seg_map_path and the names'
    yield data_error(NO_MAP, f'{missing} is missing, and all {len(expected)} are; {way}', maps)


# Labels


class Labels(NamedTuple):
    """How many pixels of each label the maps of a data set hold.

    Attributes:
        counts: Pixels by label; shape (256,).
        read: Maps that were counted.
        maps: Maps of the data set.
        classes: Names, in the order of the labels.
        ignored: The label that is ignored; None if none is.
        reduce_zero_label: Whether 0 in a map is ignored, and 1 the first class.
        folder: Where the maps are.
    """

    counts: np.ndarray
    read: int
    maps: int
    classes: tuple[str, ...]
    ignored: int | None
    reduce_zero_label: bool
    folder: str

    @property
    def absent(self) -> list[int]:
        """The classes that no map holds."""
        ignored = self.ignored
        return [i for i in range(len(self.classes)) if not self.counts[i] and i != ignored]

    @property
    def share_ignored(self) -> float:
        """The part of the pixels that is ignored, 0 to 1."""
        ignored = 0 if self.ignored is None else self.counts[self.ignored]
        return float(ignored / max(self.counts.sum(), 1))

    @property
    def has_any(self) -> bool:
        """Whether any pixel has a class that is not ignored."""
        return any(self.counts[i] for i in range(len(self.classes)) if i != self.ignored)

    def of_maps(self) -> str:
        """Say how many maps were counted."""
        return f'{self.read} label maps' + f' (of {self.maps:,})' * (self.read < self.maps)


def labels_of(dataset: Any, counts: np.ndarray, read: int, ignored: int | None) -> Labels:
    """Return the labels of a data set of mmseg that were counted."""
    return Labels(
        counts=counts,
        read=read,
        maps=len(dataset),
        classes=tuple(dataset.metainfo.get('classes') or ()),
        ignored=ignored,
        reduce_zero_label=bool(dataset.reduce_zero_label),
        folder=str(dataset.data_prefix.get('seg_map_path') or dataset.data_root),
    )


def count(labels: np.ndarray) -> np.ndarray:
    """Return the number of pixels of each label; shape (256,)."""
    return np.bincount(labels.astype(np.uint8).ravel(), minlength=256)


def survey(dataset: Any, ignored: int | None) -> list[Labels]:
    """Count the labels of a data set, or of those inside it, in some of its maps.

    Maps are drawn evenly, the same ones each time. It stops early where all classes are seen.

    Args:
        dataset: Built, perhaps guarded. Only data sets of mmseg with label maps are counted.
        ignored: The label that the model ignores.
    """
    found = []
    for leaf in with_inner(dataset):
        load = _map_loader(getattr(getattr(leaf, 'pipeline', None), 'transforms', []))
        if load is not None and hasattr(leaf, 'reduce_zero_label'):
            found.append(_count_some(leaf, load, ignored))
    return found


def _map_loader(transforms: Any) -> Any:
    """Return the transform that loads label maps, without its guard; None if there is none."""
    for transform in transforms:
        plain = transform.loader if isinstance(transform, GuardedLoader) else transform
        if type(plain).__name__ == 'LoadAnnotations':
            return plain
        for name in ('transforms', 'subroutines'):
            inner = getattr(transform, name, [])
            if (load := _map_loader(getattr(inner, 'transforms', inner))) is not None:
                return load
    return None


def _count_some(dataset: Any, load: Any, ignored: int | None) -> Labels:
    labels = labels_of(dataset, np.zeros(256, np.int64), 0, ignored)
    for index in np.random.RandomState(0).permutation(len(dataset)).tolist():
        try:
            values = load(dataset.get_data_info(index))['gt_seg_map']
        except Exception:  # the training names the file
            continue
        if values.ndim == 2:
            labels = labels._replace(counts=labels.counts + count(values), read=labels.read + 1)
        if labels.has_any and labels.read >= (MOST if labels.absent else ENOUGH):
            break
    return labels


def label_problems(labels: Labels) -> Iterator[DataError]:
    """Yield what a training would not tell: no label at all, absent classes, most of it ignored."""
    if not labels.read or not labels.classes:
        return
    share = _percent(labels.share_ignored)
    if not labels.has_any:
        what = f'all pixels of {labels.of_maps()} are ignored; {_way(labels)}'
        yield data_error(NO_LABEL, what, labels.folder)
    elif labels.absent:
        names = [f'{labels.classes[i]} (label {i})' for i in labels.absent]
        listed = ', '.join(names[:5]) + f' and {len(names) - 5} more' * (len(names) > 5)
        what = (
            f'{listed} in none of {labels.of_maps()}, and {share} of their pixels are ignored; '
            f'{_way(labels)}'
        )
        yield data_error(ABSENT, what, labels.folder)
    elif labels.share_ignored > 0.5:
        what = f'{share} of the pixels of {labels.of_maps()} are ignored'
        yield data_error(MOSTLY_IGNORED, what, labels.folder)


def _percent(share: float) -> str:
    text = f'{share:.1%}'
    return 'fewer than 0.1%' if text == '0.0%' and share else text


def _way(labels: Labels) -> str:
    """Say what to change, by what the maps hold."""
    names, absent, shift = labels.classes, labels.absent, int(labels.reduce_zero_label)
    if shift and labels.share_ignored and len(names) - 1 in absent:
        return (
            f'reduce_zero_label=True ignores 0 and takes 1 for {names[0]}: if 0 stands for '
            f'{names[0]}, set it False in the data set and in LoadAnnotations'
        )
    if not shift and labels.share_ignored and absent:
        return f'if {labels.ignored} stands for {names[absent[-1]]}, save {absent[-1]} instead'
    held = [str(value + shift) for value in np.flatnonzero(labels.counts) if value < IGNORED]
    return f'the maps hold {", ".join(held[:10])}: compare them with the order of the classes'


def check_labels(dataset: Any, ignored: int | None) -> tuple[str, list[str]]:
    """Count the labels of a data set, and say what is odd about them.

    Returns:
        What part of the pixels is ignored, '' for a data set without label maps; and warnings.

    Raises:
        DataError: Where no pixel has a label.
    """
    surveys = [labels for labels in survey(dataset, ignored) if labels.read]
    problems = [error for labels in surveys for error in label_problems(labels)]
    for error in problems:
        if error.kind == NO_LABEL:
            raise error
    ignored_pixels = sum(labels.share_ignored * labels.counts.sum() for labels in surveys)
    pixels = sum(labels.counts.sum() for labels in surveys)
    note = f'{_percent(ignored_pixels / pixels)} of the pixels ignored' if surveys else ''
    return note, [f'{error.file}: {error.detail}.' for error in problems]
