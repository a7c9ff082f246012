"""Time pycocotools and faster-coco-eval on made-up detections, and compare their figures.

Every image has a few boxes of COCO's 80 classes, and detections around boxes and at random. Both
get the same detections and count what mmdet asks for.

Example:
    python tools/benchmark/benchmark_coco_eval.py --images 5000 --detections 100
"""

import argparse
import contextlib
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mmdet.datasets.api_wrappers import COCO, COCOeval

from pvt_mm import cli
from pvt_mm.errors import UserError
from pvt_mm.evaluation.fast_coco import FastCOCOeval

CLASSES = 80
SIZE = (640, 480)
OBJECTS = 8  # at most; COCO has seven an image
MAX_DETECTIONS = (100, 300, 1000)  # as mmdet's metric


def random_boxes(number: int, random: np.random.Generator) -> np.ndarray:
    """Draw boxes of all sizes as left, top, width and height."""
    size = np.exp(random.uniform(np.log(8), np.log(300), (number, 2)))
    corner = random.uniform(0, 1, (number, 2)) * np.maximum(np.array(SIZE) - size, 1)
    return np.concatenate([corner, size], 1).round(1)


def made_up(
    images: int, detections: int, classes: int = CLASSES, seed: int = 0
) -> tuple[dict, list[dict]]:
    """Draw a data set in COCO's format, and detections of it as mmdet writes them."""
    random = np.random.default_rng(seed)
    annotations: list[dict] = []
    results: list[dict] = []
    for image in range(1, images + 1):
        objects = random_boxes(random.integers(1, OBJECTS), random)
        labels = random.integers(1, classes + 1, len(objects))
        for box, label in zip(objects, labels):
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image,
                    category_id=int(label),
                    bbox=box.tolist(),
                    area=float(box[2] * box[3]),
                    iscrowd=int(random.random() < 0.02),
                )
            )
        # Half of the detections are objects moved by some pixels, half are anywhere.
        near = random.integers(0, len(objects), detections // 2)
        sides = objects[near][:, [2, 3, 2, 3]]
        moved = objects[near] + random.normal(0, 0.08, (len(near), 4)) * sides
        boxes = np.concatenate([moved, random_boxes(detections - len(near), random)])
        guesses = random.integers(1, classes + 1, detections - len(near))
        scores = np.concatenate([random.beta(3, 2, len(near)), random.beta(1, 4, len(guesses))])
        for box, label, score in zip(boxes, np.concatenate([labels[near], guesses]), scores):
            results.append(
                dict(
                    image_id=image,
                    category_id=int(label),
                    bbox=box.tolist(),
                    score=float(score),
                )
            )
    dataset = dict(
        images=[dict(id=i, width=SIZE[0], height=SIZE[1]) for i in range(1, images + 1)],
        annotations=annotations,
        categories=[dict(id=i, name=str(i)) for i in range(1, classes + 1)],
    )
    return dataset, results


def evaluate(
    make: Callable[..., Any], dataset: dict, results: list[dict]
) -> tuple[float, np.ndarray]:
    """Return the seconds that an evaluation takes, and its twelve figures."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        found = truth.loadRes([dict(result) for result in results])
        start = time.perf_counter()
        evaluation = make(truth, found, 'bbox')
        evaluation.params.maxDets = list(MAX_DETECTIONS)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return time.perf_counter() - start, np.array(evaluation.stats)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--images', type=int, default=500, help='images (default: %(default)s)')
    parser.add_argument(
        '--detections', type=int, default=100, help='detections an image (default: %(default)s)'
    )
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    if args.images < 1 or args.detections < 1:
        raise UserError('--images and --detections must be 1 or more.')
    dataset, results = made_up(args.images, args.detections)
    print(f'{args.images} images, {args.detections} detections each, {CLASSES} classes')
    figures = {}
    for name, make in (('pycocotools', COCOeval), ('faster-coco-eval', FastCOCOeval)):
        seconds, figures[name] = evaluate(make, dataset, results)
        print(f'{name:<17} {seconds:7.1f} s  AP {figures[name][0]:.6f}', flush=True)
    slow, fast = figures.values()
    print(f'largest difference of the 12 figures: {np.abs(slow - fast).max():.1e}')


if __name__ == '__main__':
    main()
