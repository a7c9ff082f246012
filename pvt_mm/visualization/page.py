"""A self-contained HTML page: click on the image to see where each stage and head looks."""

from __future__ import annotations

import base64
import html
import itertools
import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np

from pvt_mm.visualization.pictures import LUT, Point, StageView, View, resize_to_side

#: Bytes of attention that a page holds at most; in base64 they take a third more.
ATTENTION_BYTES = 4_500_000
#: Longer side of the page's image, in pixels.
PAGE_SIDE = 900


def write_page(view: View, point: Point, pictures: Mapping[str, Path], out_file: Path) -> None:
    """Write the page.

    Args:
        view: The image and its stages.
        point: Column and row of the pixel shown first.
        pictures: Headings and picture files, shown below the image.
        out_file: The HTML file.
    """
    height, width = view.pixels.shape[:2]
    pixels = cv2.cvtColor(resize_to_side(view.pixels, PAGE_SIDE), cv2.COLOR_RGB2BGR)
    data = {
        'image': _data_uri(pixels),
        'width': width,
        'height': height,
        'point': point,
        'lut': _base64(LUT),
        'stages': [stage_data(stage, ATTENTION_BYTES // len(view.stages)) for stage in view.stages],
    }
    sections = ''.join(
        f'<section><h2>{html.escape(title)}</h2>'
        f'<img alt="{html.escape(title)}" src="{_data_uri(mmcv.imread(file))}"></section>'
        for title, file in pictures.items()
    )
    template = resources.files('pvt_mm.visualization').joinpath('page.html')
    page = template.read_text(encoding='utf-8')
    page = page.replace('NAME', html.escape(view.name)).replace('SECTIONS', sections)
    page = page.replace('DATA', json.dumps(data).replace('<', '\\u003c'))
    out_file.write_text(page, encoding='utf-8')


def stage_data(stage: StageView, limit: int) -> dict[str, Any]:
    """Return what the page needs of a stage, with at most ``limit`` bytes of attention weights.

    Each row of weights is scaled by its maximum to bytes; the maximum is kept. Where the rows of
    all tokens are too many, only every second, third, ... token in both directions is a query.
    """
    rows, columns = stage.grid
    (first,) = stage.attention([(0, 0)])
    step = query_step(rows, columns, first.size, limit)
    asked_rows, asked_columns = (range((step - 1) // 2, side, step) for side in (rows, columns))
    weights = stage.attention(list(itertools.product(asked_rows, asked_columns)))
    peaks = weights.max((2, 3), keepdims=True)
    return {
        'grid': [rows, columns],
        'cell': stage.cell,
        'step': step,
        'asked': [len(asked_rows), len(asked_columns)],
        'heads': weights.shape[1],
        'keys': weights.shape[2:],
        'extent': stage.key_extent,
        'weights': _base64((weights / peaks * 255).round().astype(np.uint8)),
        'peaks': _base64(peaks.astype('<f4')),
    }


def query_step(rows: int, columns: int, size: int, limit: int) -> int:
    """Return the smallest step between query tokens at which their rows fit into a limit."""
    return next(
        step
        for step in range(1, max(rows, columns) + 1)
        if math.ceil(rows / step) * math.ceil(columns / step) * size <= limit
        or step == max(rows, columns)
    )


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode('ascii')


def _data_uri(pixels: np.ndarray) -> str:
    """Return a BGR image as a JPEG in a URI; a PNG of a photograph would be too large."""
    content = cv2.imencode('.jpg', pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    return f'data:image/jpeg;base64,{_base64(content)}'
