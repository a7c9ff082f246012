"""A data set in COCO's format and detections of it, made up by a seed."""

import numpy as np

SIZE = (640, 480)
OBJECTS = 8  # at most; COCO has seven an image


def random_boxes(number, random):
    """Draw boxes of all sizes as left, top, width and height."""
    size = np.exp(random.uniform(np.log(8), np.log(300), (number, 2)))
    corner = random.uniform(0, 1, (number, 2)) * np.maximum(np.array(SIZE) - size, 1)
    return np.concatenate([corner, size], 1).round(1)


def made_up(images, detections, classes=80, seed=0):
    """Draw a data set, and detections as mmdet writes them: around boxes and at random."""
    random = np.random.default_rng(seed)
    annotations, results = [], []
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
