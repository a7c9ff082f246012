"""Speed of whole detectors and segmentors with this backbone and with mmdet's own.

A config's model is built twice: as it is, and with mmdet's PVT and the same weights for its
backbone. Both work in turn on generated images of the config's size with eight objects each, of
random classes; reading files is the same for both and left out. `test` is what tools/test.py does
with a batch of images, `train` a whole step with the config's optimiser, both in seconds; a
backbone's share of them is its time alone on the same images. `start` is a fresh process, from its
start to the end of the import, or of the first training step. Weights are random, so there are
fewer boxes to suppress than in practice.

Example:
    python tools/benchmark/benchmark_e2e.py --configs configs/fpn_pvt_s_ade20k_40k.py --csv e2e.csv
"""

import argparse
import functools
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_machine as machine
import torch
from benchmark_peers import OURS, has_arch, mmdet_config
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from pvt_mm import cli, convert_checkpoint
from pvt_mm.cli import parse_size, print_table, write_csv
from pvt_mm.config import load_config, task_of
from pvt_mm.engine import runtime
from pvt_mm.engine.options import without_pretrained
from pvt_mm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = (
    'retinanet_pvt_s_fpn_1x_coco.py',
    'mask_rcnn_pvt_s_fpn_1x_coco.py',
    'fpn_pvt_s_ade20k_40k.py',
)
WORKS = ('test', 'train', 'start')
SIDES = (OURS, 'mmdet')
SIZES = {'mmdet': '800x1344', 'mmseg': '512x512'}
OBJECTS = 8


def load(path: str) -> Config:
    """Load a config for a run without weights; no path is dropped, so that both sides agree."""
    cfg = load_config(path)
    if cfg.model.backbone.type not in ('PVT', 'PVTv2'):
        raise UserError(f'{path} has the backbone {cfg.model.backbone.type}; give one with a PVT.')
    runtime.setup(cfg)
    without_pretrained(cfg)
    cfg.model.backbone.drop_path_rate = 0.0
    return cfg


def build(cfg: Config, side: str) -> Any:
    """Build a config's model with one side's backbone; the weights are the same on both."""
    init_default_scope(task_of(cfg))
    torch.manual_seed(0)
    ours = MODELS.build(cfg.model)
    ours.init_weights()
    if side == OURS:
        return ours
    arch = cfg.model.backbone.arch
    if not isinstance(arch, str) or not has_arch('mmdet', arch):
        raise UserError(f'mmdet has no {arch} to compare with; choose another config.')
    backbone = dict(mmdet_config(arch), drop_path_rate=0.0)
    backbone['out_indices'] = cfg.model.backbone.get('out_indices', (0, 1, 2, 3))
    model = MODELS.build(dict(cfg.model, backbone=backbone))
    model.load_state_dict(convert_checkpoint(ours.state_dict(), to='mmdet'))
    return model


def make_batch(task: str, size: str, batch: int) -> dict[str, Any]:
    """Draw images with annotations, as a data loader would give them."""
    height, width = parse_size(size)
    if task == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        shapes = [(3, height, width)] * batch
        return demo_mm_inputs(batch, shapes, [OBJECTS] * batch, num_classes=80, with_mask=True)
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)
    meta = dict(img_shape=(height, width), ori_shape=(height, width))
    samples = [SegDataSample(metainfo=dict(meta)) for _ in range(batch)]
    for sample in samples:
        labels = torch.randint(OBJECTS, (1, height, width), generator=generator)
        sample.gt_sem_seg = PixelData(data=labels)
    return dict(inputs=list(images), data_samples=samples)


def step(cfg: Config, model: Any, data: dict[str, Any], work: str) -> Callable[[], Any]:
    """Return what does a test or training step of a whole model."""
    model.train(work == 'train')
    if work == 'test':
        return torch.no_grad()(functools.partial(model.test_step, data))
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    return functools.partial(model.train_step, data, optim_wrapper)


def backbone_step(model: Any, image: torch.Tensor, work: str) -> Callable[[], Any]:
    """Return what does the backbone's part of a step, on an image that is ready for it."""

    def run() -> None:
        with torch.set_grad_enabled(work == 'train'):
            outs = model.backbone(image)
            if work == 'train':
                sum(out.mean() for out in outs).backward()
        model.zero_grad(set_to_none=True)

    return run


def check_equal(models: dict[str, Any], image: torch.Tensor) -> None:
    """Compare the features that reach the heads.

    Raises:
        UserError: Where they differ.
    """
    with torch.no_grad():
        pairs = zip(*(model.eval().extract_feat(image) for model in models.values()), strict=True)
        for ours, theirs in pairs:
            if (ours - theirs).square().mean().sqrt() > 1e-3 * theirs.std():
                raise UserError('The two models differ, so they are not timed; run the tests.')


def measure(path: str, work: str, args: argparse.Namespace) -> list[str]:
    """Time the steps of both sides in turn and return a row of the table."""
    cfg = load(path)
    size = args.size or SIZES[task_of(cfg)]
    models = {side: build(cfg, side) for side in SIDES}
    data = make_batch(task_of(cfg), size, args.batch)
    image = models[OURS].data_preprocessor(data, training=work == 'train')['inputs']
    check_equal(models, image)
    times: dict[str, list[float]] = {}
    works = {side: step(cfg, model, data, work) for side, model in models.items()}
    alone = {side: backbone_step(model, image, work) for side, model in models.items()}
    others = machine.OtherLoad()
    for _ in range(args.runs + 1):
        for side in SIDES:
            times.setdefault(side, []).append(machine.seconds(works[side], 'cpu'))
            times.setdefault(f'{side} backbone', []).append(machine.seconds(alone[side], 'cpu'))
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    shares = [f'{median[f"{side} backbone"] / median[side]:.0%}' for side in SIDES]
    rates = [f'{args.batch / median[side]:.2f}' for side in SIDES]
    return row(Path(path).stem, f'{work} {args.batch}x{size}', median, rates + shares, others)


def row(
    name: str,
    work: str,
    median: dict[str, float],
    columns: list[str],
    others: machine.OtherLoad,
) -> list[str]:
    """Format a row of the table."""
    ours, mmdet = (median[side] for side in SIDES)
    load = f'{others.cores():.2f}{" DISTURBED" if others.cores() > machine.BUSY else ""}'
    return [name, work, f'{ours:.3f}', f'{mmdet:.3f}', f'{mmdet / ours:.2f}', *columns, load]


def measure_start(path: str, args: argparse.Namespace) -> list[list[str]]:
    """Time fresh processes: of the imports, and of all up to the end of a first training step."""
    command = [sys.executable, __file__, '--configs', path, '--batch', str(args.batch)]
    command += ['--size', args.size] if args.size else []
    commands = {side: [*command, '--first-step', side] for side in SIDES}
    imports = {
        OURS: [sys.executable, '-c', 'import pvt_mm'],
        'mmdet': [sys.executable, '-c', 'import mmdet.models.backbones'],
    }
    rows = []
    for work, processes in (('import', imports), ('start to first step', commands)):
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        others = machine.OtherLoad()
        for _ in range(min(args.runs, 3)):
            for side, process in processes.items():
                run = functools.partial(subprocess.run, process, check=True, capture_output=True)
                times[side].append(machine.seconds(run, 'cpu'))
        median = {side: statistics.median(values) for side, values in times.items()}
        rows.append(row(Path(path).stem, work, median, ['-'] * 4, others))
    return rows


def first_step(path: str, side: str, args: argparse.Namespace) -> None:
    """Do one training step."""
    cfg = load(path)
    data = make_batch(task_of(cfg), args.size or SIZES[task_of(cfg)], args.batch)
    step(cfg, build(cfg, side), data, 'train')()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [str(ROOT / 'configs' / name) for name in CONFIGS]
    parser.add_argument(
        '--configs', nargs='+', default=default, help=f'(default: {" ".join(CONFIGS)})'
    )
    parser.add_argument('--works', nargs='+', choices=WORKS, default=WORKS, help='(default: all)')
    parser.add_argument('--size', help='of images (default: 800x1344; 512x512 in segmentation)')
    parser.add_argument('--batch', type=int, default=1, help='images per step (default: 1)')
    parser.add_argument('--runs', type=int, default=5, help='rounds (default: 5)')
    parser.add_argument('--csv', metavar='FILE', help='write the table to a file as well')
    parser.add_argument('--anyway', action='store_true', help='measure on a busy machine too')
    parser.add_argument('--first-step', choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


@cli.main_errors
def main() -> None:
    args = parse_args()
    MMLogger.get_current_instance().setLevel('ERROR')  # else each parameter's init is printed
    if args.first_step:
        first_step(args.configs[0], args.first_step, args)
        return
    if not args.anyway:
        machine.check_idle()
    print(machine.describe('cpu'), flush=True)
    rows = []
    for path in args.configs:
        for work in args.works:
            rows += measure_start(path, args) if work == 'start' else [measure(path, work, args)]
            print('  '.join(rows[-1]), flush=True)
    head = ['config', 'work', f'{OURS} s', 'mmdet s', 'ratio']
    head += [f'{OURS} images/s', 'mmdet images/s', f"{OURS}'s share", "mmdet's share", 'other load']
    print_table(head, rows)
    if args.csv:
        write_csv(args.csv, head, rows)


if __name__ == '__main__':
    main()
