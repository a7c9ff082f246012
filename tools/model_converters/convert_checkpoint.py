"""Convert weights of PVT and PVTv2 from any format to another, or say what a file holds.

Weights alone are written: no optimiser, no training state. A whole detector or segmentor keeps its
other parts and its meta data.

Examples:
    python tools/model_converters/convert_checkpoint.py pvt_small.pth small.pth --to huggingface
    python tools/model_converters/convert_checkpoint.py det.pth pvt.pth --to mmdet --backbone-only
    python tools/model_converters/convert_checkpoint.py pvt_small.pth --inspect
"""

import argparse
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pvt_mm import PVT, CheckpointMismatchError, PVTv2, cli, convert_checkpoint
from pvt_mm.archs import MIT_ARCHS
from pvt_mm.checkpoint.convert import bare_backbone
from pvt_mm.checkpoint.find import Found, choose, entries, find
from pvt_mm.checkpoint.key_maps import match
from pvt_mm.checkpoint.load import arch_dict, load_into_backbone
from pvt_mm.checkpoint.safe_load import check_weights, read_checkpoint
from pvt_mm.errors import UserError, naming_file
from pvt_mm.files import atomic_write

SUFFIXES = ('.pth', '.safetensors')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('file', metavar='IN', help='weights: a .pth or .safetensors file')
    parser.add_argument('out', metavar='OUT', nargs='?', help='file to write, of the same kinds')
    parser.add_argument(
        '--to', metavar='FORMAT', help='official, timm, huggingface, mmdet or pvt_mm'
    )
    parser.add_argument(
        '--backbone-only', action='store_true', help='leave out heads, necks and classifiers'
    )
    parser.add_argument('--arch', metavar='A', help='refuse weights of another arch than A')
    parser.add_argument(
        '--prefix', metavar='P', help='of several PVTs in IN, the one whose keys start with P'
    )
    parser.add_argument('--inspect', action='store_true', help='say what IN holds; write nothing')
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Check that the arguments fit together, and that OUT can be written."""
    if args.inspect:
        if args.out or args.to:
            raise UserError('--inspect writes nothing; leave out OUT and --to.')
        return
    if not (args.out and args.to):
        raise UserError('Give OUT and --to FORMAT to convert, or --inspect to look.')
    out = Path(args.out)
    if out.suffix not in SUFFIXES:
        raise UserError(f'OUT must end in {" or ".join(SUFFIXES)}, not {out.name}.')
    if not out.parent.is_dir():
        raise UserError(f'There is no folder {out.parent}; make it first.')
    if out.exists() and Path(args.file).exists() and out.samefile(args.file):
        raise UserError('OUT is IN; name another file.')


def convert(checkpoint: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Convert a checkpoint; what comes back owns its memory, as safetensors asks."""
    weights = checkpoint
    if args.backbone_only:
        weights = bare_backbone(checkpoint, args.arch, args.prefix)
    try:
        tensors = convert_checkpoint(weights, args.to, args.arch, args.prefix)
    except ValueError as error:
        raise UserError(str(error)) from error
    owned = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    if isinstance(checkpoint.get('meta'), dict) and not args.backbone_only:
        return {'meta': checkpoint['meta'], 'state_dict': owned}
    return owned


def write(checkpoint: dict[str, Any], out: Path) -> None:
    """Write a checkpoint; there is never half a file."""
    try:
        if out.suffix == '.pth':
            content = io.BytesIO()
            torch.save(checkpoint, content)
            atomic_write(content.getvalue(), out)
        else:
            atomic_write(as_safetensors(checkpoint.get('state_dict', checkpoint)), out)
    except OSError as error:
        raise UserError(f'Could not write {out}: {error.strerror}.') from error


def as_safetensors(tensors: dict[str, Any]) -> bytes:
    """Return the content of a .safetensors file."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise UserError('Writing .safetensors needs a package: pip install safetensors.') from error
    return save(tensors, metadata={'format': 'pt'})


def inspect(
    checkpoint: dict[str, Any], arch: str | None = None, prefix: str | None = None
) -> Iterator[tuple[str, str]]:
    """Yield what a checkpoint holds, as pairs of a title and a text."""
    plain = bare_backbone(checkpoint, arch, prefix)
    found = find(checkpoint)
    choice, reason = choose(found, prefix=prefix)
    parameters = sum(tensor.numel() for tensor in plain.values())
    yield 'format', choice.fmt.name
    yield 'arch', str(choice.arch)
    yield 'backbone', f'{len(plain)} tensors, {parameters / 1e6:.2f} M parameters'
    yield 'prefix', (choice.prefix or 'none') + (f': {reason}' if reason else '')
    yield 'would load', loading_report(plain, choice)
    rest = [key for key in entries(checkpoint, choice.wrapper) if key not in choice.keys]
    outer = choice.root.removesuffix(choice.inner)
    others = Counter(key.removeprefix(outer).split('.')[0] for key in rest)
    unknown = [key for key in choice.tensors if not match(key, choice.fmt)]
    yield 'others', ', '.join(f'{n} in {name}' for name, n in others.items()) or 'none'
    yield 'unknown', f'{len(unknown)} keys, such as {unknown[0]}' if unknown else 'none'
    also = [f'{other.prefix} ({other.arch})' for other in found if other.prefix != choice.prefix]
    if also:
        yield 'also there', ', '.join(also)


def loading_report(plain: dict[str, Any], choice: Found) -> str:
    """Load the weights into the backbone of their arch, without memory, and say what came of it."""
    found = choice.arch
    if found is None or found.name is None:
        return 'into no published arch; whole weights of a custom one into its own arch=dict(...)'
    backbone = PVTv2 if found.version == 'PVTv2' else PVT
    arch = MIT_ARCHS.get(found.name, found.name)
    first = plain.get('stages.0.patch_embed.proj.weight')
    with torch.device('meta'):
        model = backbone(arch, in_channels=3 if first is None else first.shape[1])
    weights = {key: tensor.to('meta') for key, tensor in choice.tensors.items()}
    name = f'PVTv2 with {arch_dict(found)}' if found.is_mit else backbone.__name__
    try:
        return load_into_backbone(weights, '', model.state_dict(), name)
    except CheckpointMismatchError as error:
        return f'no. {error}'


@cli.main_errors
def main() -> None:
    args = parse_args()
    check_args(args)
    checkpoint = read_checkpoint(args.file)
    check_weights(checkpoint, args.file)
    with naming_file(args.file):
        if args.inspect:
            for title, text in inspect(checkpoint, args.arch, args.prefix):
                print(f'{title:<11} {text}')
            return
        converted = convert(checkpoint, args)
    write(converted, Path(args.out))
    count = len(converted.get('state_dict', converted))
    print(f'{args.file} -> {args.out}: {count} tensors in {args.to} format')


if __name__ == '__main__':
    main()
