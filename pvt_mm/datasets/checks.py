"""Check a data set before a training: COCO's format, and mmseg's label maps.

Images and annotations are read by the config's own data set and loading transforms, as in training:
what stops here stops there. What mmdet skips without a message is found in the annotation file.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine import fileio
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, init_default_scope

from pvt_mm.config import datasets, task_of, type_name
from pvt_mm.datasets import label_maps
from pvt_mm.datasets.consistency import check_classes, is_coco
from pvt_mm.datasets.guard import guard_pipeline, is_jpeg
from pvt_mm.datasets.ignore_index import ignored_label, match_ignored
from pvt_mm.errors import DataError, UserError
from pvt_mm.tables import text_table

#: The longest path that every system can open.
LONGEST_PATH = 259
_EXIF_ORIENTATION = 274
_NAMED = 'stops and names the file; --skip-bad-images takes another image instead'
_AT_START = 'stops before the first iteration'

#: Kinds of bad data that stop a training, and how.
STOPPING = {
    'missing file': _NAMED,
    'path too long': _NAMED,
    'unreadable file': _NAMED,
    'unreadable image': _NAMED,
    'truncated image': _NAMED,
    'image of another size': _NAMED,
    'label map of another size': _NAMED,
    'label map in colour': _NAMED,
    'unknown id in a label map': _NAMED,
    'broken annotation': _NAMED,
    'incomplete entry': _AT_START,
    'annotation id given twice': _AT_START,
    'data set that does not load': _AT_START,
    'classes that disagree': _AT_START,
    label_maps.NO_IMAGE: _AT_START,
    label_maps.SPLIT_FILE: _AT_START,
    label_maps.NO_MAP: _AT_START,
    label_maps.NO_LABEL: _AT_START,
}
#: Kinds of data that a training goes on with, and what it does with them.
HARMLESS = {
    'image without objects': 'leaves the image out (filter_cfg)',
    'image without objects, kept': 'trains on it as background',
    'image below min_size': 'leaves the image out (filter_cfg)',
    'image id given twice': 'keeps the last image of the id, with the objects of all',
    'box of zero area': 'leaves the object out',
    'box outside the image': 'leaves the object out',
    'box partly outside': 'clips it at the border when the image is resized',
    'unknown category': 'leaves the object out',
    'annotation of no image': 'leaves the object out',
    'mask without polygon': 'leaves the object out where masks are learnt',
    'crowd region': 'sets it apart as ignored, which the recipes of pvt_mm take for background',
    'RLE mask': 'decodes it where masks are learnt',
    'label map without image': 'leaves it out',
    'label map without labels': 'learns nothing from it',
    'JPEG label map': 'trains on labels that the compression has changed',
    label_maps.ABSENT: 'never learns the class; its score is NaN',
    label_maps.MOSTLY_IGNORED: 'learns nothing from them',
    label_maps.OTHER_SUFFIX: 'leaves them out',
    'grayscale image': 'reads it as three equal channels',
    'CMYK image': 'converts it to RGB',
    'image with transparency': 'drops the transparency and shows what lies under it',
    '16-bit image': 'cuts it to 8 bits',
    'EXIF-rotated image': 'turns it upright, as boxes and label maps must be too',
    'non-ASCII path': 'reads it like any other',
    'very long path': 'reads it; some systems open no path over 259 characters',
}


#: Wraps an iterator and gets its length, as a progress bar does.
Progress = Callable[..., Iterable]


def _silent(samples: Iterable, total: int) -> Iterable:
    return samples


@dataclass(frozen=True)
class Finding:
    """Something about one file that its owner should know."""

    file: str
    kind: str
    detail: str = ''


def check_config(
    cfg: Config, config: str, loaders: Sequence[str], progress: Progress = _silent
) -> tuple[list[Finding], int]:
    """Check the data sets of a config.

    Args:
        cfg: Config of a detector or segmentor.
        config: Its path, for messages.
        loaders: Those whose data sets are checked, each once.
        progress: Shows how many images are done.

    Returns:
        The findings, and the number of images that were read.

    Raises:
        UserError: For data sets that are neither in COCO's format nor mmseg's.
    """
    init_default_scope(task_of(cfg))
    found, images = [], 0
    for check in (check_classes, match_ignored):
        try:
            check(cfg, config, loaders)
        except UserError as error:
            found.append(Finding(config, 'classes that disagree', str(error)))
    for data in _distinct(datasets(cfg, loaders)):
        more, count = _check_dataset(data, progress, ignored_label(cfg))
        found += more
        images += count
    return found, images


def _distinct(found: Iterator[ConfigDict]) -> Iterator[ConfigDict]:
    """Leave out data sets that are the same as an earlier one, but for the pipeline."""
    seen: list[dict] = []
    for data in found:
        source = {key: value for key, value in data.items() if key != 'pipeline'}
        if source not in seen:
            seen.append(source)
            yield data


def _check_dataset(
    data: ConfigDict, progress: Progress, ignored: int | None
) -> tuple[list[Finding], int]:
    loading = [step for step in data.get('pipeline', []) if type_name(step).startswith('Load')]
    try:
        dataset = DATASETS.build(dict(data, pipeline=loading, lazy_init=True))
    except ValueError as error:
        place = data.get('ann_file') or data.get('data_root')
        return [Finding(str(place), 'data set that does not load', str(error))], 0
    guard_pipeline(dataset, ignored=ignored)
    coco = is_coco(dataset)
    if not coco and not hasattr(dataset, 'reduce_zero_label'):
        raise UserError(
            f'This tool reads COCO-style data sets and those of mmseg; {data.type} is another kind.'
        )
    found = list(map(_finding, label_maps.file_problems(data)))
    if stops(found):
        return found, 0
    with contextlib.ExitStack() as stack:
        if coco:
            entries = Entries(dataset, any(step.get('with_mask') for step in loading))
            found += entries.found
            if entries.content is None:
                return found, 0
            if entries.fatal:  # the other entries can still be checked
                copy = stack.enter_context(tempfile.NamedTemporaryFile('w', suffix='.json'))
                json.dump(entries.content, copy)
                copy.flush()
                dataset.ann_file = copy.name
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
                dataset.full_init()
        except Exception as error:  # any kind, on unexpected content
            reason = f'{type(error).__name__}: {error}'
            if 'need at least one array' in reason:
                reason = 'no image is left to train on'
            place = dataset.ann_file or dataset.data_prefix.get('img_path')
            return [*found, Finding(str(place), 'data set that does not load', reason)], 0
    if coco:
        found += entries.images_without_objects(dataset)
    else:
        found += _maps_without_image(dataset)
    return found + _check_samples(dataset, progress, ignored), len(dataset)


def _finding(error: DataError) -> Finding:
    return Finding(error.file, error.kind, error.detail)


# Annotation files of COCO's format


class Entries:
    """The entries of an annotation file, and what mmdet does with them.

    Args:
        dataset: A CocoDataset, not initialised.
        with_mask: Whether masks are learnt.
        content: The file's content; by default it is read.

    Attributes:
        found: The findings.
        fatal: Whether the file stops mmdet.
        content: The file's content without the entries that stop mmdet; None if nothing is left.
    """

    def __init__(
        self, dataset: Any, with_mask: bool, content: dict[str, Any] | None = None
    ) -> None:
        self.found: list[Finding] = []
        self.fatal = False
        self.content: dict[str, Any] | None = None
        self._file = str(dataset.ann_file)
        self._folder = str(dataset.data_prefix['img'])
        self._with_mask = with_mask
        try:
            if content is None:
                text = fileio.get_text(self._file, backend_args=dataset.backend_args)
                content = dict(json.loads(text))
            images, annotations = content['images'], content['annotations']
            names = {category['id']: category['name'] for category in content['categories']}
        except (LookupError, TypeError, ValueError) as error:
            reason = f'{type(error).__name__}: {error}'
            self._add(self._file, 'data set that does not load', reason)
            return
        self._names = names
        self._classes = set(dataset.metainfo['classes'])
        self._images: dict[Any, dict] = {}
        self._incomplete: set = set()
        self._objects: Counter = Counter()
        kept_images = [entry for entry in images if self._check_image(entry)]
        ids: set = set()
        kept = [entry for entry in annotations if self._check_annotation(entry, ids)]
        self.content = {**content, 'images': kept_images, 'annotations': kept}

    def _add(self, file: str, kind: str, detail: str) -> None:
        self.fatal |= kind in STOPPING
        self.found.append(Finding(file, kind, detail))

    def _path(self, image: dict) -> str:
        return os.path.join(self._folder, image['file_name'])

    def _check_image(self, entry: dict) -> bool:
        """Check an image's entry; return whether mmdet can load it."""
        lacking = [key for key in ('id', 'file_name', 'height', 'width') if key not in entry]
        if lacking:
            name = self._path(entry) if 'file_name' in entry else self._file
            what = f'image {entry.get("id", "")} has no {", ".join(lacking)}'
            self._add(name, 'incomplete entry', what)
            self._incomplete.add(entry.get('id'))
            return False
        if entry['id'] in self._images:
            first = self._images[entry['id']]['file_name']
            self._add(self._path(entry), 'image id given twice', f'{entry["id"]}, as of {first}')
        self._images[entry['id']] = entry
        return True

    def _check_annotation(self, entry: dict, ids: set) -> bool:
        """Check an object's entry; return whether mmdet can load it."""
        name = f'annotation {entry.get("id", "")}'
        lacking = [key for key in ('id', 'image_id', 'category_id') if key not in entry]
        image = self._images.get(entry.get('image_id'))
        if image is not None and not entry.get('ignore'):
            lacking += [key for key in ('bbox', 'area') if not _is_number(entry, key)]
        file = self._path(image) if image is not None else self._file
        if lacking:
            self._add(file, 'incomplete entry', f'{name} has no valid {", ".join(lacking)}')
            return False
        if image is None and entry['image_id'] in self._incomplete:
            return False
        if image is None:
            self._add(file, 'annotation of no image', f'{name}, image {entry["image_id"]}')
            return True
        if entry['id'] in ids:
            self._add(file, 'annotation id given twice', name)
            return False
        ids.add(entry['id'])
        if entry.get('ignore'):
            return True
        kind, detail = self._left_out(entry, image)
        if kind:
            self._add(file, kind, f'{name}: {detail}')
            return True
        self._objects[entry['image_id']] += 1
        for kind in self._oddities(entry, image):
            self._add(file, kind, name)
        return True

    def _left_out(self, entry: dict, image: dict) -> tuple[str, str]:
        """Return kind and detail of an object that mmdet skips, in the order of mmdet's checks."""
        x, y, width, height = entry['bbox']
        if width < 1 or height < 1 or entry['area'] <= 0:
            return 'box of zero area', f'{width}x{height}, area {entry["area"]}'
        inside = [
            max(0, min(start + size, end) - max(start, 0))
            for start, size, end in ((x, width, image['width']), (y, height, image['height']))
        ]
        if 0 in inside:
            return 'box outside the image', f'{entry["bbox"]} in {image["width"]}x{image["height"]}'
        category = self._names.get(entry['category_id'])
        if category not in self._classes:
            return 'unknown category', f'{entry["category_id"]}, {category or "not in the file"}'
        mask: Any = entry.get('segmentation')
        learnt = self._with_mask and mask and isinstance(mask, list)
        if learnt and not any(len(part) >= 6 and len(part) % 2 == 0 for part in mask):
            return 'mask without polygon', f'{len(mask)} of fewer than 3 points'
        return '', ''

    def _oddities(self, entry: dict, image: dict) -> Iterator[str]:
        """Yield what is unusual about an object that mmdet takes."""
        x, y, width, height = entry['bbox']
        if x < 0 or y < 0 or x + width > image['width'] or y + height > image['height']:
            yield 'box partly outside'
        if entry.get('iscrowd'):
            yield 'crowd region'
        if isinstance(entry.get('segmentation'), dict):
            yield 'RLE mask'

    def images_without_objects(self, dataset: Any) -> list[Finding]:
        """Return the images without objects in a loaded data set."""
        used = {dataset.get_data_info(index)['img_id'] for index in range(len(dataset))}
        smallest = (dataset.filter_cfg or {}).get('min_size', 0)
        found = []
        for image_id, image in self._images.items():
            kind = ''
            if image_id in used:
                kind = '' if self._objects[image_id] else 'image without objects, kept'
            elif not dataset.test_mode and min(image['width'], image['height']) < smallest:
                kind = 'image below min_size'
            elif not self._objects[image_id]:
                kind = 'image without objects'
            if kind:
                found.append(Finding(self._path(image), kind))
        return found


def _is_number(entry: dict, key: str) -> bool:
    """Tell whether an entry has a number under a key; in a box, four numbers."""
    value = entry.get(key)
    values = value if key == 'bbox' else [value]
    return (
        isinstance(values, list)
        and len(values) == (4 if key == 'bbox' else 1)
        and all(isinstance(number, (int, float)) for number in values)
    )


# Label maps of mmseg


def _maps_without_image(dataset: Any) -> list[Finding]:
    """Return label maps without an image, where the folder of images is the list of samples."""
    folder = dataset.data_prefix.get('seg_map_path')
    if dataset.ann_file or not folder or not os.path.isdir(folder):
        return []
    used = {
        os.path.normpath(dataset.get_data_info(index)['seg_map_path'])
        for index in range(len(dataset))
    }
    maps = (os.path.normpath(path) for path in Path(folder).rglob(f'*{dataset.seg_map_suffix}'))
    return [Finding(path, 'label map without image') for path in sorted(maps) if path not in used]


# Samples

_dataset: Any = None
_ignored: int | None = None


def _check_samples(dataset: Any, progress: Progress, ignored: int | None) -> list[Finding]:
    """Read every image and annotation of a loaded data set, on all cores."""
    found: list[Finding] = []
    counts, maps = np.zeros(256, np.int64), 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    with ProcessPoolExecutor(cores, initializer=_start, initargs=(dataset, ignored)) as pool:
        samples = pool.map(_check_sample, range(len(dataset)), chunksize=16)
        for more, labels in progress(samples, total=len(dataset)):
            found += more
            if labels is not None:
                counts, maps = counts + labels, maps + 1
    if maps:
        labels = label_maps.labels_of(dataset, counts, maps, ignored)
        found += map(_finding, label_maps.label_problems(labels))
    return found


def _start(dataset: Any, ignored: int | None) -> None:
    """Prepare a process for checking samples; what decoders print is hidden, as it is reported."""
    global _dataset, _ignored
    _dataset, _ignored = dataset, ignored
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _check_sample(index: int) -> tuple[list[Finding], Any]:
    """Return the findings of a sample, and how many pixels of each label it has."""
    info = _dataset.get_data_info(index)
    file = str(info['img_path'])
    found = [Finding(file, kind) for kind in _path_kinds(file, _dataset.data_root or '')]
    found += [Finding(file, kind) for kind in _image_kinds(file, _dataset.backend_args)]
    try:
        results = _dataset.pipeline(info)
    except DataError as error:
        return [*found, _finding(error)], None
    labels = results.get('gt_seg_map')
    if labels is None or 'seg_map_path' not in info:  # mmdet's are of another kind
        return found, None
    file = str(info['seg_map_path'])
    if (labels == _ignored).all():
        found.append(Finding(file, 'label map without labels'))
    if is_jpeg(file):
        found.append(Finding(file, 'JPEG label map'))
    return found, label_maps.count(labels)


def _path_kinds(file: str, root: str) -> Iterator[str]:
    if not file.removeprefix(root).isascii():
        yield 'non-ASCII path'
    if len(os.path.abspath(file)) > LONGEST_PATH and os.path.exists(file):
        yield 'very long path'


def _image_kinds(file: str, backend_args: dict | None) -> Iterator[str]:
    """Yield how a readable image differs from three channels of 8 bits, by its header."""
    from PIL import Image  # a requirement of mmcv, not of pvt_mm

    try:
        image = Image.open(io.BytesIO(fileio.get(file, backend_args=backend_args)))
        wide = _is_wide(image)  # before it is decoded
        transparent = image.has_transparency_data and _min_alpha(image) < 255
    except Exception:  # the loading transform reports it
        return
    if transparent:
        yield 'image with transparency'
    if image.mode in ('1', 'L', 'LA', 'I', 'I;16', 'I;16B', 'I;16L', 'F'):
        yield 'grayscale image'
    if image.mode == 'CMYK':
        yield 'CMYK image'
    if image.mode.startswith(('I', 'F')) or wide:
        yield '16-bit image'
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        yield 'EXIF-rotated image'


def _min_alpha(image: Any) -> int:
    return image.convert('RGBA').getchannel('A').getextrema()[0]


def _is_wide(image: Any) -> bool:
    """Tell whether an image that Pillow opens in 8 bits has 16 bits per channel."""
    return bool(image.tile and re.search(';16[BLN]', str(image.tile[0])))


# Reports


def report(findings: Sequence[Finding], images: int, longest: int | None = 10) -> str:
    """Return the findings as text: by file, then in a table.

    Args:
        findings: To report.
        images: How many images were read.
        longest: How many files are listed of a kind that does not stop training; None lists all.
    """
    if not findings:
        return f'Nothing found in {images} images.'
    by_kind: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_kind[finding.kind].append(finding)
    kinds = [kind for kind in (*STOPPING, *HARMLESS) if kind in by_kind]
    lines = []
    rows = []
    for kind in kinds:
        of_kind = by_kind[kind]
        shown = of_kind if kind in STOPPING else of_kind[:longest]
        lines.append(f'{kind}:')
        lines += [f'  {item.file}' + f'  ({item.detail})' * bool(item.detail) for item in shown]
        if len(shown) < len(of_kind):
            lines.append(f'  ... and {len(of_kind) - len(shown)} more; --all lists them')
        effect = STOPPING.get(kind) or HARMLESS[kind]
        files = len({item.file for item in of_kind})
        rows.append((kind, str(files), str(len(of_kind)), effect))
    table = text_table(('kind', 'files', 'count', 'what training does'), rows)
    stopping = stops(findings)
    end = f'Training would stop: {len(stopping)} of {len(findings)} findings.'
    if not stopping:
        end = f'Training would not stop on any of these {len(findings)} findings.'
    return '\n'.join([*lines, '', table, '', f'{images} images read. {end}'])


def stops(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings on which a training would stop."""
    return [finding for finding in findings if finding.kind in STOPPING]
