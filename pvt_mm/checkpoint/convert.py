"""State dicts from one format to another, and into a backbone's own tensors: pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pvt_mm.checkpoint.atoms import Arch, is_square, last_position, recognise_arch, to_atoms
from pvt_mm.checkpoint.find import Found, choose, entries, find
from pvt_mm.checkpoint.key_maps import (
    CLASSIFICATION_PARTS,
    FORMATS,
    MLP_LINEARS,
    PVT_MM,
    Atom,
    Format,
    match,
)
from pvt_mm.errors import CheckpointMismatchError

#: How a caller names one of several PVTs.
ARGUMENT = 'prefix={!r}, or --prefix of the tool'


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
    if not is_square(tokens):
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
    if slot is None or atom.stage < last_position(atoms) or ('cls_token',) not in fmt.rows:
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
    state_dict: Mapping[str, Any],
    to: str = 'pvt_mm',
    arch: str | None = None,
    prefix: str | None = None,
) -> dict[str, Tensor]:
    """Convert published weights from whatever format they are in.

    Args:
        state_dict: Weights in any of the formats, or a checkpoint that wraps them. What is not a
            PVT in the same dict, and what stands before the PVT's keys, is kept.
        to: ``'pvt_mm'``, ``'official'``, ``'timm'``, ``'huggingface'`` or ``'mmdet'``.
        arch: Such as ``'small'`` or ``'b2'``: refuse weights of another one.
        prefix: Where several dicts of a checkpoint hold a PVT, what stands before its keys.

    Returns:
        The same tensors under the other format's names. mmdet has no classifier: head, final norm
        and class token are left out.

    Raises:
        CheckpointMismatchError: Where the format is not recognised, or the arch is not ``arch``.
        ValueError: Where ``to`` cannot express the weights.
    """
    found = _find_some(state_dict)
    wrapper = found[0].wrapper
    if any(choice.wrapper != wrapper for choice in found):
        wrapper = choose(found, prefix=prefix, argument=ARGUMENT)[0].wrapper
    found = [choice for choice in found if choice.wrapper == wrapper]
    converted: dict[str, Tensor] = {}
    for choice in found:
        atoms = to_atoms(choice.tensors, choice.fmt)
        own = from_atoms(atoms, _target_format(to, _check_arch(atoms, arch)))
        converted |= {choice.inner + key: tensor for key, tensor in own.items()}
    taken: set[str] = set().union(*(choice.keys for choice in found))
    return converted | {
        key.removeprefix(wrapper).removeprefix('module.'): value
        for key, value in entries(state_dict, wrapper).items()
        if key not in taken and isinstance(value, Tensor)
    }


def bare_backbone(
    state_dict: Mapping[str, Any], arch: str | None = None, prefix: str | None = None
) -> dict[str, Tensor]:
    """Convert one backbone's weights to pvt_mm's format, without a classifier and prefixes.

    Arguments and errors are those of ``convert_checkpoint``, but that ``prefix`` chooses among all
    the PVTs of a checkpoint.
    """
    choice, _ = choose(_find_some(state_dict), prefix=prefix, argument=ARGUMENT)
    atoms = to_atoms(choice.tensors, choice.fmt)
    _check_arch(atoms, arch)
    own = {atom: t for atom, t in atoms.items() if atom.part not in CLASSIFICATION_PARTS}
    return from_atoms(own, PVT_MM)


def _find_some(state_dict: Mapping[str, Any]) -> list[Found]:
    found = find(state_dict)
    if not found:
        raise CheckpointMismatchError('These weights hold no PVT backbone in any known format.')
    return found


def _check_arch(atoms: Mapping[Atom, Tensor], arch: str | None) -> Arch | None:
    found = recognise_arch(atoms)
    if arch is not None and (found is None or found.name != arch):
        raise CheckpointMismatchError(f'These weights are of {found}, not of {arch!r}.')
    return found


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


def head_tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a classifier's ``weight`` and ``bias`` from published weights in any format.

    The result is empty where there is no classifier, or the format is unknown.
    """
    found = find(checkpoint)
    if not found:
        return {}
    choice, _ = choose(found)
    return {leaf: choice.tensors[key] for leaf, key in choice.head.items()}
