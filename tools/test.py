"""Evaluate a checkpoint of a detector, segmentor or classifier.

Example:
    python tools/test.py configs/retinanet_pvt_s_fpn_1x_coco.py work_dirs/.../epoch_12.pth
"""

import argparse
import os

from mmengine.runner import Runner

from pvt_mm import cli, data_guard, progress, runtime


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
    cfg = cli.load_config(args.config, args.cfg_options, args.data_root)
    task = cli.task_of(cfg, cli.CODEBASES)
    cli.check_data(cfg, ('test_dataloader',))
    data_guard.check_classes(cfg, args.config, ('test_dataloader',))
    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', '0')
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.work_dir:
        cfg.work_dir = args.work_dir
    if args.fast_coco_eval:
        cli.use_fast_coco_eval(cfg)
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
    runner = Runner.from_cfg(cfg)
    data_guard.guard_loading(runner, args.config)
    progress.fit_log_interval(runner, len(runner.test_dataloader))
    runner.test()
    runtime.leave_together()


if __name__ == '__main__':
    main()
