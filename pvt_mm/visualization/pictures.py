"""Pictures of a trained detector or segmentor: features, attention, predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from pvt_mm.apis.inference import Predictor, read_pixels
from pvt_mm.config import datasets
from pvt_mm.datasets.consistency import category_names, check_data
from pvt_mm.engine.model_parts import find_backbones
from pvt_mm.errors import UserError
from pvt_mm.visualization.attention import (
    StageTrace,
    explicit_attention,
    keyed_tokens,
    trace_stages,
)

Point = tuple[int, int]

INK, MARK = '#1f2933', '#00c2ff'
#: Colours of a map over a grey image, by value from 0 to 1: low values are more transparent.
LUT = (matplotlib.colormaps['inferno'](np.linspace(0.1, 1, 256)) * 255).round().astype(np.uint8)
LUT[:, 3] = np.linspace(90, 235, 256)
#: Longer side of a picture, in pixels.
SIDE = 640


class StageView(NamedTuple):
    """A stage laid over the image.

    Attributes:
        trace: What the stage computed.
        cell: Height and width of a token, as fractions of the image's.
    """

    trace: StageTrace
    cell: tuple[float, float]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens on the image; beyond them is padding."""
        height, width = self.trace.feature.shape[:2]
        rows, columns = (math.ceil(round(1 / side, 6)) for side in self.cell)
        return min(rows, height), min(columns, width)

    @property
    def feature(self) -> np.ndarray:
        """The stage's output on the image, (rows, columns, dim)."""
        rows, columns = self.grid
        return self.trace.feature[:rows, :columns].float().cpu().numpy()

    @property
    def key_extent(self) -> tuple[float, float]:
        """Height and width of the area that the keys cover, as fractions of the image's."""
        rows, columns = keyed_tokens(self.trace.attn, *self.trace.feature.shape[:2])
        return rows * self.cell[0], columns * self.cell[1]

    def token_at(self, x: float, y: float) -> Point:
        """Return the row and column of the token at a point, given as fractions of the image."""
        rows, columns = self.grid
        return min(int(y / self.cell[0]), rows - 1), min(int(x / self.cell[1]), columns - 1)

    @torch.no_grad()
    def attention(self, tokens: Sequence[Point]) -> np.ndarray:
        """Return the last block's weights of some tokens, (tokens, heads, key rows, columns)."""
        width = self.trace.feature.shape[1]
        queries = [row * width + column for row, column in tokens]
        attention = explicit_attention(self.trace.attn, self.trace.tokens, queries)
        weights = attention.weights[0].transpose(0, 1)  # (tokens, heads, keys)
        return weights.unflatten(-1, attention.key_grid).float().cpu().numpy()


class View(NamedTuple):
    """An image and the outputs of each stage for it.

    Attributes:
        name: The image's name.
        pixels: The image as RGB, (H, W, 3).
        stages: The stages.
    """

    name: str
    pixels: np.ndarray
    stages: list[StageView]


@torch.no_grad()
def view_image(predictor: Predictor, image: str | Path) -> View:
    """Run a predictor's backbone on an image file.

    Raises:
        UserError: Where the image cannot be read, or the model has no PVT.
    """
    backbones = list(find_backbones(predictor.model).values())
    if not backbones:
        raise UserError(
            'The config has no PVT or PVTv2 whose attention could be drawn; put one into it with '
            'tools/model_converters/swap_backbone.py, and train it.'
        )
    pixels = read_pixels(image)
    data = predictor.pipeline(dict(img_path=str(image), img_id=0))
    batch = predictor.model.data_preprocessor({key: [value] for key, value in data.items()}, False)
    height, width = _network_size(predictor, data['data_samples'].metainfo)
    stages = [
        StageView(trace, (trace.stride / height, trace.stride / width))
        for trace in trace_stages(backbones[0], batch['inputs'])
    ]
    return View(Path(image).name, pixels, stages)


def _network_size(predictor: Predictor, meta: dict[str, Any]) -> tuple[float, float]:
    """Return height and width of the image as the network gets it, without padding."""
    if any(type(step).__name__ == 'Pad' for step in predictor.pipeline.transforms):
        # img_shape counts the padding then.
        (height, width), (across, down) = meta['ori_shape'], meta['scale_factor']
        return height * down, width * across
    return meta['img_shape'][:2]


def parse_point(text: str | None, pixels: np.ndarray) -> Point:
    """Return the column and row of a pixel given as ``X,Y``; None stands for the middle.

    Raises:
        UserError: Where it is no point, or outside of the image.
    """
    height, width = pixels.shape[:2]
    if text is None:
        return width // 2, height // 2
    try:
        x, y = (int(part) for part in text.split(','))
    except ValueError:
        raise UserError(
            f'--query {text} is no point; give two whole numbers of pixels, such as 120,80.'
        ) from None
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(
            f'--query {text} is outside of the image of {width} x {height} pixels; give X from 0 '
            f'to {width - 1} and Y from 0 to {height - 1}.'
        )
    return x, y


# Maps as colours


def resize_to_side(pixels: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Resize an image to a longer side."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def resize_map(
    values: np.ndarray,
    extent: tuple[float, float],
    size: tuple[int, int],
    interpolation: int = cv2.INTER_LINEAR,
) -> np.ndarray:
    """Resize a map to the area of the image that it covers; the rest is 0.

    Args:
        values: The map, (h, w) or (h, w, C).
        extent: Height and width of that area, as fractions of the image's.
        size: Height and width of the result.
        interpolation: OpenCV's interpolation.
    """
    height, width = (max(round(part * side), 1) for part, side in zip(extent, size))
    wide = cv2.resize(values.astype(np.float32), (width, height), interpolation=interpolation)
    wide = wide[: size[0], : size[1]]
    out = np.zeros((*size, *values.shape[2:]), np.float32)
    out[: wide.shape[0], : wide.shape[1]] = wide
    return out


def overlay(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Draw a map of values in 0..1 over an image of the same size, in the colours of ``LUT``."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[:, :, None].astype(np.float32)
    colours = LUT[(np.clip(values, 0, 1) * 255).round().astype(int)].astype(np.float32)
    alpha = colours[:, :, 3:] / 255
    return (grey * (1 - alpha) + colours[:, :, :3] * alpha).round().astype(np.uint8)


def principal_colours(feature: np.ndarray) -> np.ndarray:
    """Return the three principal components of a feature as RGB in 0..1.

    Shape:
        feature: (H, W, C) -> (H, W, 3).
    """
    height, width, channels = feature.shape
    tokens = feature.reshape(-1, channels).astype(np.float64)
    tokens = tokens - tokens.mean(0)
    _, directions = np.linalg.eigh(tokens.T @ tokens)  # by rising variance
    components = np.zeros((height * width, 3))
    for i, direction in enumerate(directions.T[::-1][:3]):
        # The sign of a direction is arbitrary: the largest weight is made positive.
        components[:, i] = tokens @ (direction * np.sign(direction[np.abs(direction).argmax()]))
    return unit_range(components.reshape(height, width, 3))


def unit_range(values: np.ndarray) -> np.ndarray:
    """Scale each channel of a (H, W, C) map to 0..1, and clip the lowest and highest 2%."""
    low, high = np.percentile(values, (2, 98), axis=(0, 1))
    span = np.where(high - low > 1e-9, high - low, 1.0)
    return np.clip((values - low) / span, 0, 1)


# Pictures


def plot_features(view: View, out_file: Path) -> None:
    """Draw each stage's principal components as colours, and the mean of its channels."""
    pixels = resize_to_side(view.pixels)
    figure, axes = _panels(2, len(view.stages) + 1, pixels.shape, 2.5)
    _show(axes[0, 0], pixels, 'image')
    axes[1, 0].text(
        0.5,
        0.5,
        'above: the first three\nprincipal components\nas red, green, blue\n\n'
        'right: mean over the\nchannels, dark: low,\nbright: high',
        ha='center',
        va='center',
        color=INK,
        fontsize=9,
        transform=axes[1, 0].transAxes,
    )
    for i, stage in enumerate(view.stages):
        feature = stage.feature
        rows, columns, channels = feature.shape
        extent = rows * stage.cell[0], columns * stage.cell[1]
        colours = resize_map(
            principal_colours(feature), extent, pixels.shape[:2], cv2.INTER_NEAREST
        )
        title = f'stage {i + 1}: {channels} channels\n{columns} x {rows} tokens'
        _show(axes[0, i + 1], colours, title)
        mean = unit_range(feature.mean(-1, keepdims=True))[:, :, 0]
        _show(axes[1, i + 1], overlay(pixels, resize_map(mean, extent, pixels.shape[:2])))
    figure.savefig(out_file)


def plot_attention(view: View, point: Point, out_file: Path) -> None:
    """Draw where each stage's last block looks from a point: the mean of its heads, and each."""
    pixels = resize_to_side(view.pixels, SIDE // 2)
    height, width = view.pixels.shape[:2]
    x, y = (point[0] + 0.5) / width, (point[1] + 0.5) / height
    most = max(stage.trace.attn.num_heads for stage in view.stages)
    figure, axes = _panels(len(view.stages), most + 2, pixels.shape, 1.55)
    for i, stage in enumerate(view.stages):
        token = stage.token_at(x, y)
        (heads,) = stage.attention([token])
        title = f'stage {i + 1}\n{heads.shape[2]} x {heads.shape[1]} keys'
        maps = {'mean': heads.mean(0)} if len(heads) > 1 else {}
        maps |= {f'head {k + 1}': head for k, head in enumerate(heads)}
        _show(axes[i, 0], pixels, title)
        _mark(axes[i, 0], stage, token, (x, y), pixels.shape)
        for panel, (name, weights) in zip(axes[i, 1:], maps.items()):
            wide = resize_map(weights / weights.max(), stage.key_extent, pixels.shape[:2])
            _show(panel, overlay(pixels, wide), f'{name}\nmax {weights.max():.1%}')
            _mark(panel, stage, token, (x, y), pixels.shape)
    figure.savefig(out_file)


def _panels(rows: int, columns: int, shape: tuple[int, ...], width: float) -> tuple[Figure, Any]:
    """Make a grid of empty panels, each ``width`` inches wide and high enough for an image."""
    height = width * shape[0] / shape[1] + 0.45
    figure = Figure((width * columns, height * rows), dpi=110, layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.set_axis_off()
    return figure, axes


def _show(axes: Any, pixels: np.ndarray, title: str = '') -> None:
    axes.imshow(pixels)
    axes.set_title(title, fontsize=8.5, color=INK)


def _mark(
    axes: Any, stage: StageView, token: Point, place: tuple[float, float], shape: tuple[int, ...]
) -> None:
    """Mark a point, given as fractions of the image, and the token that it is in."""
    height, width = shape[:2]
    down, across = stage.cell[0] * height, stage.cell[1] * width
    corner = token[1] * across - 0.5, token[0] * down - 0.5
    axes.add_patch(Rectangle(corner, across, down, fill=False, edgecolor=MARK, linewidth=1.1))
    axes.plot(place[0] * width - 0.5, place[1] * height - 0.5, '+', color=MARK, markersize=7)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def plot_predictions(
    predictor: Predictor,
    pixels: np.ndarray,
    result: Any,
    truth: Any | None,
    out_file: Path,
    score_thr: float = 0.3,
) -> None:
    """Draw an image, its ground truth if there is one, and its predictions, side by side.

    Args:
        predictor: Of the predictions.
        pixels: The image as RGB.
        result: What the predictor returned.
        truth: What :func:`find_truth` returned.
        out_file: The picture to write.
        score_thr: Boxes below this score are not drawn.
    """
    # The codebases draw text of a fixed size, so that a small image is enlarged first.
    factor = max(SIDE // max(pixels.shape[:2]), 1)
    large = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    pictures = {'image': large}
    if truth is not None:
        annotated = _enlarged(truth, factor, 'gt')
        if 'masks' in annotated.get('gt_instances', ()) and 'masks' not in result.pred_instances:
            del annotated.gt_instances.masks  # the model finds boxes only
        pictures['ground truth'] = _drawn(predictor, large, annotated, 'gt')
    options = {'pred_score_thr': score_thr} if predictor.task == 'mmdet' else {}
    title = f'prediction, scores from {score_thr:.0%}' if options else 'prediction'
    found = _enlarged(result, factor, 'pred')
    pictures[title] = _drawn(predictor, large, found, 'pred', **options)
    figure, axes = _panels(1, len(pictures), pixels.shape, 4.2)
    for panel, (name, picture) in zip(axes[0], pictures.items()):
        _show(panel, picture, name)
    figure.savefig(out_file)


def _drawn(
    predictor: Predictor, pixels: np.ndarray, sample: Any, kind: str, **options: Any
) -> np.ndarray:
    predictor.visualizer.add_datasample(
        'image', pixels, sample, draw_gt=kind == 'gt', draw_pred=kind == 'pred', **options
    )
    return predictor.visualizer.get_image()


def _enlarged(sample: Any, factor: int, kind: str) -> Any:
    """Return a copy of a data sample, scaled for an enlarged image.

    Args:
        sample: A data sample of mmdet or mmseg.
        factor: How many times larger the image is.
        kind: ``'gt'`` or ``'pred'``.
    """
    sample = sample.cpu()
    if f'{kind}_sem_seg' in sample:
        maps = sample.get(f'{kind}_sem_seg')
        maps = type(maps)(data=_repeated(maps.data, factor))
        sample.set_field(maps, f'{kind}_sem_seg')
        return sample
    instances = sample.get(f'{kind}_instances').clone()
    instances.bboxes = instances.bboxes * factor
    if 'masks' in instances:
        instances.masks = _repeated(instances.masks, factor)
    sample.set_field(instances, f'{kind}_instances')
    return sample


def _repeated(maps: Any, factor: int) -> torch.Tensor:
    return torch.as_tensor(maps).repeat_interleave(factor, -2).repeat_interleave(factor, -1)


# Ground truth


def find_truth(cfg: Config, image: str | Path, ann_file: str | None = None) -> Any | None:
    """Return the ground truth of an image as a data sample; None where there is none.

    Args:
        cfg: The predictor's config.
        image: The image file; it is searched by its name and size.
        ann_file: A COCO file to search; by default the config's test and validation sets.

    Raises:
        UserError: Where ``ann_file`` cannot be used, or does not list the image.
    """
    init_default_scope(cfg.default_scope)
    height, width = read_pixels(image).shape[:2]
    for data in _sources(cfg, ann_file):
        dataset = DATASETS.build(dict(data, lazy_init=True, pipeline=[]))
        entries = [
            entry for entry in dataset.load_data_list() if _is_of(entry, image, height, width)
        ]
        if len(entries) == 1:  # of several, none is known to be the one
            sample = _load_truth(entries[0], image, cfg.default_scope)
            if 'gt_sem_seg' not in sample or sample.gt_sem_seg.shape == (height, width):
                return sample
    if ann_file:
        raise UserError(
            f'{ann_file} does not list one image {Path(image).name} of {width} x {height} pixels; '
            'give the annotations of this image, or leave out --ann-file.'
        )
    return None


def _sources(cfg: Config, ann_file: str | None) -> Iterator[dict]:
    """Yield the data sets to search."""
    if ann_file:
        yield _annotated_by(ann_file, cfg)
        return
    for loader in ('test_dataloader', 'val_dataloader'):
        try:
            check_data(cfg, [loader])
        except UserError:
            continue  # the data are not on this machine
        yield from datasets(cfg, [loader])


def _annotated_by(ann_file: str, cfg: Config) -> dict:
    if cfg.default_scope != 'mmdet':
        raise UserError(
            "--ann-file is for detectors; a segmentor's label maps are found by its config, with "
            '--data-root where they lie elsewhere.'
        )
    data = next(datasets(cfg, ['test_dataloader']))
    file = str(Path(ann_file).resolve())
    classes = DATASETS.build(dict(data, lazy_init=True, pipeline=[])).metainfo['classes']
    if not set(classes) & set(category_names(file)):
        raise UserError(
            f'{ann_file} has none of the classes of the config, {", ".join(classes[:5])} ...; give '
            'annotations of the data that the model was trained for.'
        )
    return dict(data, ann_file=file, data_root='', data_prefix=dict(img=''))


def _is_of(entry: dict[str, Any], image: str | Path, height: int, width: int) -> bool:
    """Tell whether an entry of a data set is about an image, by name and size."""
    size = entry.get('height', height), entry.get('width', width)
    return Path(entry['img_path']).name == Path(image).name and size == (height, width)


def _load_truth(entry: dict[str, Any], image: str | Path, task: str) -> Any:
    if task == 'mmdet':
        with_mask = any(instance.get('mask') for instance in entry['instances'])
        load = dict(type='LoadAnnotations', with_bbox=True, with_mask=with_mask, box_type=None)
        pack = dict(type='PackDetInputs', meta_keys=())
    else:
        load, pack = dict(type='LoadAnnotations'), dict(type='PackSegInputs', meta_keys=())
    steps = Compose([dict(type='LoadImageFromFile'), load, pack])
    sample = steps(dict(entry, img_path=str(image)))['data_samples']
    if 'gt_instances' in sample and 'masks' in sample.gt_instances:
        instances = sample.gt_instances
        masks = instances.pop('masks').to_ndarray()
        instances.masks = torch.from_numpy(masks).bool()
    return sample
