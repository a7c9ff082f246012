"""Evaluate a checkpoint of a detector, segmentor or classifier.

Example:
    python tools/test.py configs/retinanet_pvt_s_fpn_1x_coco.py work_dirs/.../epoch_12.pth
"""

import argparse
import os

from mmengine.runner import Runner

from pvt_mm import cli
from pvt_mm.config import CODEBASES, load_config, task_of
from pvt_mm.datasets import guard
from pvt_mm.datasets.consistency import check_classes, check_data
from pvt_mm.engine import runtime
from pvt_mm.engine.distributed import shutdown_distributed
from pvt_mm.engine.options import (
    add_checkpoint_hook,
    check_checkpoint,
    enable_tta,
    keep_predictions,
    show_predictions,
    use_fast_coco_eval,
    without_pretrained,
)
from pvt_mm.engine.runner import fit_log_interval


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
    cfg = load_config(args.config, args.cfg_options, args.data_root)
    task = task_of(cfg, CODEBASES)
    check_data(cfg, ('test_dataloader',))
    check_classes(cfg, args.config, ('test_dataloader',))
    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', '0')
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.work_dir:
        cfg.work_dir = args.work_dir
    if args.fast_coco_eval:
        use_fast_coco_eval(cfg)
    if args.show_dir:
        show_predictions(cfg, args.show_dir)
    if args.out:
        keep_predictions(cfg, args.out)
    if args.tta:
        enable_tta(cfg, task)
    check_checkpoint(args.checkpoint)
    # The checkpoint brings the backbone's weights; published ones need not be fetched for it.
    without_pretrained(cfg)
    add_checkpoint_hook(cfg, whole=True)
    runtime.setup(cfg)
    runner = Runner.from_cfg(cfg)
    guard.guard_loading(runner, args.config)
    fit_log_interval(runner, len(runner.test_dataloader))
    runner.test()
    shutdown_distributed()


if __name__ == '__main__':
    main()
