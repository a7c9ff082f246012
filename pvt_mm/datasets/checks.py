"""Check a data set before a training: COCO's format, and mmseg's label maps.

Images and annotations are read by the config's own data set and loading transforms, as in training:
what stops here stops there. What mmdet skips without a message is found in the annotation file.
"""

from __future__ import annotations

import io
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from mmengine import fileio
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, init_default_scope

from pvt_mm.config import datasets, task_of, type_name
from pvt_mm.datasets import label_maps
from pvt_mm.datasets.coco_file import AT_START, TOLD
from pvt_mm.datasets.coco_readers import (
    check_evaluators,
    check_learnt,
    load_checked,
    metrics_of,
    read_entries,
)
from pvt_mm.datasets.consistency import check_classes, is_coco
from pvt_mm.datasets.findings import Finding
from pvt_mm.datasets.guard import guard_pipeline, is_jpeg, reason_of
from pvt_mm.datasets.ignore_index import ignored_label, match_ignored
from pvt_mm.errors import DataError, UserError, is_unknown_name
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
    **dict.fromkeys(AT_START, _AT_START),
    'classes that disagree': _AT_START,
    'evaluator that reads another file': _AT_START,
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
    'object marked ignore': 'leaves the object out',
    'mask without polygon': 'leaves the object out where masks are learnt',
    'RLE mask, not decoded': 'leaves the object out where masks are learnt',
    'class without objects': 'never learns it; the mean score leaves it out',
    **TOLD,
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
    for check, kind in (
        (check_classes, 'classes that disagree'),
        (match_ignored, 'classes that disagree'),
        (check_evaluators, 'evaluator that reads another file'),
    ):
        try:
            check(cfg, config, loaders)
        except UserError as error:
            found.append(Finding(config, kind, str(error)))
    learnt: list[Any] = []
    for data, metrics in _distinct(cfg, loaders):
        more, dataset = _check_dataset(data, metrics, progress, ignored_label(cfg))
        found += more
        images += len(dataset or ())
        if dataset is not None and not dataset.test_mode:
            learnt.append(getattr(dataset, 'census', None))
    try:
        check_learnt(learnt)
    except DataError as error:
        found.append(Finding(config, error.kind, error.detail))
    return found, images


def _distinct(cfg: Config, loaders: Sequence[str]) -> Iterator[tuple[ConfigDict, list[dict]]]:
    """Yield data sets and their metrics, but none that only differs in the pipeline."""
    seen: list[tuple] = []
    for loader in loaders:
        metrics = metrics_of(cfg, loader)
        for data in datasets(cfg, [loader]):
            source = {key: value for key, value in data.items() if key != 'pipeline'}, metrics
            if source not in seen:
                seen.append(source)
                yield data, metrics


def _check_dataset(
    data: ConfigDict, metrics: list[dict], progress: Progress, ignored: int | None
) -> tuple[list[Finding], Any]:
    """Check a data set; return the findings, and the data set if it loads."""
    loading = [step for step in data.get('pipeline', []) if type_name(step).startswith('Load')]
    place = str(data.get('ann_file') or data.get('data_root'))
    try:
        dataset = DATASETS.build(dict(data, pipeline=loading, lazy_init=True))
    except Exception as error:  # unexpected values in the config raise anything
        if is_unknown_name(error):
            raise
        return [Finding(place, 'data set that does not load', reason_of(error))], None
    guard_pipeline(dataset, ignored=ignored)
    coco = is_coco(dataset)
    if not coco and not hasattr(dataset, 'reduce_zero_label'):
        raise UserError(
            f'This tool reads COCO-style data sets and those of mmseg; {data.type} is another kind.'
        )
    found = list(map(_finding, label_maps.file_problems(data)))
    if stops(found):
        return found, None
    try:
        if coco:
            entries = read_entries(dataset, metrics)
            found += entries.found
            if entries.content is None:
                return found, None
            load_checked(dataset, entries)
            found += entries.images_without_objects(dataset)
        else:
            dataset.full_init()
            found += _maps_without_image(dataset)
    except DataError as error:
        return [*found, _finding(error)], None
    except Exception as error:  # any kind, on unexpected content
        place = dataset.ann_file or dataset.data_prefix.get('img_path')
        return [*found, Finding(str(place), 'data set that does not load', reason_of(error))], None
    return found + _check_samples(dataset, progress, ignored), dataset


def _finding(error: DataError) -> Finding:
    return Finding(error.file, error.kind, error.detail)


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
