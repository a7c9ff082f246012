"""Train a detector, segmentor or classifier from a config.

Example:
    python tools/train.py configs/retinanet_pvt_s_fpn_1x_coco.py --data-root /data/coco
"""

import argparse
import os

from pvt_mm import cli
from pvt_mm.engine import build_runner
from pvt_mm.engine.distributed import shutdown_distributed
from pvt_mm.engine.options import add_tensorboard, enable_amp, enable_auto_scale_lr
from pvt_mm.engine.resume import clear_errors


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file of mmdet, mmseg or mmpretrain kind')
    parser.add_argument('--work-dir', help='logs and checkpoints (default: work_dirs/CONFIG)')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='go on from PATH, or from the newest checkpoint in the work dir if there is one',
    )
    parser.add_argument(
        '--load-from', metavar='PATH', help='start from the weights of a checkpoint'
    )
    parser.add_argument(
        '--amp', action='store_true', help='mixed precision: fp16 on a GPU, bf16 on a CPU'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate to the total batch; iterations stay the config's",
    )
    parser.add_argument(
        '--option',
        nargs='+',
        default=[],
        metavar='NAME',
        help='training options: accumulate, ema, layer_decay, no_decay (docs/training_options.md)',
    )
    parser.add_argument('--seed', type=int, help='seed of all random numbers (default: random)')
    parser.add_argument(
        '--skip-bad-images',
        action='store_true',
        help='warn and take another image where one cannot be loaded (default: stop and name it)',
    )
    parser.add_argument(
        '--deterministic',
        action='store_true',
        help='only operations that give the same numbers each time (docs/resume.md)',
    )
    parser.add_argument(
        '--tensorboard',
        action='store_true',
        help='write losses and scores for TensorBoard too (docs/training_logs.md)',
    )
    cli.add_common_arguments(parser)
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    cfg = cli.load_run_config(args, args.option)
    if args.amp:
        enable_amp(cfg)
    if args.auto_scale_lr:
        enable_auto_scale_lr(cfg)
    if args.tensorboard:
        add_tensorboard(cfg)
    if args.seed is not None:
        cfg.randomness = dict(cfg.get('randomness', {}), seed=args.seed)
    if args.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS needs it
        cfg.randomness = dict(cfg.get('randomness', {}), deterministic=True)
    if args.load_from:
        cfg.load_from = args.load_from
    if args.resume == 'auto':
        cfg.resume = 'auto'
    elif args.resume:
        cfg.resume, cfg.load_from = True, args.resume
    runner = build_runner(cfg, config=args.config, train=True, skip_bad_images=args.skip_bad_images)
    with clear_errors(cfg.work_dir):
        runner.train()
    shutdown_distributed()


if __name__ == '__main__':
    main()
