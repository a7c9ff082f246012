"""Evaluate a checkpoint of a detector or segmentor.

Example:
    python tools/test.py configs/retinanet_pvt_s_fpn_1x_coco.py work_dirs/.../epoch_12.pth
"""

import argparse
import os

from mmengine.runner import Runner

from pvt_mm import cli, runtime


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file of mmdet or mmseg kind')
    parser.add_argument('checkpoint', help='weights of the whole model: a file or URL')
    parser.add_argument('--work-dir', help='logs (default: work_dirs/CONFIG)')
    parser.add_argument(
        '--out',
        help='keep the predictions: a .pkl file for detection, a folder of label maps (one PNG an '
        'image) for segmentation',
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
    cfg = cli.load_config(args.config, args.cfg_options, args.data_root)
    task = cli.task_of(cfg)
    cli.check_data(cfg, ('test_dataloader',))
    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', '0')
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.work_dir:
        cfg.work_dir = args.work_dir
    if args.show_dir:
        cli.show_predictions(cfg, args.show_dir)
    if args.out:
        cli.keep_predictions(cfg, args.out)
    if args.tta:
        cli.enable_tta(cfg, task)
    cli.check_checkpoint(args.checkpoint)
    # The checkpoint brings the backbone's weights; published ones need not be fetched for it.
    cli.without_pretrained(cfg)
    cli.add_checkpoint_hook(cfg, whole=True)
    runtime.setup(cfg)
    Runner.from_cfg(cfg).test()
    runtime.leave_together()


if __name__ == '__main__':
    main()
