"""Parameters and multiply-adds of backbones over input sizes: PVT beside ResNet, Swin and ViT.

Every matmul is counted, those of the attention included; norms, activations and softmax are not, as
in the papers, whose "FLOPs" are multiply-adds. Nothing is computed: the models run on PyTorch's
meta device, so that large images cost nothing.

Example:
    python tools/analysis_tools/get_flops.py --sizes 224 800x1344 --csv flops.csv --plot flops.png
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from mmengine.registry import MODELS
from torch import nn

from pvt_mm import PVTv2, cli
from pvt_mm.apis.complexity import Size, build_on_meta, multiply_adds
from pvt_mm.errors import UserError

#: Billions of multiply-adds at 224 x 224 in the papers' tables.
PUBLISHED = {
    'tiny': 1.9,
    'small': 3.8,
    'medium': 6.7,
    'large': 9.8,
    'b0': 0.6,
    'b1': 2.1,
    'b2': 4.0,
    'b2_li': 3.9,
    'b3': 6.9,
    'b4': 10.1,
    'b5': 11.8,
}
_SWIN = dict(type='mmdet.SwinTransformer', embed_dims=96, num_heads=(3, 6, 12, 24))
_VIT_S = dict(type='mmseg.VisionTransformer', img_size=224, embed_dims=384, num_heads=6)
#: What stands beside PVT, from the installed mmdet and mmseg. A ViT has one scale: its patch size.
OTHERS = {
    'ResNet-50': dict(type='mmdet.ResNet', depth=50),
    'ResNet-101': dict(type='mmdet.ResNet', depth=101),
    'Swin-T': dict(_SWIN, depths=(2, 2, 6, 2)),
    'Swin-S': dict(_SWIN, depths=(2, 2, 18, 2)),
    'ViT-S/32': dict(_VIT_S, patch_size=32),
    'ViT-S/16': dict(_VIT_S, patch_size=16),
    'ViT-S/8': dict(_VIT_S, patch_size=8),
}
NAMES = (*PUBLISHED, *OTHERS)
PLOTTED = ('small', 'b2', 'b2_li', 'ResNet-50', 'Swin-T', 'ViT-S/16', 'ViT-S/8')
SIZES = ('224x224', '448x448', '800x1344', '1344x1344')


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def build(name: str) -> nn.Module:
    """Build a backbone on the meta device."""
    if name not in OTHERS:
        return build_on_meta(name)
    model = MODELS.build(dict(OTHERS[name])).to('meta')  # Swin cannot be built there
    model.eval()  # on a line of its own: mmdet's ResNet returns None
    return model


def plot(path: str, count: Callable[[str, Size], int]) -> None:
    """Draw the cost over the size of a square image, in total and per megapixel."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    sides = range(224, 1569, 224)
    figure, (total, relative) = plt.subplots(1, 2, figsize=(10, 4.2), layout='constrained')
    for name in PLOTTED:
        billions = [count(name, (side, side)) / 1e9 for side in sides]
        style = dict(marker='o', markersize=3.5, linestyle='-' if name in PUBLISHED else '--')
        label = f'PVT{"v2" if name in PVTv2.ARCHS else ""} {name}' if name in PUBLISHED else name
        total.plot(sides, billions, label=label, **style)
        relative.plot(sides, [b / (s * s / 1e6) for b, s in zip(billions, sides)], **style)
    total.set(yscale='log', ylabel='billion multiply-adds')
    relative.set(yscale='log', ylabel='billion multiply-adds per megapixel')
    for axes in (total, relative):
        axes.set_xticks(sides)
        axes.set_xlabel('side of a square image in pixels')
        axes.grid(alpha=0.3, which='both')
        axes.spines[['top', 'right']].set_visible(False)
    figure.legend(loc='outside right center', frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--names', nargs='+', default=NAMES, help=f'of {", ".join(NAMES)} (default: all)'
    )
    parser.add_argument(
        '--sizes', nargs='+', default=SIZES, help=f'height x width (default: {" ".join(SIZES)})'
    )
    parser.add_argument('--csv', metavar='FILE', help='write the table to a file as well')
    parser.add_argument('--plot', metavar='FILE.png', help='draw the cost over the image size')
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        raise UserError(f'There is no backbone {unknown[0]!r}; choose of {", ".join(NAMES)}.')
    sizes = [cli.parse_size(size) for size in args.sizes]
    models = {name: build(name) for name in dict.fromkeys([*args.names, *PLOTTED])}
    head = ['backbone', 'parameters, million', 'published at 224']
    head += [f'{height}x{width}' for height, width in sizes]
    rows = []
    for name in args.names:
        counts = [f'{multiply_adds(models[name], size) / 1e9:.2f}' for size in sizes]
        millions = f'{parameters(models[name]) / 1e6:.1f}'
        rows.append([name, millions, str(PUBLISHED.get(name, '-')), *counts])
    print('Billion multiply-adds of one image, by height x width:')
    cli.print_table(head, rows)
    if args.csv:
        cli.write_csv(args.csv, head, rows)
    if args.plot:
        Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
        plot(args.plot, lambda name, size: multiply_adds(models[name], size))


if __name__ == '__main__':
    main()
