"""State dicts from one format to another, and into a backbone's own tensors: pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pvt_mm.archs import PVT_ARCHS, PVT_V2_ARCHS
from pvt_mm.checkpoint.key_maps import (
    CLASSIFICATION_PARTS,
    FORMATS,
    MLP_LINEARS,
    PVT_MM,
    Atom,
    Format,
    detect_format,
    match,
)
from pvt_mm.errors import CheckpointMismatchError

BACKBONE = 'backbone.'


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict inside a checkpoint, without its wrappers' names.

    It is looked for in ``state_dict_ema``, ``state_dict`` and ``model``; keys lose ``module.``.
    """
    for name in ('state_dict_ema', 'state_dict', 'model'):
        if isinstance(checkpoint.get(name), Mapping):
            return unwrap(checkpoint[name])
    return {key.removeprefix('module.'): value for key, value in checkpoint.items()}


def split_backbone(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a whole model's tensors into those under ``backbone.``, without it, and the rest."""
    rest = {key: value for key, value in tensors.items() if not key.startswith(BACKBONE)}
    own = {key.removeprefix(BACKBONE): tensors[key] for key in tensors if key not in rest}
    return own, rest


def to_atoms(state_dict: Mapping[str, Tensor], fmt: Format) -> dict[Atom, Tensor]:
    """Split a state dict of one format into atoms; keys that the format does not know are left out.

    A position embedding becomes (1, H*W, C), or (1, H, W, C) where the format stores the grid. The
    slot of the class token becomes an atom of its own, ``cls_position``.

    Raises:
        CheckpointMismatchError: Where a tensor has another number of dimensions than its layer's.
    """
    atoms: dict[Atom, Tensor] = {}
    for key, tensor in state_dict.items():
        held = match(key, fmt)
        if not held:
            continue
        rank = getattr(tensor, 'ndim', 0)
        if fmt.conv_mlp and held[0].part in MLP_LINEARS and rank == 4:
            tensor, rank = tensor.flatten(1), 2  # (out, in, 1, 1): linear
        if rank not in _ranks(held[0]):
            raise CheckpointMismatchError(
                f'{key} is {tuple(tensor.shape) if rank else "no tensor of a layer"}, which does '
                'not fit any PVT.'
            )
        atoms.update(zip(held, tensor.chunk(len(held)) if len(held) > 1 else (tensor,)))
    _split_class_position(atoms)
    return atoms


def _ranks(atom: Atom) -> Sequence[int]:
    """Return how many dimensions a tensor may have."""
    name = atom.part.rpartition('.')[2]
    if not atom.leaf:
        return (3, 4)  # position embeddings, class token
    if atom.leaf == 'bias' or 'norm' in name:
        return (1,)
    if name == 'sr':
        return (2, 4)  # linear behind pooling, or a convolution
    return (4,) if atom.part == 'patch_embed.proj' or name == 'dwconv' else (2,)


def _split_class_position(atoms: dict[Atom, Tensor]) -> None:
    """Split the class token's slot, which is the first, off a position embedding of H*W + 1."""
    last = _last_position(atoms)
    atom = Atom('pos_embed', last)
    position = atoms.get(atom)
    if position is None or position.ndim != 3:
        return
    before = atoms.get(Atom('pos_embed', last - 1))
    tokens = position.shape[1]
    # Each stage halves the grid; without the stage before, a square grid tells.
    odd = before is not None and before.ndim == 3 and before.shape[1] == 4 * (tokens - 1)
    if odd or (not _is_square(tokens) and _is_square(tokens - 1)):
        atoms[Atom('cls_position')], atoms[atom] = position[:, :1], position[:, 1:]


def _last_position(atoms: Mapping[Atom, Any]) -> int:
    return max((atom.stage for atom in atoms if atom.part == 'pos_embed'), default=-1)


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def _position_grid(position: Tensor, like: Sequence[int] | None) -> Tensor:
    """Reshape a position embedding to a grid: of ``like``'s aspect ratio if it fits, or a square.

    Shape:
        position: (1, N, C) or (1, H, W, C) -> (1, H, W, C).
    """
    if position.ndim == 4:
        return position
    tokens = position.shape[1]
    if like is not None:
        height = round(math.sqrt(tokens * like[0] / like[1]))
        if height and tokens % height == 0 and height * like[1] * height == tokens * like[0]:
            return position.unflatten(1, (height, tokens // height))
    if not _is_square(tokens):
        raise CheckpointMismatchError(
            f'A position embedding of {tokens} tokens is no square, and nothing tells its height; '
            'give the backbone the pretrain_img_size=(height, width) of these weights.'
        )
    side = math.isqrt(tokens)
    return position.unflatten(1, (side, side))


def resize_grid(grid: Tensor, height: int, width: int) -> Tensor:
    """Resize a grid of vectors bilinearly, as the reference does with position embeddings.

    Shape:
        grid: (1, h, w, C) -> (1, height, width, C).
    """
    image = grid.permute(0, 3, 1, 2)  # (1, C, h, w)
    image = F.interpolate(image, size=(height, width), mode='bilinear', align_corners=False)
    return image.permute(0, 2, 3, 1)  # (1, height, width, C)


def backbone_tensors(
    atoms: Mapping[Atom, Tensor], target: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Join atoms to a backbone's own tensors; position embeddings are resized to the target's.

    Args:
        atoms: As ``to_atoms`` gives them.
        target: The backbone's state dict; only names and shapes are read.

    Returns:
        Those tensors of ``target``, by name, whose atoms are all there.
    """
    tensors = {}
    for key, own in target.items():
        parts = [atoms.get(atom) for atom in match(key, PVT_MM)]
        found = [part for part in parts if part is not None]
        if not found or len(found) < len(parts):
            continue
        tensor = found[0] if len(found) == 1 else torch.cat(found)
        if key.endswith('pos_embed'):
            tensor = _position_grid(tensor, own.shape[1:3])
            if tensor.shape != own.shape and tensor.shape[-1] == own.shape[-1]:
                tensor = resize_grid(tensor, *own.shape[1:3])
        tensors[key] = tensor
    return tensors


def from_atoms(atoms: Mapping[Atom, Tensor], fmt: Format) -> dict[str, Tensor]:
    """Write atoms in a format; what the format has no name for is left out.

    Raises:
        CheckpointMismatchError: Where a tensor that the format joins with others lacks one of them.
    """
    state_dict = {}
    for parts, template in fmt.rows.items():
        for atom in [atom for atom in atoms if atom.part == parts[0]]:
            joined = [atom._replace(part=part) for part in parts]
            if not all(each in atoms for each in joined):
                raise CheckpointMismatchError(
                    f'Block {atom.block} of stage {atom.stage} lacks one of {", ".join(parts)}; '
                    'the weights are not whole.'
                )
            tensors = [atoms[each] for each in joined]
            tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            if fmt.conv_mlp and atom.part in MLP_LINEARS and atom.leaf == 'weight':
                tensor = tensor[:, :, None, None]
            if atom.part == 'pos_embed':
                tensor = _write_position(tensor, atoms, atom, fmt)
            state_dict[_write_key(template, atom, fmt)] = tensor
    return state_dict


def _write_position(
    position: Tensor, atoms: Mapping[Atom, Tensor], atom: Atom, fmt: Format
) -> Tensor:
    if fmt.grid_position:
        return _position_grid(position, None)
    flat = position.flatten(1, -2)  # (1, H*W, C)
    slot = atoms.get(Atom('cls_position'))
    if slot is None or atom.stage < _last_position(atoms) or ('cls_token',) not in fmt.rows:
        return flat
    return torch.cat([slot, flat], 1)


def _write_key(template: str, atom: Atom, fmt: Format) -> str:
    key = template.format(
        stage=atom.stage + fmt.first_stage, block=atom.block + fmt.first_block, leaf=atom.leaf
    )
    if fmt.alias and key.startswith(fmt.alias[1]):
        key = fmt.alias[0] + key.removeprefix(fmt.alias[1])
    return key if atom.part == 'head' else fmt.prefix + key


def convert_checkpoint(
    state_dict: Mapping[str, Any], to: str = 'pvt_mm', arch: str | None = None
) -> dict[str, Tensor]:
    """Convert published weights from whatever format they are in.

    Args:
        state_dict: Weights in any of the formats, or a checkpoint that wraps them. Of a whole
            detector or segmentor, what is under ``backbone.`` is converted and the rest kept.
        to: ``'pvt_mm'``, ``'official'``, ``'timm'``, ``'huggingface'`` or ``'mmdet'``.
        arch: Such as ``'small'`` or ``'b2'``: refuse weights of another one.

    Returns:
        The same tensors under the other format's names. mmdet has no classifier: head, final norm
        and class token are left out.

    Raises:
        CheckpointMismatchError: Where the format is not recognised, or the arch is not ``arch``.
        ValueError: Where ``to`` cannot express the weights.
    """
    tensors = unwrap(state_dict)
    backbone, rest = split_backbone(tensors)
    source = backbone or tensors
    fmt = detect_format(list(source))
    if fmt is None:
        raise CheckpointMismatchError('These weights hold no PVT backbone in any known format.')
    atoms = to_atoms(source, fmt)
    found = recognise_arch(atoms)
    if arch is not None and (found is None or found.name != arch):
        raise CheckpointMismatchError(f'These weights are of {found}, not of {arch!r}.')
    converted = from_atoms(atoms, _target_format(to, found))
    if not backbone:
        return converted
    return {f'{BACKBONE}{key}': value for key, value in converted.items()} | rest


def bare_backbone(state_dict: Mapping[str, Any], arch: str | None = None) -> dict[str, Tensor]:
    """Convert a backbone's or classifier's weights to pvt_mm's format, without the classifier.

    Arguments and errors are those of ``convert_checkpoint``.
    """
    converted = convert_checkpoint(state_dict, 'pvt_mm', arch)
    return {
        key: tensor
        for key, tensor in converted.items()
        if match(key, PVT_MM)[0].part not in CLASSIFICATION_PARTS
    }


def _target_format(name: str, arch: Arch | None) -> Format:
    formats = [fmt for fmt in FORMATS if fmt.name == name]
    if not formats:
        names = ', '.join(dict.fromkeys(fmt.name for fmt in FORMATS))
        raise ValueError(f'There is no format {name!r}; choose one of {names}.')
    v2 = arch is not None and arch.version == 'PVTv2'
    if name == 'timm' and not v2:
        raise ValueError('timm has only PVTv2, so weights of the first version cannot go there.')
    if name == 'mmdet' and arch is not None and arch.linear:
        raise ValueError("mmdet's PVT has no linear attention, so b2_li cannot go there.")
    return formats[-1] if v2 else formats[0]


class Arch(NamedTuple):
    """An architecture, as far as its weights show it."""

    version: str
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    linear: bool

    @property
    def name(self) -> str | None:
        """The published name, such as ``'small'`` or ``'b2'``; None where it has none."""
        return next((name for name, arch in _PUBLISHED.items() if arch == self), None)

    def __str__(self) -> str:
        """Return a short description for messages."""
        linear = ', linear attention' if self.linear else ''
        layout = f'depths {self.depths}, widths {self.dims}{linear}'
        return f'{self.version} {self.name or "of no published arch"} ({layout})'


_PUBLISHED = {
    name: Arch(version, arch['dims'], arch['depths'], arch.get('linear', False))
    for version, archs in (('PVT', PVT_ARCHS), ('PVTv2', PVT_V2_ARCHS))
    for name, arch in archs.items()
}


def recognise_arch(atoms: Mapping[Atom, Any]) -> Arch | None:
    """Recognise an architecture by depths and widths; None where there is no patch embedding.

    Args:
        atoms: Tensors, or anything with a ``shape``, by atom.
    """
    norms = {atom.stage: norm for atom, norm in atoms.items() if atom.part == 'patch_embed.norm'}
    dims = {stage: norm.shape[0] for stage, norm in norms.items()}
    if not dims:
        return None
    blocks = {(atom.stage, atom.block) for atom in atoms if atom.block >= 0}
    depths = Counter(stage for stage, _ in blocks)
    v2 = any(atom.part == 'blocks.mlp.dwconv' for atom in atoms)
    # Linear attention reduces by pooling: its sr is a convolution of 1x1.
    reductions = [
        t for atom, t in atoms.items() if atom.part == 'blocks.attn.sr' and not atom.stage
    ]
    linear = any(weight.ndim == 4 and weight.shape[-1] == 1 for weight in reductions)
    order = sorted(dims)
    return Arch(
        'PVTv2' if v2 else 'PVT',
        tuple(dims[stage] for stage in order),
        tuple(depths[stage] for stage in order),
        v2 and linear,
    )


def head_tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a classifier's ``weight`` and ``bias`` from published weights in any format.

    The result is empty where there is no classifier, or the format is unknown.
    """
    tensors = unwrap(checkpoint)
    fmt = detect_format(list(tensors))
    if fmt is None:
        return {}
    return {atom.leaf: t for atom, t in to_atoms(tensors, fmt).items() if atom.part == 'head'}
