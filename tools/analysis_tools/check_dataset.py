"""Check a config's data set before training: what is odd, by file, and what training would do.

Reads data sets in COCO's format and those of mmseg, with the config's own loading transforms, on
all cores. Exit code 1 where training would stop on something.

Example:
    python tools/analysis_tools/check_dataset.py configs/fpn_pvt_s_ade20k_40k.py --data-root ade
"""

import argparse
import functools
import sys

from pvt_mm import cli
from pvt_mm.config import LOADERS, load_config
from pvt_mm.datasets import checks
from pvt_mm.datasets.consistency import check_data
from pvt_mm.datasets.label_maps import drop_unread_maps


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file of mmdet or mmseg kind')
    parser.add_argument('--data-root', metavar='DIR', help='where the data set lies, if elsewhere')
    parser.add_argument(
        '--split',
        choices=('train', 'val', 'test', 'all'),
        default='all',
        help='which data set of the config (default: all)',
    )
    parser.add_argument(
        '--all',
        action='store_true',
        help='list every file (default: the first 10 of each kind on which training goes on)',
    )
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    cfg = load_config(args.config, data_root=args.data_root)
    wanted = LOADERS if args.split == 'all' else (f'{args.split}_dataloader',)
    loaders = [loader for loader in wanted if cfg.get(loader)]
    drop_unread_maps(cfg, loaders)
    check_data(cfg, loaders)
    track = functools.partial(cli.track, description='images')
    findings, images = checks.check_config(cfg, args.config, loaders, track)
    print(checks.report(findings, images, None if args.all else 10))
    sys.exit(1 if checks.stops(findings) else 0)


if __name__ == '__main__':
    main()
