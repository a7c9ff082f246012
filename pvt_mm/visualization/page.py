"""One self-contained HTML page: click on the image and see where each stage and head looks."""

from __future__ import annotations

import base64
import html
import itertools
import json
import math
from collections.abc import Mapping
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
        pictures: Headings, and the picture files shown below.
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
    page = TEMPLATE.replace('NAME', html.escape(view.name)).replace('SECTIONS', sections)
    page = page.replace('DATA', json.dumps(data).replace('<', '\\u003c'))
    out_file.write_text(page, encoding='utf-8')


def stage_data(stage: StageView, limit: int) -> dict[str, Any]:
    """Return what the page needs of a stage, its weights in at most so many bytes.

    Each row of weights becomes bytes of its largest one, which is kept beside. Where all tokens'
    rows are too many, every second, third, ... token in both directions asks.
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
    """Return the least step between asking tokens at which rows of a size fit into a limit."""
    return next(
        step
        for step in range(1, max(rows, columns) + 1)
        if math.ceil(rows / step) * math.ceil(columns / step) * size <= limit
        or step == max(rows, columns)
    )


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode('ascii')


def _data_uri(pixels: np.ndarray) -> str:
    """Return a BGR image as a JPEG in a URI; PNGs of photographs would be too large."""
    content = cv2.imencode('.jpg', pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    return f'data:image/jpeg;base64,{_base64(content)}'


TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Attention: NAME</title>
<style>
:root { color-scheme: light; --ink: #1f2933; --soft: #52606d; --line: #d9dfe6; --accent: #0b6bcb; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: #f5f7fa; margin: 0; }
main { max-width: 1320px; margin: 0 auto; padding: 18px 20px 40px; }
h1 { font-size: 1.35rem; margin: 0 0 2px; }
h2 { font-size: 1.05rem; margin: 0 0 8px; }
p { margin: 0 0 10px; color: var(--soft); }
section, #explorer > div { background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 14px; }
section { margin-top: 16px; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
#explorer { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 7fr); gap: 16px;
  align-items: start; }
#image { display: block; width: 100%; height: auto; cursor: crosshair; touch-action: none;
  border-radius: 4px; }
#point { font-weight: 600; font-variant-numeric: tabular-nums; margin: 10px 0 2px;
  color: var(--ink); }
#shown { min-height: 2.9em; margin: 0 0 6px; }
#scale { display: flex; align-items: center; gap: 8px; font-size: .85rem; color: var(--soft); }
#scale canvas { flex: 1; min-width: 60px; height: 12px; border-radius: 3px;
  background: #777; }
.stage { border: 0; margin: 0; padding: 0; min-width: 0; }
.stage + .stage { margin-top: 14px; }
.stage legend { padding: 0; font-weight: 600; margin-bottom: 4px; }
.stage legend span { font-weight: 400; color: var(--soft); font-size: .88rem; }
.maps { display: grid; gap: 6px; grid-template-columns: repeat(9, minmax(0, 1fr)); }
.maps button { font: inherit; font-size: .78rem; line-height: 1.2; color: var(--soft); padding: 3px;
  background: none; border: 1px solid transparent; border-radius: 5px; cursor: pointer; }
.maps button:hover { border-color: var(--line); }
.maps button[aria-pressed=true] { border-color: var(--accent); background: #e8f1fb;
  color: var(--ink); }
.maps canvas { display: block; width: 100%; height: auto; margin-bottom: 2px; border-radius: 3px; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
@media (max-width: 1000px) {
  #explorer { grid-template-columns: minmax(0, 1fr); }
  #image { max-width: 560px; margin: 0 auto; }
}
@media (max-width: 560px) { .maps { grid-template-columns: repeat(5, minmax(0, 1fr)); } }
</style>
<main>
<h1>Where each stage and each head looks: NAME</h1>
<p>Click or drag on the image, or use the arrow keys (with Shift: further), to ask from another
point. Choose a small map to see it over the image.</p>
<div id="explorer">
<div>
<canvas id="image" tabindex="0" role="application"
  aria-label="The image; arrow keys move the point that asks"
  aria-describedby="point shown"></canvas>
<p id="point" aria-live="polite"></p>
<p id="shown"></p>
<div id="scale"><span>0</span><canvas width="256" height="1"></canvas><span id="top"></span></div>
</div>
<div id="stages"></div>
</div>
SECTIONS
</main>
<script>
'use strict';
const data = DATA;
const bytes = text => Uint8Array.from(atob(text), character => character.charCodeAt(0));
const lut = bytes(data.lut);
for (const stage of data.stages) {
  stage.weights = bytes(stage.weights);
  stage.peaks = new Float32Array(bytes(stage.peaks).buffer);
}
const element = id => document.getElementById(id);
const image = element('image'), small = document.createElement('canvas');
const grey = document.createElement('canvas');
const thumbs = [];
let point = {x: data.point[0], y: data.point[1]}, chosen;

// The token that asks: the nearest one whose weights the page holds.
function asking(stage) {
  const find = (place, size, axis) => {
    const among = Math.floor((place + 0.5) / size / stage.cell[axis]);
    const token = Math.min(among, stage.grid[axis] - 1);
    const start = Math.floor((stage.step - 1) / 2);
    const asked = Math.round((token - start) / stage.step);
    const index = Math.max(0, Math.min(asked, stage.asked[axis] - 1));
    return {index, token: start + index * stage.step};
  };
  const row = find(point.y, data.height, 0), column = find(point.x, data.width, 1);
  return {row: row.token, column: column.token, index: row.index * stage.asked[1] + column.index};
}

// The weights of one head from the point, or of their mean (head -1).
function weightsOf(stage, head) {
  const size = stage.keys[0] * stage.keys[1], from = asking(stage).index * stage.heads;
  const heads = head < 0 ? [...Array(stage.heads).keys()] : [head];
  const weights = new Float32Array(size);
  for (const one of heads) {
    const peak = stage.peaks[from + one] / 255 / heads.length, offset = (from + one) * size;
    for (let i = 0; i < size; i++) weights[i] += stage.weights[offset + i] * peak;
  }
  return weights;
}

function drawMap(canvas, stage, weights, marked) {
  const context = canvas.getContext('2d'), {width, height} = canvas;
  const peak = Math.max(...weights), [rows, columns] = stage.keys;
  context.drawImage(grey, 0, 0, width, height);
  small.width = columns; small.height = rows;
  const pixels = new ImageData(columns, rows);
  weights.forEach((weight, i) => {
    const at = 4 * Math.round(255 * weight / peak);
    pixels.data.set(lut.subarray(at, at + 4), 4 * i);
  });
  small.getContext('2d').putImageData(pixels, 0, 0);
  const down = stage.extent[0] * height, across = stage.extent[1] * width;
  context.imageSmoothingQuality = 'high';
  context.drawImage(small, 0, 0, across, down);
  mark(context, stage, width, height, marked);
  return peak;
}

function mark(context, stage, width, height, cross) {
  const {row, column} = asking(stage);
  const down = stage.cell[0] * height, across = stage.cell[1] * width;
  context.lineWidth = cross ? 2.5 : 2;
  context.strokeStyle = '#00c2ff';
  context.strokeRect(column * across, row * down, across, down);
  if (!cross) return;
  const x = (point.x + 0.5) / data.width * width, y = (point.y + 0.5) / data.height * height;
  for (const [style, line] of [['#fff', 5], ['#00c2ff', 2.5]]) {
    context.strokeStyle = style; context.lineWidth = line;
    context.beginPath();
    context.moveTo(x - 12, y); context.lineTo(x + 12, y);
    context.moveTo(x, y - 12); context.lineTo(x, y + 12);
    context.stroke();
  }
}

const percent = share => `${(100 * share).toFixed(share < 0.1 ? 2 : 1)}%`;

function draw() {
  for (const thumb of thumbs) {
    const weights = weightsOf(thumb.stage, thumb.head);
    const peak = drawMap(thumb.canvas, thumb.stage, weights, false);
    thumb.button.title = `largest weight ${percent(peak)}`;
    thumb.button.setAttribute('aria-pressed', thumb === chosen);
  }
  const {stage, head} = chosen, number = data.stages.indexOf(stage) + 1;
  const peak = drawMap(image, stage, weightsOf(stage, head), true);
  const {row, column} = asking(stage), keys = stage.keys[0] * stage.keys[1];
  element('point').textContent = `Asked from x ${point.x}, y ${point.y}`;
  element('shown').textContent = `Shown: stage ${number}, ${thumbName(stage, head)}, from the `
    + `token in row ${row + 1}, column ${column + 1}. Largest weight ${percent(peak)}; looking `
    + `everywhere alike would be ${percent(1 / keys)}.`;
  element('top').textContent = percent(peak);
}

function thumbName(stage, head) {
  return head < 0 ? (stage.heads > 1 ? `mean of ${stage.heads} heads` : 'its one head')
    : `head ${head + 1}`;
}

function move(x, y) {
  const inside = (value, size) => Math.max(0, Math.min(Math.floor(value), size - 1));
  point = {x: inside(x, data.width), y: inside(y, data.height)};
  draw();
}

function moveTo(event) {
  const box = image.getBoundingClientRect();
  move((event.clientX - box.left) / box.width * data.width,
    (event.clientY - box.top) / box.height * data.height);
}

function listen() {
  image.addEventListener('pointerdown', event => {
    image.setPointerCapture(event.pointerId);
    moveTo(event);
  });
  image.addEventListener('pointermove', event => {
    if (event.buttons) moveTo(event);
  });
  image.addEventListener('keydown', event => {
    const ways = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
    if (!ways[event.key]) return;
    event.preventDefault();
    const {cell} = data.stages[event.shiftKey ? data.stages.length - 1 : 0];
    const [across, down] = ways[event.key];
    const step = (way, size, part) => way * Math.max(1, Math.round(size * part));
    move(point.x + step(across, data.width, cell[1]), point.y + step(down, data.height, cell[0]));
  });
}

function addStage(stage, i) {
  const set = document.createElement('fieldset');
  set.className = 'stage';
  const [rows, columns] = stage.keys, [down, across] = stage.grid;
  const thinned = stage.step > 1 ? `, ${stage.asked[1]} x ${stage.asked[0]} of them can ask` : '';
  set.innerHTML = `<legend>Stage ${i + 1} <span>${across} x ${down} tokens${thinned}; `
    + `${columns} x ${rows} keys</span></legend><div class="maps"></div>`;
  for (let head = -1; head < (stage.heads > 1 ? stage.heads : 0); head++) {
    const button = document.createElement('button'), canvas = document.createElement('canvas');
    canvas.width = 160; canvas.height = Math.max(1, Math.round(160 * data.height / data.width));
    const name = head >= 0 ? `head ${head + 1}` : stage.heads > 1 ? 'mean' : 'one head';
    button.type = 'button';
    button.setAttribute('aria-label', `stage ${i + 1}, ${thumbName(stage, head)}`);
    button.append(canvas, name);
    const thumb = {stage, head, canvas, button};
    button.addEventListener('click', () => { chosen = thumb; draw(); });
    thumbs.push(thumb);
    set.lastChild.append(button);
  }
  element('stages').append(set);
}

const source = new Image();
source.onload = () => {
  for (const canvas of [image, grey]) {
    canvas.width = source.width; canvas.height = source.height;
  }
  const context = grey.getContext('2d');
  context.drawImage(source, 0, 0);
  const pixels = context.getImageData(0, 0, grey.width, grey.height), p = pixels.data;
  for (let i = 0; i < p.length; i += 4) {
    p[i] = p[i + 1] = p[i + 2] = 0.299 * p[i] + 0.587 * p[i + 1] + 0.114 * p[i + 2];
  }
  context.putImageData(pixels, 0, 0);
  const scale = document.querySelector('#scale canvas').getContext('2d');
  const ramp = new ImageData(256, 1);
  ramp.data.set(lut);
  scale.putImageData(ramp, 0, 0);
  data.stages.forEach(addStage);
  chosen = thumbs.findLast(thumb => thumb.head < 0);
  listen();
  draw();
};
source.src = data.image;
</script>
</html>
"""
