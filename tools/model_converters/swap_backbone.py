r"""Write a config of mmdet or mmseg again, with a PVT in place of its backbone.

The written config stands alone and begins with a list of what was changed.

Examples:
    python tools/model_converters/swap_backbone.py mmdet::atss/atss_r50_fpn_1x_coco.py \
        --arch v2_b2 -o my_config.py
    python tools/model_converters/swap_backbone.py \
        mmdet::pvt/retinanet_pvtv2-b2_fpn_1x_coco.py -o my_config.py
"""

import argparse
from pathlib import Path

from pvt_mm import cli
from pvt_mm.apis import swap
from pvt_mm.errors import UserError

ARCHS = {
    f'{prefix}{arch}': dict(type=name, arch=arch)
    for name, prefix in (('PVT', ''), ('PVTv2', 'v2_'))
    for arch in swap.ARCHS[name]
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='a file, or a name such as mmseg::upernet/FILE.py')
    parser.add_argument(
        '--arch',
        help=f"one of {', '.join(ARCHS)} (default: that of the config's own PVT, or of mmdet's)",
    )
    parser.add_argument('-o', '--out', required=True, metavar='FILE.py', help='where to write')
    parser.add_argument(
        '--allow-stride-change',
        action='store_true',
        help='swap a dilated backbone too: its levels become coarser, stride 8 becomes 32',
    )
    parser.add_argument(
        '--keep-optimizer', action='store_true', help='keep SGD and its learning rate'
    )
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    if args.arch not in (None, *ARCHS):
        raise UserError(f'There is no --arch {args.arch}; choose one of {", ".join(ARCHS)}.')
    out = Path(args.out)
    if out.suffix != '.py' or not out.absolute().parent.is_dir():
        raise UserError(f'-o {out}: name a .py file in a folder that exists.')
    swapped = swap.swap_with_changes(
        args.config,
        ARCHS.get(args.arch),
        allow_stride_change=args.allow_stride_change,
        keep_optimizer=args.keep_optimizer,
    )
    swap.write(swapped, out, args.config)
    for change in swapped.changes:
        print(f'- {change}')
    print(f'wrote {out}')


if __name__ == '__main__':
    main()
