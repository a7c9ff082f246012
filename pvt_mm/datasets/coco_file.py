"""COCO's annotation files: each entry is checked once, and what can be worked out is added.

A file has several readers: mmdet's data set, its loading transforms, and pycocotools, which scores.
What any of them needs is checked here before the first of them reads. Training, testing and
``check_dataset`` all call it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pvt_mm.datasets.coco_values import (
    bad_id,
    bad_ids,
    bad_image,
    bad_mask,
    complete,
    id_of,
    is_box,
    is_file_name,
    is_outside,
    is_polygon,
    is_text,
    lacking,
    shown,
)
from pvt_mm.datasets.findings import Finding

#: Kinds of findings that stop a training, test or check before an image is read.
AT_START = (
    'incomplete entry',
    'invalid entry',
    'annotation id given twice',
    'data set that does not load',
    'no object to learn',
)
#: Kinds that leave an object out of a training.
LEFT_OUT = (
    'annotation of no image',
    'object marked ignore',
    'crowd region',
    'box of zero area',
    'box outside the image',
    'unknown category',
    'mask without polygon',
    'RLE mask, not decoded',
)
#: Kinds that a run tells once, and what it does then.
TOLD = {
    'area worked out': 'takes the area of the mask, or else of the box',
    'no iscrowd': 'takes 0',
    'annotation id below 1': 'scores with ids from 1, as pycocotools takes 0 for no match',
    'no object to score': 'gives a score of -1',
}


@dataclass(frozen=True)
class Use:
    """What the objects of a file are used for.

    Args:
        labelled: They are learnt or scored; a test that only writes its predictions has none.
        scored: pycocotools reads them.
        masks: Their masks are learnt.
        decoded: Run-length masks are learnt too (``poly2mask``).
        scored_masks: pycocotools reads their masks.
        min_size: Images with a shorter side are left out.
        with_empty: Images without objects are used too.
    """

    labelled: bool = True
    scored: bool = False
    masks: bool = False
    decoded: bool = True
    scored_masks: bool = False
    min_size: float = 0
    with_empty: bool = True


@dataclass
class Census:
    """How many objects of a data set are learnt, by class, and left out, by kind."""

    used: Counter
    left_out: Counter

    def __add__(self, other: Census) -> Census:
        return Census(self.used + other.used, self.left_out + other.left_out)

    def __str__(self) -> str:
        used, left_out = self.used.total(), self.left_out.total()
        text = f'{used:,} objects used'
        if left_out:
            kinds = ', '.join(f'{count:,} {kind}' for kind, count in self.left_out.most_common())
            text += f', {left_out:,} left out ({kinds})'
        return text


class Entries:
    """The entries of an annotation file, and what their readers do with them.

    Entries are changed in place: an ``area`` that is no positive number is worked out from the
    mask or the box; of a mask that is scored, parts of fewer than 3 points are removed, as mmdet
    does in training; where objects are scored, a missing ``iscrowd`` becomes 0.

    Args:
        content: The file's content.
        file: The file, for messages.
        folder: Of the images, for messages.
        classes: Names of the classes.
        use: What the objects are used for.

    Attributes:
        found: The findings.
        content: The content without entries that stop mmdet; None if nothing can be used.
        census: How many objects are learnt and left out.
    """

    def __init__(
        self, content: Any, file: str, folder: str, classes: Sequence[str], use: Use
    ) -> None:
        self.found: list[Finding] = []
        self.content: dict[str, Any] | None = None
        self.census = Census(Counter(dict.fromkeys(classes, 0)), Counter())
        self._file, self._folder, self._use = file, folder, use
        self._names: dict[Any, str] = {}
        self._images: dict[Any, dict] = {}
        self._unusable: set = set()  # ids of images whose entries are
        self._objects: Counter = Counter()  # by image
        self._with_class: set = set()  # images that mmdet's filter takes for such with objects
        self._added: Counter = Counter()
        problem = _structure(content, use.labelled)
        if problem:
            self.add(file, 'data set that does not load', problem)
            return
        categories = [entry for entry in content['categories'] if self._check_category(entry)]
        images = [entry for entry in content['images'] if self._check_image(entry)]
        ids: set = set()
        annotations = content.get('annotations', [])
        kept = [entry for entry in annotations if self._check_annotation(entry, ids)]
        self.content = dict(content, categories=categories, images=images, annotations=kept)
        for kind, count in self._added.items():
            self.add(file, kind, f'{count} of {len(annotations)} objects')
        self._absent_classes()

    def add(self, file: str, kind: str, detail: str = '') -> None:
        """Add a finding."""
        self.found.append(Finding(file, kind, detail))

    def stopping(self) -> list[Finding]:
        """Return the findings with which the file cannot be used."""
        return [finding for finding in self.found if finding.kind in AT_START]

    def _path(self, image: dict) -> str:
        return os.path.join(self._folder, image['file_name'])

    def _check_category(self, entry: Any) -> bool:
        problem = lacking(entry, ('id', 'name')) or bad_id(entry, 'id', self._names)
        if not problem and not (type(entry['name']) is str and is_text(entry['name'])):
            problem = 'invalid entry', f'name is {shown(entry["name"])}'
        if problem:
            self.add(self._file, problem[0], f'category {id_of(entry)}: {problem[1]}')
            return False
        self._names[entry['id']] = entry['name']
        return True

    def _check_image(self, entry: Any) -> bool:
        """Check an image's entry; return whether mmdet can load it."""
        problem = lacking(entry, ('id', 'file_name', 'height', 'width'))
        problem = problem or bad_image(entry) or bad_id(entry, 'id', self._images)
        if problem:
            name = entry.get('file_name') if isinstance(entry, dict) else None
            file = self._path(entry) if name and is_file_name(name) else self._file
            self.add(file, problem[0], f'image {id_of(entry)}: {problem[1]}')
            if isinstance(entry, dict) and not bad_id(entry, 'id'):
                self._unusable.add(entry['id'])
            return False
        if entry['id'] in self._images:
            first = self._images[entry['id']]['file_name']
            self.add(self._path(entry), 'image id given twice', f'{entry["id"]}, as of {first}')
        self._images[entry['id']] = entry
        return True

    # A file may have a million objects: each is touched once, and an ordinary one makes no text.

    def _check_annotation(self, entry: Any, ids: set) -> bool:
        """Check an object's entry; return whether mmdet can load it."""
        problem = bad_ids(entry)
        image = None if problem else self._images.get(entry['image_id'])
        if image is not None:
            problem = self._bad_values(entry, image)
        if problem:
            file = self._file if image is None else self._path(image)
            self.add(file, problem[0], f'annotation {id_of(entry)}: {problem[1]}')
            return False
        if image is None and entry['image_id'] in self._unusable:
            return False
        if entry['id'] in ids:
            self._add_object(entry, image, 'annotation id given twice')
            return False
        ids.add(entry['id'])
        if image is None:
            self._leave_out(entry, image, 'annotation of no image', self._no_image(entry))
            return True
        name = self._names.get(entry['category_id'])
        if name in self.census.used:
            self._with_class.add(entry['image_id'])
        kind, detail = self._left_out(entry, image)
        if kind:
            self._leave_out(entry, image, kind, detail)
            return True
        self._objects[entry['image_id']] += 1
        if entry.get('iscrowd'):
            self._leave_out(entry, image, 'crowd region')
        elif self._is_small(image):
            self.census.left_out['image below min_size'] += 1
        else:
            self.census.used[name] += 1
        if is_outside(entry['bbox'], image):
            self._add_object(entry, image, 'box partly outside')
        if isinstance(entry.get('segmentation'), dict):
            self._add_object(entry, image, 'RLE mask')
        return True

    def _add_object(self, entry: dict, image: dict | None, kind: str, detail: str = '') -> None:
        file = self._file if image is None else self._path(image)
        self.add(file, kind, f'annotation {entry["id"]}' + f': {detail}' * bool(detail))

    def _leave_out(self, entry: dict, image: dict | None, kind: str, detail: str = '') -> None:
        self.census.left_out[kind] += 1
        self._add_object(entry, image, kind, detail)

    def _no_image(self, entry: dict) -> str:
        number = entry['image_id']
        text = f'image {number}'
        if self._images and isinstance(number, str) != isinstance(next(iter(self._images)), str):
            text += ', whose id is text in one place and a number in the other'
        return text

    def _bad_values(self, entry: dict, image: dict) -> tuple[str, str] | None:
        """Return what is wrong with an object's values; add what can be worked out."""
        use, ignore = self._use, entry.get('ignore')
        for key in ('iscrowd', 'ignore'):
            if entry.get(key) not in (None, 0, 1):
                return 'invalid entry', f'{key} is {shown(entry[key])}, not 0 or 1'
        if ignore and not use.scored:
            return None
        if 'bbox' not in entry:
            return 'incomplete entry', 'it has no bbox'
        if not is_box(entry['bbox']):
            return 'invalid entry', f'bbox is {shown(entry["bbox"])}, not 4 numbers in pixels'
        scored = use.scored_masks and self._names.get(entry['category_id']) in self.census.used
        if scored or (use.masks and entry.get('segmentation')):
            problem = bad_mask(entry, image, scored)
            if problem:
                return problem
        added = complete(entry, image, use.scored)
        if added:
            self._added.update(added)
        return None

    def _left_out(self, entry: dict, image: dict) -> tuple[str, str]:
        """Return kind and detail of an object that mmdet skips, in the order of mmdet's checks."""
        if entry.get('ignore'):
            return 'object marked ignore', ''
        x, y, width, height = entry['bbox']
        if width < 1 or height < 1 or entry['area'] <= 0:
            return 'box of zero area', f'{width}x{height}, area {entry["area"]}'
        if is_outside(entry['bbox'], image):  # in part, or all of it
            inside_x = min(x + width, image['width']) - max(x, 0)
            inside_y = min(y + height, image['height']) - max(y, 0)
            if inside_x <= 0 or inside_y <= 0:
                size = f'{image["width"]}x{image["height"]}'
                return 'box outside the image', f'{entry["bbox"]} in {size}'
        category = self._names.get(entry['category_id'])
        if category not in self.census.used:
            return 'unknown category', f'{entry["category_id"]}, {category or "not in the file"}'
        mask: Any = entry.get('segmentation') if self._use.masks else None
        if isinstance(mask, list) and mask and not any(map(is_polygon, mask)):
            return 'mask without polygon', f'{len(mask)} of fewer than 3 points'
        if isinstance(mask, dict) and not self._use.decoded:
            return 'RLE mask, not decoded', 'the config has poly2mask=False'
        return '', ''

    def _absent_classes(self) -> None:
        if self._use.labelled and self.census.used.total():
            absent = absent_classes(self.census)
            if absent:
                self.add(self._file, 'class without objects', ', '.join(absent))

    def check_scored(self) -> None:
        """Add a finding where nothing can be scored."""
        if self._use.labelled and not self._with_class:
            self.add(self._file, 'no object to score')

    def images_left(self) -> int:
        """Return how many images mmdet's filter leaves."""
        return sum(
            not self._is_small(image) and (self._use.with_empty or image_id in self._with_class)
            for image_id, image in self._images.items()
        )

    def _is_small(self, image: dict) -> bool:
        return min(image['width'], image['height']) < self._use.min_size

    def images_without_objects(self, dataset: Any) -> list[Finding]:
        """Return the images without objects in a loaded data set."""
        if not self._use.labelled:
            return []
        used = {dataset.get_data_info(index)['img_id'] for index in range(len(dataset))}
        found = []
        for image_id, image in self._images.items():
            kind = ''
            if image_id in used:
                kind = '' if self._objects[image_id] else 'image without objects, kept'
            elif self._is_small(image):
                kind = 'image below min_size'
            elif not self._objects[image_id]:
                kind = 'image without objects'
            if kind:
                found.append(Finding(self._path(image), kind))
        return found


def absent_classes(census: Census) -> list[str]:
    """Return the classes of which no object is learnt."""
    return [name for name, count in census.used.items() if not count]


def _structure(content: Any, labelled: bool) -> str:
    """Return what the file as a whole lacks; '' where it lacks nothing."""
    if not isinstance(content, dict):
        return f'it holds {shown(content)}, not images, annotations and categories'
    for key in ('images', 'categories', 'annotations'):
        if key == 'annotations' and not labelled and key not in content:
            continue
        if key not in content:
            hint = '; a test without them has format_only=True in its evaluator'
            return f'it has no {key}' + hint * (key == 'annotations')
        if not isinstance(content[key], list):
            return f'{key} is {shown(content[key])}, not a list'
    return ''
