"""Draw how a PVT works: tokens, keys and what the attention costs, stage by stage.

Shapes are those of the real models, run on PyTorch's meta device, so nothing is computed.

Example:
    python tools/analysis_tools/draw_architecture.py --arch b2 --out architecture.png
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from pvt_mm import PVT, PVTv2, cli

INK, QUERY, KEY, LINEAR, PLAIN = '#263238', '#3949ab', '#ef6c00', '#2e7d32', '#b0bec5'
SIDE = 224
LARGE = (800, 1344)


class StageShape(NamedTuple):
    """What a stage works on: its tokens, a grid, and the coarser grid of its keys."""

    tokens: tuple[int, int]
    width: int
    keys: tuple[int, int]
    depth: int
    heads: int
    ratio: int


def stage_shapes(arch: str, height: int, width: int) -> list[StageShape]:
    """Run an arch on the meta device and read off the shapes of its stages."""
    with torch.device('meta'), torch.no_grad():
        model = (PVT if arch in PVT.ARCHS else PVTv2)(arch).eval()
        maps = model(torch.empty(1, 3, height, width))
        shapes = []
        for stage, features in zip(model.stages, maps):
            attention = stage.blocks[0].attn
            keys = attention.reduce(features.permute(0, 2, 3, 1))  # (B, H', W', C)
            shapes.append(
                StageShape(
                    tuple(features.shape[2:]),
                    features.shape[1],
                    tuple(keys.shape[1:3]),
                    len(stage.blocks),
                    attention.num_heads,
                    attention.sr_ratio,
                )
            )
    return shapes


def draw_grid(axes, cells: tuple[int, int], colour: str) -> None:
    """Draw a grid over the unit square, one cell a token."""
    rows, columns = cells
    style = dict(color=colour, linewidth=0.3 if rows > 30 else 0.8, alpha=0.9)
    axes.hlines([i / rows for i in range(rows + 1)], 0, 1, **style)
    axes.vlines([i / columns for i in range(columns + 1)], 0, 1, **style)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect='equal')
    axes.axis('off')


def draw_stage(axes, index: int, shape: StageShape) -> None:
    """Draw a stage's tokens above and the keys that each of them attends to below."""
    above, below = axes
    rows, columns = shape.tokens
    draw_grid(above, shape.tokens, QUERY)
    draw_grid(below, shape.keys, KEY)
    row, column = int(0.62 * rows), int(0.3 * columns)
    cell = dict(width=1 / columns, height=1 / rows, color=QUERY)
    above.add_patch(_rectangle((column / columns, row / rows), **cell))
    below.add_patch(_rectangle((0, 0), width=1, height=1, color=KEY, alpha=0.18))
    # One key, and the tokens that it is made from.
    corner = (5 / shape.keys[1], 2 / shape.keys[0])
    one = dict(width=1 / shape.keys[1], height=1 / shape.keys[0])
    above.add_patch(_rectangle(corner, **one, color=KEY, alpha=0.55))
    below.add_patch(_rectangle(corner, **one, color=KEY))
    above.set_title(
        f'Stage {index + 1}: {shape.depth} blocks\n{rows} x {columns} tokens of {shape.width}',
        fontsize=10.5,
        color=INK,
    )
    title = f'{shape.keys[0]} x {shape.keys[1]} keys\n{made_from(shape)}'
    below.set_title(title, fontsize=9.5, color=INK)
    heads = f'{shape.heads} head{"s" if shape.heads > 1 else ""}'
    below.text(0.5, -0.06, heads, ha='center', va='top', fontsize=9.5, color=INK)


def made_from(shape: StageShape) -> str:
    """Say of how many tokens a key is made."""
    side = shape.tokens[0] // shape.keys[0]
    return 'one a token' if side == 1 else f'each of {side} x {side} tokens'


def _rectangle(corner, **style):
    from matplotlib.patches import Rectangle

    return Rectangle(corner, **style)


def draw_cost(axes) -> None:
    """Draw the pairs of query and key in one block of each stage, for a detector's image."""
    reduced = stage_shapes('small', *LARGE)
    linear = stage_shapes('b2_li', *LARGE)
    series = (
        ('every token a key, as in a ViT', PLAIN, [_area(s.tokens) ** 2 for s in reduced]),
        (
            'spatial reduction: PVT, PVTv2',
            KEY,
            [_area(s.tokens) * _area(s.keys) for s in reduced],
        ),
        ('linear: PVTv2-B2-Linear', LINEAR, [_area(s.tokens) * _area(s.keys) for s in linear]),
    )
    for offset, (label, colour, pairs) in enumerate(series):
        places = [i + 0.27 * (offset - 1) for i in range(4)]
        bars = axes.bar(places, [p / 1e6 for p in pairs], 0.25, color=colour, label=label)
        texts = [f'{p / 1e6:,.0f}' if p >= 1e7 else f'{p / 1e6:.2g}' for p in pairs]
        axes.bar_label(bars, texts, fontsize=8.5, padding=2, color=INK)
    axes.set_xticks(range(4), [f'stage {i + 1}' for i in range(4)])
    axes.set(yscale='log', ylim=(0.03, 5e4), ylabel='million pairs of query and key')
    axes.set_title(
        f'What one block attends over in an image of {LARGE[0]} x {LARGE[1]}',
        fontsize=10.5,
        color=INK,
    )
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False, loc='upper right', fontsize=9.5)


def _area(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


def draw(arch: str, file: Path) -> None:
    """Draw an arch: its four stages, and the cost of its attention."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(7.8, 8.2), layout='constrained')
    stages, cost = figure.subfigures(2, 1, height_ratios=(2.1, 1.15), hspace=0.03)
    panels = stages.subplots(2, 4)
    for index, shape in enumerate(stage_shapes(arch, SIDE, SIDE)):
        draw_stage(panels[:, index], index, shape)
    version = 'PVT' if arch in PVT.ARCHS else 'PVTv2'
    stages.suptitle(
        f'{version} {arch} on an image of {SIDE} x {SIDE}: each token (blue) attends to all keys '
        '(orange)\n',
        fontsize=12,
        color=INK,
    )
    draw_cost(cost.subplots())
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    archs = (*PVT.ARCHS, *PVTv2.ARCHS)
    parser.add_argument(
        '--arch', choices=archs, default='small', metavar='ARCH', help='(default: %(default)s)'
    )
    parser.add_argument(
        '--out',
        type=Path,
        metavar='FILE.png',
        default=Path('docs/images/architecture.png'),
        help='picture to write (default: %(default)s)',
    )
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    draw(args.arch, args.out)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
