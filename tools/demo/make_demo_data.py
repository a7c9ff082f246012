"""Make the demo's data set: stickers of handwritten digits stuck on photographs.

The digits are scikit-learn's 8x8 scans and the backgrounds are crops of its two sample photographs,
so nothing is downloaded. The same pictures are written twice, as COCO and ADE20K lay them out:

    OUT/coco/annotations/instances_{train,val}2017.json, OUT/coco/{train,val}2017/*.jpg
    OUT/ade/{images,annotations}/{training,validation}/*.{jpg,png}

Training and validation share no digit sample and no part of a photograph. Every picture depends
only on the seed, the split and its number. In the label maps 0 means ignored, 1 background and 2
and up the digits, which is ADE20K's convention (`reduce_zero_label=True`).

Example:
    python tools/demo/make_demo_data.py --out data/digits --train 500
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils
from sklearn.datasets import load_digits, load_sample_images

CLASSES = ('zero', 'one', 'two', 'three', 'four')
INK_HUES = (0, 62, 112, 22, 150)  # OpenCV's hues: each class has its own family of colours
SPLITS = ('train', 'val')
COCO_FOLDER = {'train': 'train2017', 'val': 'val2017'}
ADE_FOLDER = {'train': 'training', 'val': 'validation'}
STAMP = 'demo_data.json'
VERSION = 1  # raise when the pictures change, so that data written before are replaced

OVERSAMPLING = 3  # pictures are drawn this much larger and averaged down
IMAGE_SIDE = (120, 200)
DIGIT_SIDE = (60, 92)  # of the sticker's 8x8 scan, in pixels of the finished picture
OBJECTS = (2, 4)
TRIES = 12  # for the place of one object
MIN_VISIBLE = 0.9  # an object of which less can be seen is not kept
FRAGMENT = 16  # square pixels: smaller fragments of an object are ignored, not annotated
TRAIN_COLUMNS = 440  # of a photograph's 640; validation sees the columns from VAL_COLUMNS on
VAL_COLUMNS = 444
#: Of each class's scans; the rest, by other writers for the most part, is for validation.
TRAIN_SHARE = 0.75

Size = tuple[int, int]  # (height, width)


@dataclass
class Source:
    """What one split may draw from: scans by class, and photographs with the columns it may see."""

    digits: np.ndarray
    samples: list[np.ndarray]
    photos: dict[str, np.ndarray]
    columns: tuple[int, int]


@dataclass
class Sticker:
    """One object of a picture, before what hides it is known."""

    category: int
    sample: int
    ink: np.ndarray
    paper: np.ndarray
    colours: np.ndarray


def load_sources() -> dict[str, Source]:
    """Return the two splits' sources, which share nothing."""
    digits = load_digits()
    photos = load_sample_images()
    names = [Path(name).name for name in photos.filenames]
    bgr = [np.ascontiguousarray(photo[:, :, ::-1]) for photo in photos.images]
    pictures = dict(zip(names, bgr, strict=True))
    width = min(picture.shape[1] for picture in pictures.values())
    train, val = [], []
    for category in range(len(CLASSES)):
        of_class = np.flatnonzero(digits.target == category)
        cut = int(len(of_class) * TRAIN_SHARE)
        train.append(of_class[:cut])
        val.append(of_class[cut:])
    scans = digits.images.astype(np.float32) / 16
    return {
        'train': Source(scans, train, pictures, (0, TRAIN_COLUMNS)),
        'val': Source(scans, val, pictures, (VAL_COLUMNS, width)),
    }


def draw_background(
    source: Source, size: Size, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return a crop of a photograph as a canvas of this size, and its origin."""
    name = sorted(source.photos)[rng.integers(len(source.photos))]
    photo = source.photos[name]
    left, right = source.columns
    height, width = size
    # In the picture's shape, from half as large as the columns allow.
    limit = min((right - left) / width, photo.shape[0] / height)
    scale = rng.uniform(0.5, 1.0) * limit
    crop_h, crop_w = max(1, int(height * scale)), max(1, int(width * scale))
    x = int(rng.integers(left, right - crop_w + 1))
    y = int(rng.integers(0, photo.shape[0] - crop_h + 1))
    crop = photo[y : y + crop_h, x : x + crop_w].astype(np.float32)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    # Dimmed, so that the light paper stands out against the sky too.
    crop *= rng.uniform(0.4, 0.75)
    canvas = cv2.resize(
        crop, (width * OVERSAMPLING, height * OVERSAMPLING), interpolation=cv2.INTER_CUBIC
    )
    return canvas, {'photo': name, 'crop': [x, y, crop_w, crop_h]}


def draw_colours(category: int, rng: np.random.Generator) -> np.ndarray:
    """Return the colours (BGR) of a sticker's ink, of its class's family, and light paper."""
    ink = (
        (INK_HUES[category] + rng.integers(-7, 8)) % 180,
        rng.integers(150, 256),
        rng.integers(90, 200),
    )
    paper = (rng.integers(180), rng.integers(0, 60), rng.integers(205, 256))
    hsv = np.array([[ink, paper]], dtype=np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0].astype(np.float32)


def draw_sticker(source: Source, size: Size, rng: np.random.Generator) -> Sticker:
    """Draw a scan, enlarged, turned and sheared, on a canvas of this size."""
    category = int(rng.integers(len(CLASSES)))
    sample = int(rng.choice(source.samples[category]))
    # Uniform in the logarithm, so that each octave of scale is met equally often.
    side = np.exp(rng.uniform(*np.log(DIGIT_SIDE)))
    pixel = side / 8 * OVERSAMPLING
    angle = np.deg2rad(rng.uniform(-20, 20))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[rng.uniform(0.85, 1.15), rng.uniform(-0.2, 0.2)], [0, 1]])
    linear = pixel * turn @ shear
    margin = 0.4 * side * OVERSAMPLING
    centre = np.array([rng.uniform(margin, extent - margin) for extent in (size[1], size[0])])
    shift = centre - linear @ np.array([3.5, 3.5])
    warp = np.column_stack([linear, shift])
    scan = source.digits[sample]
    smooth = cv2.warpAffine(scan, warp, (size[1], size[0]), flags=cv2.INTER_CUBIC)
    ink = smooth > 0.45
    # The paper is cut around the ink at a fixed distance and has no holes.
    distance = cv2.distanceTransform((~ink).astype(np.uint8), cv2.DIST_L2, 5)
    outline, _ = cv2.findContours(
        (distance < 0.8 * pixel).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    paper = np.zeros(size, dtype=np.uint8)
    cv2.drawContours(paper, outline, -1, 1, thickness=cv2.FILLED)
    return Sticker(category, sample, ink, paper.astype(bool), draw_colours(category, rng))


def find_fragments(mask: np.ndarray) -> tuple[list[np.ndarray], list[float], float]:
    """Return the outlines and areas of a canvas mask's fragments, and the area of its largest hole.

    Areas are in square pixels of the finished picture.
    """
    contours, hierarchy = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    outlines: list[np.ndarray] = []
    areas: list[float] = []
    hole = 0.0
    nested = hierarchy[0] if len(contours) else []
    for contour, (_, _, _, parent) in zip(contours, nested, strict=True):
        area = cv2.contourArea(contour) / OVERSAMPLING**2
        if parent < 0:
            outlines.append(contour)
            areas.append(area)
        else:
            hole = max(hole, area)
    return outlines, areas, hole


def fits(stickers: Sequence[Sticker], visible: Sequence[np.ndarray]) -> bool:
    """Tell whether enough of every sticker can be seen, in shapes that polygons can describe."""
    for sticker, mask in zip(stickers, visible, strict=True):
        if mask.sum() < MIN_VISIBLE * sticker.paper.sum():
            return False
        _, areas, hole = find_fragments(mask)
        if hole >= FRAGMENT or max(areas) < FRAGMENT:
            return False
    return True


def place_stickers(
    source: Source, size: Size, rng: np.random.Generator
) -> tuple[list[Sticker], list[np.ndarray]]:
    """Put stickers one over another; drop those that would hide too much.

    Returns:
        The stickers, lowest first, and the mask of what can be seen of each.
    """
    stickers: list[Sticker] = []
    visible: list[np.ndarray] = []
    for _ in range(rng.integers(OBJECTS[0], OBJECTS[1] + 1)):
        for _ in range(TRIES):
            new = draw_sticker(source, size, rng)
            seen = [mask & ~new.paper for mask in visible] + [new.paper]
            if fits([*stickers, new], seen):
                stickers.append(new)
                visible = seen
                break
    return stickers, visible


def paint(canvas: np.ndarray, stickers: Sequence[Sticker], rng: np.random.Generator) -> np.ndarray:
    """Paint the stickers with soft shadows and return the finished picture, with noise."""
    for sticker in stickers:
        offset = OVERSAMPLING * rng.uniform(0.5, 2.5, size=2)
        move = np.array([[1, 0, offset[0]], [0, 1, offset[1]]], dtype=np.float32)
        shadow = cv2.warpAffine(sticker.paper.astype(np.float32), move, canvas.shape[1::-1])
        shadow = cv2.GaussianBlur(shadow, (0, 0), OVERSAMPLING * 1.5)
        canvas *= 1 - 0.45 * shadow[:, :, None]
        ink, paper = sticker.colours
        canvas[sticker.paper] = paper
        canvas[sticker.ink & sticker.paper] = ink
    height, width = canvas.shape[0] // OVERSAMPLING, canvas.shape[1] // OVERSAMPLING
    picture: np.ndarray = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.3, 0.8))
    # Light falls off across the picture, so that a sticker's colour is not constant.
    across: np.ndarray = np.linspace(-1, 1, width) * rng.uniform(-0.2, 0.2)
    down: np.ndarray = np.linspace(-1, 1, height) * rng.uniform(-0.2, 0.2)
    slope = across[None, :] + down[:, None]
    picture *= 1 + slope[:, :, None].astype(np.float32)
    picture += rng.normal(0, rng.uniform(2, 6), picture.shape).astype(np.float32)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Return a mask's polygons in the picture's coordinates, without small fragments."""
    polygons = []
    outlines, areas, _ = find_fragments(mask)
    for outline, area in zip(outlines, areas, strict=True):
        if area >= FRAGMENT:
            corners = cv2.approxPolyDP(outline, 0.75, True)[:, 0, :]
            polygons.append(np.round((corners + 0.5) / OVERSAMPLING, 2).ravel().tolist())
    return polygons


def to_annotation(
    polygons: list[list[float]], height: int, width: int
) -> tuple[dict[str, Any], np.ndarray]:
    """Return the COCO fields of one object and its mask, both read off the polygons."""
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])
    (x0, y0), (x1, y1) = points.min(0), points.max(0)
    rle = mask_utils.merge(mask_utils.frPyObjects(polygons, height, width))
    fields = {
        'segmentation': polygons,
        'area': float(mask_utils.area(rle)),
        'bbox': [round(float(value), 2) for value in (x0, y0, x1 - x0, y1 - y0)],
        'iscrowd': 0,
    }
    return fields, mask_utils.decode(rle).astype(bool)


def make_picture(
    source: Source, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]], dict[str, Any]]:
    """Make a picture (BGR), its label map, its objects in COCO's terms, its background's origin."""
    height, width = (int(side) for side in rng.integers(IMAGE_SIDE[0], IMAGE_SIDE[1] + 1, size=2))
    canvas, origin = draw_background(source, (height, width), rng)
    stickers, visible = place_stickers(source, canvas.shape[:2], rng)
    # What an object shows outside its polygons, a seam or a fragment, stays 0 and is ignored.
    middle = slice(OVERSAMPLING // 2, None, OVERSAMPLING)
    labels = np.where(np.any(visible, axis=0)[middle, middle], 0, 1).astype(np.uint8)
    objects = []
    for sticker, mask in zip(stickers, visible, strict=True):
        fields, shape = to_annotation(to_polygons(mask), height, width)
        labels[shape] = sticker.category + 2
        objects.append(
            {'category_id': sticker.category + 1, 'digit_sample': sticker.sample, **fields}
        )
    return paint(canvas, stickers, rng), labels, objects, origin


def write_split(out: Path, split: str, count: int, seed: int, source: Source) -> int:
    """Write one split in both layouts and return how many objects it has."""
    coco_images = out / 'coco' / COCO_FOLDER[split]
    ade_images = out / 'ade' / 'images' / ADE_FOLDER[split]
    ade_labels = out / 'ade' / 'annotations' / ADE_FOLDER[split]
    annotations = out / 'coco' / 'annotations'
    for folder in (coco_images, ade_images, ade_labels, annotations):
        folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for index in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        picture, labels, found, origin = make_picture(source, rng)
        image_id = index + 1
        name = f'{image_id:012d}.jpg'
        write_image(coco_images / name, picture)
        ade_name = f'ADE_{split}_{image_id:08d}'
        shutil.copyfile(coco_images / name, ade_images / f'{ade_name}.jpg')
        write_image(ade_labels / f'{ade_name}.png', labels)
        height, width = labels.shape
        images.append(
            {
                'id': image_id,
                'file_name': name,
                'height': height,
                'width': width,
                'background': origin,
            }
        )
        objects += [
            {'id': len(objects) + 1 + i, 'image_id': image_id, **fields}
            for i, fields in enumerate(found)
        ]
    content = {
        'info': {
            'description': 'Handwritten digits as stickers on photographs',
            'version': str(VERSION),
        },
        'licenses': [],
        'images': images,
        'annotations': objects,
        'categories': [
            {'id': i + 1, 'name': name, 'supercategory': 'digit'} for i, name in enumerate(CLASSES)
        ],
    }
    with open(annotations / f'instances_{COCO_FOLDER[split]}.json', 'w') as file:
        json.dump(content, file)
    return len(objects)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an image; OpenCV reports a full disc or a missing folder only by its return value."""
    if not cv2.imwrite(str(path), image):
        raise OSError(f'could not write {path}')


def read_stamp(out: Path) -> dict[str, Any] | None:
    """Return what an earlier run noted about its folder, or None where there was none."""
    path = out / STAMP
    return json.loads(path.read_text()) if path.is_file() else None


def make_demo_data(out: Path, seed: int = 0, train: int = 240, val: int = 60) -> bool:
    """Write the data set, unless a run with the same arguments has finished; tell which.

    Raises:
        FileExistsError: Where the folder holds other files.
    """
    wanted = {'version': VERSION, 'seed': seed, 'train': train, 'val': val}
    stamp = read_stamp(out)
    if stamp == {**wanted, 'complete': True}:
        print(f'{out}: already there ({train} training and {val} validation images, seed {seed})')
        return False
    if stamp is None and out.is_dir() and any(out.iterdir()):
        raise FileExistsError(
            f'{out} holds files that this tool did not make; choose another folder with --out'
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / STAMP).write_text(json.dumps({**wanted, 'complete': False}))
    for layout in ('coco', 'ade'):
        shutil.rmtree(out / layout, ignore_errors=True)
    sources = load_sources()
    for split, count in zip(SPLITS, (train, val), strict=True):
        objects = write_split(out, split, count, seed, sources[split])
        print(f'{out}: {count} {COCO_FOLDER[split]} images with {objects} objects', flush=True)
    (out / STAMP).write_text(json.dumps({**wanted, 'complete': True}))
    return True


def positive(text: str) -> int:
    """Read an integer from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'{text} is not 1 or more')
    return number


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('data/demo'),
        help='folder to write (default: %(default)s)',
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='seed of the pictures (default: %(default)s)'
    )
    parser.add_argument(
        '--train', type=positive, default=240, help='training images (default: %(default)s)'
    )
    parser.add_argument(
        '--val', type=positive, default=60, help='validation images (default: %(default)s)'
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the data set and return the exit code."""
    args = parse_args(argv)
    try:
        make_demo_data(args.out, args.seed, args.train, args.val)
    except OSError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
