"""The values of COCO's entries: what is wrong with them, and what can be worked out."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

#: A coordinate beyond this is none; pycocotools' memory for a polygon grows with it.
FARTHEST = 10**6
#: From here on, a float, as pycocotools keeps ids, cannot tell whole numbers apart.
LARGEST_ID = 2**53
_NUMBERS = {int, float}
# COCO's text of a run-length mask; after any other, pycocotools reads beyond its end.
_RUNS = re.compile(r'[0-o]*[0-O]')
_MOST_GROUPS = 7  # of 5 bits, in a number of 32


def shown(value: Any) -> str:
    """Return a value of a file for a message, shortened."""
    return 'null' if value is None else reprlib.repr(value)


def lacking(entry: Any, keys: Sequence[str]) -> tuple[str, str] | None:
    """Return which keys an entry lacks, as kind and detail of a finding, or None."""
    if type(entry) is not dict:
        return 'invalid entry', f'it is {shown(entry)}, not an object with keys'
    absent = [key for key in keys if key not in entry]
    return ('incomplete entry', f'it has no {", ".join(absent)}') if absent else None


def bad_id(entry: dict, key: str, others: dict | None = None) -> tuple[str, str] | None:
    """Return what is wrong with an id, as kind and detail of a finding, or None.

    Args:
        entry: What has the id.
        key: Its key.
        others: By their ids, entries of the same list: pycocotools sorts ids.
    """
    value: Any = entry.get(key)
    if type(value) in _NUMBERS:
        valid = -LARGEST_ID < value < LARGEST_ID  # false for NaN
    else:
        valid = type(value) is str and is_text(value)
    if not valid:
        return 'invalid entry', f'{key} is {shown(value)}, neither a number nor text'
    first = next(iter(others)) if others else value
    if isinstance(first, str) != isinstance(value, str):
        return 'invalid entry', f'{key} is {shown(value)}, the first {shown(first)}: one is text'
    return None


def bad_ids(entry: Any) -> tuple[str, str] | None:
    """Return what is wrong with the ids of an object, as kind and detail, or None."""
    try:
        number, image, category = entry['id'], entry['image_id'], entry['category_id']
        if type(number) is type(image) is type(category) is int and abs(number) < LARGEST_ID:
            return None
    except (KeyError, TypeError, IndexError):
        pass
    keys = ('id', 'image_id', 'category_id')
    problems = [lacking(entry, keys)]
    if problems == [None]:
        problems = [bad_id(entry, key) for key in keys]
    return next(filter(None, problems), None)


def id_of(entry: Any) -> str:
    """Return an entry's id for a message; '' where it has none."""
    return shown(entry['id']) if isinstance(entry, dict) and 'id' in entry else ''


def bad_image(entry: dict) -> tuple[str, str] | None:
    """Return what is wrong with an image's entry, as kind and detail of a finding, or None."""
    if not is_file_name(entry['file_name']):
        return 'invalid entry', f'file_name is {shown(entry["file_name"])}, no name of a file'
    for key in ('width', 'height'):
        value = entry[key]
        if type(value) is float and value.is_integer():
            value = entry[key] = int(value)  # pycocotools takes no 48.0
        if type(value) is not int or not 0 < value <= FARTHEST:
            return 'invalid entry', f'{key} is {shown(value)}, no number of pixels'
    return None


def is_file_name(value: Any) -> bool:
    """Tell whether a value can be the name of a file."""
    return type(value) is str and value != '' and '\0' not in value and is_text(value)


def is_text(value: str) -> bool:
    """Tell whether a text can be printed: JSON may hold halves of characters."""
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def is_box(value: Any) -> bool:
    """Tell whether a value is a box."""
    if type(value) is not list or len(value) != 4:
        return False
    x, y, width, height = value
    return (
        type(x) in _NUMBERS
        and type(y) in _NUMBERS
        and type(width) in _NUMBERS
        and type(height) in _NUMBERS
        and -FARTHEST <= x <= FARTHEST  # false for NaN
        and -FARTHEST <= y <= FARTHEST
        and -FARTHEST <= width <= FARTHEST
        and -FARTHEST <= height <= FARTHEST
    )


def is_outside(box: list, image: dict) -> bool:
    """Tell whether a part of a box is outside its image."""
    x, y, width, height = box
    return x < 0 or y < 0 or x + width > image['width'] or y + height > image['height']


def _are_coordinates(values: list) -> bool:
    """Tell whether all values are finite numbers that may be coordinates."""
    if not set(map(type, values)) <= _NUMBERS:
        return False
    if values and not (min(values) >= -FARTHEST and max(values) <= FARTHEST):
        return False
    return not math.isnan(sum(values))  # which min and max may pass over


def is_polygon(part: list) -> bool:
    """Tell whether mmdet takes a part of a mask."""
    return len(part) >= 6 and len(part) % 2 == 0


def bad_mask(entry: dict, image: dict, scored: bool) -> tuple[str, str] | None:
    """Return what is wrong with a mask; where it is scored, remove its parts without area."""
    mask = entry.get('segmentation')
    problem = ''
    if mask is None:
        return 'incomplete entry', 'it has no segmentation, which scores of masks need'
    if isinstance(mask, dict):
        problem = _bad_runs(mask, image, scored)
    elif not isinstance(mask, list) or not all(
        type(part) is list and _are_coordinates(part) for part in mask
    ):
        problem = f'is {shown(mask)}, neither a list of polygons nor a run-length mask'
    elif scored:
        entry['segmentation'] = [part for part in mask if is_polygon(part)]
        problem = '' if entry['segmentation'] else 'has no polygon of 3 points'
    return ('invalid entry', f'segmentation {problem}') if problem else None


def _bad_runs(mask: dict, image: dict, scored: bool) -> str:
    """Return what is wrong with a run-length mask: pycocotools reads memory by its numbers."""
    size, counts = mask.get('size'), mask.get('counts')
    if not (type(size) is list and len(size) == 2 and all(type(side) is int for side in size)):
        return f'has the size {shown(size)}, not height and width'
    own = [image['height'], image['width']]
    if scored and size != own:
        return f'is of {size[1]}x{size[0]}, its image of {own[1]}x{own[0]}'
    if type(counts) is list and all(type(count) is int and count >= 0 for count in counts):
        total = sum(counts)
    elif type(counts) is str and _RUNS.fullmatch(counts):
        total = run_total(counts)
    else:
        return f'has the counts {shown(counts)}, no run lengths'
    fills = total == size[0] * size[1]
    return '' if fills else f'has the counts {shown(counts)}, which do not fill {size}'


def run_total(counts: str) -> int:
    """Return how many pixels a run-length mask in COCO's text has; -1 where it is none.

    Each run is its difference to the run before the last, in groups of 5 bits, the lowest first.
    """
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - ord('0')
    ends = np.flatnonzero(codes < 32)  # bit 5 says that the run goes on
    starts = np.concatenate([[0], ends[:-1] + 1])
    groups = ends - starts + 1
    if groups.max() > _MOST_GROUPS:
        return -1
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, groups))
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= ((codes[ends] & 16) != 0) * (1 << 5 * groups)  # bit 4 of the last is the sign
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    return -1 if (runs < 0).any() else int(runs.sum())


def complete(entry: dict, image: dict, scored: bool) -> tuple[str, ...]:
    """Add to an object what its readers need and can be worked out; return the kinds."""
    area: Any = entry.get('area')
    added: tuple[str, ...] = ()
    if type(area) not in _NUMBERS or not 0 < area < math.inf:
        entry['area'] = _area(entry, image)
        added = ('area worked out',)
    if scored and entry.get('iscrowd') is None:
        entry['iscrowd'] = 0
        added = (*added, 'no iscrowd')
    if scored and not is_scored_id(entry['id']):
        added = (*added, 'annotation id below 1')
    return added


def is_scored_id(number: Any) -> bool:
    """Tell whether pycocotools takes an annotation's id for a match: it takes 0 for none."""
    return type(number) in _NUMBERS and number >= 1


def _area(entry: dict, image: dict) -> float:
    """Return the area of an object's mask, or else of its box."""
    if entry.get('segmentation') and bad_mask(entry, image, scored=True) is None:
        from pycocotools import mask as mask_api

        mask = entry['segmentation']
        if isinstance(mask, list) or isinstance(mask['counts'], list):
            mask = mask_api.frPyObjects(mask, image['height'], image['width'])
        area = mask_api.area(mask_api.merge(mask) if isinstance(mask, list) else mask)
        if area > 0:
            return float(area)
    width, height = entry['bbox'][2:]
    return max(width, 0) * max(height, 0)
