"""Export a trained model to ONNX or to a PyTorch program, and check its numbers.

The batch, the height and the width of the images stay free. The file is written only if it gives
PyTorch's numbers at three sizes.

Example:
    python tools/deployment/export.py configs/fpn_pvt_s_ade20k_40k.py iter_40000.pth fpn.onnx
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config

from pvt_mm import cli
from pvt_mm.apis.inference import Predictor
from pvt_mm.cli import parse_size, print_table
from pvt_mm.config import load_config
from pvt_mm.deploy import export
from pvt_mm.errors import UserError
from pvt_mm.files import atomic_write


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file of mmdet or mmseg kind')
    parser.add_argument('checkpoint', help='weights of the exported part: a file or URL')
    parser.add_argument('out', metavar='OUT', help='the file to write, .onnx or .pt2')
    parser.add_argument(
        '--what',
        choices=('backbone', 'model'),
        default='model',
        help='the backbone alone, or as much of the model as exports (default: model)',
    )
    parser.add_argument(
        '--benchmark',
        nargs='?',
        const='512x512',
        metavar='HxW',
        help='time it beside PyTorch on one image of this size (512x512)',
    )
    parser.add_argument(
        '--int8', action='store_true', help='write OUT_int8.onnx as well; needs --calibration'
    )
    parser.add_argument(
        '--calibration', nargs='+', default=(), metavar='IMAGES', help='image files or folders'
    )
    cli.add_config_options(parser)
    return parser.parse_args()


def check(args: argparse.Namespace, out: Path) -> None:
    """Check the arguments before any time goes into the model."""
    if out.suffix not in export.SUFFIXES:
        raise UserError(f'OUT must end in .onnx or .pt2, not {out.name}.')
    if not out.parent.is_dir():
        raise UserError(f'There is no folder {out.parent}; make it first.')
    if out.is_dir():
        raise UserError(f'{out} is a folder; name a file.')
    if args.int8 != bool(args.calibration):
        raise UserError('--int8 and --calibration IMAGES go together; give both or neither.')
    if args.int8 and out.suffix != '.onnx':
        raise UserError('--int8 is for ONNX; let OUT end in .onnx.')
    export.require(out.suffix[1:])


def describe(cfg: Config, part: export.Part) -> str:
    """Say what the program takes and gives."""
    given = cfg.model.get('data_preprocessor') or {}
    order = 'RGB' if given.get('bgr_to_rgb') else 'BGR'
    return (
        f'Exports {part.about}.\n'
        f'Takes image, float32 of shape (batch, 3, height, width): {order}, normalised by mean '
        f'{given.get("mean")} and std {given.get("std")}.'
    )


def print_numbers(differences: Sequence[export.Difference]) -> None:
    """Print the largest difference of each output at each size."""
    sizes = list(dict.fromkeys(d.size for d in differences))
    cells = {(d.output, d.size): f'{d.largest:.1e}' for d in differences}
    names = dict.fromkeys(d.output for d in differences)
    print(
        f'Largest difference from PyTorch, over the std; {export.TOLERANCE:g} passes, and '
        f'{export.ROUNDING:.1g} of the values for rounding:'
    )
    head = ['output', *('x'.join(map(str, size)) for size in sizes)]
    print_table(head, [[name, *(cells[name, size] for size in sizes)] for name in names])


def print_int8(differences: Sequence[export.Difference], images: int) -> None:
    """Print the error of each output, over the images."""
    print(f'Error of int8 beside fp32, over the std, of {images} images:')
    rows = []
    for name in dict.fromkeys(d.output for d in differences):
        found = [d for d in differences if d.output == name]
        mean = sum(d.rms**2 for d in found) / len(found)
        rows.append([name, f'{mean**0.5:.3f}', f'{max(d.largest for d in found):.2f}'])
    print_table(['output', 'root mean square', 'largest'], rows)


def print_speed(runs: dict[str, export.Run], size: tuple[int, int]) -> None:
    times = export.time_side_by_side(runs, size)
    eager = times['PyTorch']
    height, width = size
    print(
        f'One image of {height}x{width}, {torch.get_num_threads()} threads, median of '
        'alternating runs:'
    )
    rows = [[name, f'{ms:.1f}', f'{eager / ms:.2f}'] for name, ms in times.items()]
    print_table(['program', 'ms', 'times as fast as PyTorch'], rows)


def write(content: bytes, out: Path) -> None:
    try:
        atomic_write(content, out)
    except OSError as error:
        raise UserError(f'Could not write {out}: {error.strerror}.') from error
    print(f'{out}: {len(content) / 1e6:.1f} MB')


@cli.main_errors
def main() -> None:
    args = parse_args()
    out = Path(args.out)
    check(args, out)
    size = parse_size(args.benchmark) if args.benchmark else None
    calibration = export.find_images(args.calibration)
    file_format = out.suffix[1:]
    cfg = load_config(args.config, args.cfg_options)
    predictor = Predictor(cfg, args.checkpoint, 'cpu', whole=args.what == 'model')
    part = export.part_of(predictor.model, args.what)
    images = export.preprocessed(predictor, calibration)
    print(describe(cfg, part))

    content = export.export(part, file_format)
    runs: dict[str, export.Run] = {'PyTorch': part, file_format: export.load(content, file_format)}
    differences = export.compare(part, runs[file_format], export.random_images())
    print_numbers(differences)
    if not export.agrees(differences):
        raise UserError("The exported model does not give PyTorch's numbers; nothing was written.")
    write(content, out)

    if images:
        int8 = export.quantise(content, images)
        runs['int8'] = export.load(int8, file_format)
        print_int8(export.compare(part, runs['int8'], images), len(images))
        write(int8, out.with_name(f'{out.stem}_int8.onnx'))
    if size:
        print_speed(runs, size)


if __name__ == '__main__':
    main()
