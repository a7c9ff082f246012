"""Evaluate a checkpoint of a detector, segmentor or classifier.

Example:
    python tools/test.py configs/retinanet_pvt_s_fpn_1x_coco.py work_dirs/.../epoch_12.pth
"""

import argparse

from pvt_mm import cli
from pvt_mm.datasets.guard import clear_worker_errors
from pvt_mm.engine import build_runner
from pvt_mm.engine.distributed import clear_losses, shutdown_distributed
from pvt_mm.engine.options import enable_tta, show_predictions
from pvt_mm.evaluation.options import keep_predictions


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file of mmdet, mmseg or mmpretrain kind')
    parser.add_argument('checkpoint', help='weights of the whole model: a file or URL')
    parser.add_argument('--work-dir', help='logs (default: work_dirs/CONFIG)')
    parser.add_argument(
        '--out',
        help='keep the predictions: a folder of label maps (one PNG an image) for segmentation, '
        'else a .pkl file',
    )
    parser.add_argument('--show-dir', help='folder for pictures of the predictions')
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation (boxes and segmentation; not instance masks)',
    )
    cli.add_common_arguments(parser)
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    cfg = cli.load_run_config(args)
    cfg.load_from = args.checkpoint
    if args.show_dir:
        show_predictions(cfg, args.show_dir)
    if args.out:
        keep_predictions(cfg, args.out)
    if args.tta:
        enable_tta(cfg)
    runner = build_runner(cfg, config=args.config, train=False)
    with clear_losses('The test'), clear_worker_errors(('test_dataloader',)):
        runner.test()
    shutdown_distributed()


if __name__ == '__main__':
    main()
