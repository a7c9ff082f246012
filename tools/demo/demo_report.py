"""Pictures and the page of the demo: curves, predictions beside ground truth, stage features."""

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import matplotlib
import numpy as np
from matplotlib.patches import Rectangle
from pycocotools import mask as mask_utils

from pvt_mm.apis.inference import Predictor, read_pixels
from pvt_mm.tables import text_table
from pvt_mm.visualization.logs import INK, STYLE, Curve, plot_curve
from pvt_mm.visualization.pictures import principal_colours

matplotlib.use('Agg')
from matplotlib import pyplot as plt

TARGET = '#d64545'

#: A part of the page: its title, its text, and pictures (PNG files) with their headings.
Section = tuple[str, str, list[tuple[str, Path]]]


@dataclass
class Outcome:
    """What came of one task of the demo."""

    task: str
    title: str
    model: str
    metric: str
    target: float
    score: float
    train_seconds: float
    test_seconds: float

    @property
    def reached(self) -> bool:
        """Whether the score is no lower than its target."""
        return not math.isnan(self.score) and self.score >= self.target


@dataclass
class Thing:
    """An object in a picture: found or annotated."""

    label: int
    box: tuple[float, ...]
    mask: np.ndarray | None = None
    score: float | None = None


class DrawGroup(Protocol):
    """Fill the axes of one group of :func:`plot_grid`."""

    def __call__(self, index: int, axes: np.ndarray, heading: bool) -> None: ...


def verdict(outcome: Outcome, quick: bool) -> str:
    """Return what the table says about a score."""
    if quick:
        return 'quick run, not compared'
    return 'reached' if outcome.reached else 'MISSED'


def format_table(outcomes: Sequence[Outcome], quick: bool) -> str:
    """Return the scores against the targets as lines of text."""
    head = ('task', 'model', 'metric', 'score', 'target', 'training', 'test', '')
    rows = []
    for outcome in outcomes:
        rows.append(
            (
                outcome.title,
                outcome.model,
                outcome.metric,
                format_score(outcome.score),
                f'{outcome.target:.2f}',
                format_seconds(outcome.train_seconds),
                format_seconds(outcome.test_seconds),
                verdict(outcome, quick),
            )
        )
    first, *lines = text_table(head, rows).splitlines()
    return '\n'.join([first, '-' * max(map(len, lines)), *lines])


def format_score(score: float) -> str:
    """Return a score with three digits, or a dash for none."""
    return '-' if math.isnan(score) else f'{score:.3f}'


def format_seconds(seconds: float) -> str:
    """Return a duration as m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f'{minutes}:{rest:02d}'


def plot_curves(out: Path, losses: Curve, scores: Curve, outcome: Outcome) -> None:
    """Draw loss and score over the training iterations, with the target and the final test."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.1), layout='constrained')
        plot_curve(left, losses)
        left.set(title='Training loss', xlabel='iteration', ylim=(0, None))
        plot_curve(right, scores, marked=True)
        right.axhline(outcome.target, color=TARGET, linewidth=1.2, linestyle='--')
        right.annotate(
            f'target {outcome.target:g}',
            (0.01, outcome.target),
            xycoords=('axes fraction', 'data'),
            xytext=(0, 3),
            textcoords='offset points',
            color=TARGET,
        )
        if not math.isnan(outcome.score):
            right.plot(losses[-1][0], outcome.score, '*', color=INK, markersize=11, clip_on=False)
        top = 100 if outcome.target > 1 else 1
        right.set(
            title=f'{outcome.metric} in validation; star: the saved checkpoint',
            xlabel='iteration',
            ylim=(0, top),
            xlim=(0, None),
        )
        figure.savefig(out)
        plt.close(figure)


def read_coco(annotations: Path) -> tuple[list[dict[str, Any]], dict[int, list[Thing]]]:
    """Return the image entries of a COCO file and the things in each, by image id."""
    content = json.loads(annotations.read_text())
    order = {category['id']: i for i, category in enumerate(content['categories'])}
    sizes = {image['id']: (image['height'], image['width']) for image in content['images']}
    things: dict[int, list[Thing]] = {image_id: [] for image_id in sizes}
    for entry in content['annotations']:
        rles = mask_utils.frPyObjects(entry['segmentation'], *sizes[entry['image_id']])
        mask = mask_utils.decode(mask_utils.merge(rles)).astype(bool)
        x, y, width, height = entry['bbox']
        box = (x, y, x + width, y + height)
        things[entry['image_id']].append(Thing(order[entry['category_id']], box, mask))
    return content['images'], things


def found_things(sample: Any, threshold: float, with_masks: bool) -> list[Thing]:
    """Return what a detector found, best first, as far as its score reaches the threshold."""
    found = sample.pred_instances.cpu().numpy()
    things = []
    for i in np.argsort(-found.scores):
        if found.scores[i] >= threshold:
            mask = found.masks[i] if with_masks else None
            things.append(
                Thing(int(found.labels[i]), tuple(found.bboxes[i]), mask, float(found.scores[i]))
            )
    return things


def rgb(colour: Sequence[int]) -> tuple[float, ...]:
    """Return a 0..255 colour as matplotlib wants it."""
    return tuple(channel / 255 for channel in colour)


def show_picture(axes: Any, image: np.ndarray, title: str | None = None) -> None:
    """Show an image without ticks."""
    axes.imshow(image, interpolation='bilinear')
    axes.set_axis_off()
    if title:
        axes.set_title(title, fontsize=10, color=INK)


def show_things(
    axes: Any,
    image: np.ndarray,
    things: Sequence[Thing],
    meta: Mapping[str, Any],
    with_masks: bool,
    title: str | None = None,
) -> None:
    """Show an image with its things: box, class, score and, where asked for, the mask."""
    shown = image.astype(np.float32) / 255
    if with_masks:
        for thing in things:
            tint = np.array(rgb(meta['palette'][thing.label]), dtype=np.float32)
            shown[thing.mask] = 0.45 * shown[thing.mask] + 0.55 * tint
    show_picture(axes, shown, title)
    for thing in things:
        colour = rgb(meta['palette'][thing.label])
        x0, y0, x1, y1 = thing.box
        axes.add_patch(
            Rectangle(
                (x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.6
            )
        )
        name = meta['classes'][thing.label]
        text = name if thing.score is None else f'{name} {thing.score:.2f}'
        axes.text(
            x0 - 0.5,
            y0 - 1.5,
            text,
            fontsize=6.5,
            color='white',
            va='bottom',
            bbox=dict(facecolor=colour, edgecolor='none', pad=1.2),
        )


def plot_grid(out: Path, draw: DrawGroup, count: int, columns: int, blocks: int) -> None:
    """Draw ``count`` groups of ``columns`` pictures, ``blocks`` groups per row, by ``draw``."""
    rows = math.ceil(count / blocks)
    with plt.rc_context({**STYLE, 'axes.grid': False}):
        figure, grid = plt.subplots(
            rows,
            columns * blocks,
            figsize=(2.55 * columns * blocks, 2.6 * rows),
            layout='constrained',
            squeeze=False,
        )
        for axes in grid.flat:
            axes.set_axis_off()
        for index in range(count):
            row, block = divmod(index, blocks)
            draw(index, grid[row, block * columns : (block + 1) * columns], heading=row == 0)
        figure.savefig(out)
        plt.close(figure)


def plot_data(
    out: Path, folder: Path, annotations: Path, meta: Mapping[str, Any], count: int = 8
) -> None:
    """Draw training images with their boxes and masks."""
    images, things = read_coco(annotations)

    def draw(index: int, axes: np.ndarray, heading: bool) -> None:
        entry = images[index]
        image = read_pixels(folder / entry['file_name'])
        show_things(axes[0], image, things[entry['id']], meta, with_masks=True)

    plot_grid(out, draw, min(count, len(images)), columns=1, blocks=4)


def plot_detections(
    out: Path,
    predictor: Predictor,
    folder: Path,
    annotations: Path,
    with_masks: bool,
    count: int = 6,
    threshold: float = 0.4,
) -> None:
    """Draw the objects of validation images, annotated and found."""
    images, things = read_coco(annotations)
    meta = predictor.dataset_meta

    def draw(index: int, axes: np.ndarray, heading: bool) -> None:
        path = folder / images[index]['file_name']
        image, truth = read_pixels(path), things[images[index]['id']]
        found = found_things(predictor(path), threshold, with_masks)
        show_things(axes[0], image, truth, meta, with_masks, 'ground truth' if heading else None)
        show_things(axes[1], image, found, meta, with_masks, 'prediction' if heading else None)

    plot_grid(out, draw, min(count, len(images)), columns=2, blocks=2)


def plot_segments(
    out: Path, predictor: Predictor, images: Path, labels: Path, count: int = 6
) -> None:
    """Draw the label maps of validation images: annotated and found."""
    meta = predictor.dataset_meta
    palette = np.array([*meta['palette'], (0, 0, 0)], dtype=np.uint8)
    paths = sorted(images.glob('*.jpg'))[:count]
    plain = [i for i, name in enumerate(meta['classes']) if name == 'background']

    def overlay(image: np.ndarray, indices: np.ndarray) -> np.ndarray:
        tinted = np.rint(0.35 * image + 0.65 * palette[indices]).astype(np.uint8)
        return np.where(np.isin(indices, plain)[:, :, None], image, tinted)

    def draw(index: int, axes: np.ndarray, heading: bool) -> None:
        image = read_pixels(paths[index])
        grey = cv2.imread(str(labels / f'{paths[index].stem}.png'), cv2.IMREAD_GRAYSCALE)
        # 0 is ignored; it is shown in black, the last colour.
        truth = np.where(grey == 0, len(palette) - 1, np.asarray(grey, dtype=int) - 1)
        found = predictor(paths[index]).pred_sem_seg.data[0].cpu().numpy()
        titles = ('image', 'ground truth', 'prediction') if heading else (None,) * 3
        show_picture(axes[0], image, titles[0])
        show_picture(axes[1], overlay(image, truth), titles[1])
        show_picture(axes[2], overlay(image, found), titles[2])

    plot_grid(out, draw, len(paths), columns=3, blocks=2)


def plot_features(out: Path, image: np.ndarray, features: Sequence[np.ndarray]) -> None:
    """Draw an image and the principal components of its stage features as colours."""
    with plt.rc_context({**STYLE, 'axes.grid': False}):
        figure, grid = plt.subplots(
            1, len(features) + 1, figsize=(2.3 * (len(features) + 1), 2.6), layout='constrained'
        )
        show_picture(grid[0], image, 'image')
        for i, feature in enumerate(features):
            axes = grid[i + 1]
            axes.imshow(principal_colours(feature.transpose(1, 2, 0)), interpolation='nearest')
            axes.set_axis_off()
            channels, height, width = feature.shape
            axes.set_title(f'stage {i + 1}: {channels} x {height} x {width}', fontsize=9, color=INK)
        figure.savefig(out)
        plt.close(figure)


CSS = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1f2933; background: #f5f7fa; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 0; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .4rem 0; color: #52606d; }
section { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px;
  padding: 1.5rem; margin-top: 1.5rem; }
img { display: block; max-width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .5rem .7rem; border-bottom: 1px solid #e4e7eb; }
th { font-weight: 600; color: #7b8794; font-size: .85rem; }
td.number { font-variant-numeric: tabular-nums; }
.reached { color: #0f7b45; font-weight: 600; }
.missed { color: #d64545; font-weight: 600; }
.quick { color: #7b8794; }
.scroll { overflow-x: auto; }
"""


def page_table(outcomes: Sequence[Outcome], quick: bool) -> str:
    """Return the scores against the targets as an HTML table."""
    head = ''.join(
        f'<th>{name}</th>'
        for name in ('Task', 'Model', 'Metric', 'Score', 'Target', 'Training', 'Test', '')
    )
    rows = []
    for outcome in outcomes:
        state = 'quick' if quick else 'reached' if outcome.reached else 'missed'
        cells = [
            f'<td>{html.escape(text)}</td>'
            for text in (outcome.title, outcome.model, outcome.metric)
        ]
        numbers = (
            format_score(outcome.score),
            f'{outcome.target:.2f}',
            format_seconds(outcome.train_seconds),
            format_seconds(outcome.test_seconds),
        )
        cells += [f'<td class="number">{number}</td>' for number in numbers]
        cells.append(f'<td class="{state}">{html.escape(verdict(outcome, quick))}</td>')
        rows.append(f'<tr>{"".join(cells)}</tr>')
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def page_picture(path: Path, alt: str) -> str:
    """Return an image as an element of the page itself."""
    data = base64.b64encode(path.read_bytes()).decode('ascii')
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def write_page(
    out: Path, outcomes: Sequence[Outcome], sections: Sequence[Section], quick: bool
) -> None:
    """Write the self-contained report.

    Args:
        out: The HTML file.
        outcomes: What the table shows.
        sections: In the order of the page.
        quick: Whether the run was too short to compare with the targets.
    """
    parts = []
    for title, text, pictures in sections:
        shown = ''.join(
            f'<h3>{html.escape(heading)}</h3>{page_picture(path, heading)}'
            for heading, path in pictures
        )
        parts.append(
            f'<section><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{shown}</section>'
        )
    lead = (
        'A quick run: it shows that every step works, not what the models can learn.'
        if quick
        else 'Trained from random weights; the scores are those of the saved checkpoints.'
    )
    out.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>pvt_mm demo</title><style>{CSS}</style></head><body><main>'
        f'<h1>Pyramid Vision Transformer: the demo</h1><p>{lead}</p>'
        f'<section><h2>Scores</h2>{page_table(outcomes, quick)}</section>{"".join(parts)}'
        '</main></body></html>\n',
        encoding='utf-8',
    )
