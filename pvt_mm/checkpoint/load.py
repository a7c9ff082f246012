"""Load weights in any published format into a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Tensor

from pvt_mm.checkpoint.convert import (
    backbone_tensors,
    recognise_arch,
    split_backbone,
    to_atoms,
    unwrap,
)
from pvt_mm.checkpoint.key_maps import (
    CLASSIFICATION_PARTS,
    PVT_MM,
    Atom,
    detect_format,
    match,
)
from pvt_mm.errors import CheckpointMismatchError

#: How a first convolution may be adapted to an image of other than three channels.
CHANNEL_MODES = ('sum', 'repeat')
_FIRST_CONV = 'stages.0.patch_embed.proj.weight'


def adapt_channels(weight: Tensor, in_channels: int, mode: str) -> Tensor:
    """Adapt a first convolution to another number of input channels.

    Args:
        weight: (out, C, k, k).
        in_channels: Channels of the new convolution's input.
        mode: ``'sum'`` gives each channel the same share of the summed weights: the output for a
            grey image stays. ``'repeat'`` repeats the channels in order, scaled by
            C / in_channels, which keeps the size of the output.

    Shape:
        weight: (out, C, k, k) -> (out, in_channels, k, k).
    """
    channels = weight.shape[1]
    if mode == 'sum':
        return (weight.sum(1, keepdim=True) / in_channels).expand(-1, in_channels, -1, -1).clone()
    return weight[:, [i % channels for i in range(in_channels)]] * (channels / in_channels)


def load_into_backbone(
    state_dict: dict[str, Any],
    prefix: str,
    target: Mapping[str, Tensor],
    name: str,
    allow_partial: bool = False,
    adapt_in_channels: str | None = None,
) -> str:
    """Rewrite, in place, the weights under a prefix to a backbone's names and shapes.

    Parts that only classification has, and stages that the backbone does not build, are dropped.
    Keys that no format knows stay: a strict load reports them.

    Args:
        state_dict: Weights of a whole model; those under ``prefix`` may be in any format.
        prefix: The backbone's place in the model, such as ``'backbone.'``; empty for itself.
        target: The backbone's own state dict.
        name: The backbone's name, for messages.
        allow_partial: Load what fits; the other tensors keep the backbone's own values.
        adapt_in_channels: One of ``CHANNEL_MODES``: take weights for other image channels.

    Returns:
        A sentence that says what was loaded and what was dropped.

    Raises:
        CheckpointMismatchError: Where tensors are missing, have another shape or no place in the
            backbone, unless ``allow_partial`` is set and some fit.
    """
    own = {key.removeprefix(prefix): v for key, v in state_dict.items() if key.startswith(prefix)}
    inner = unwrap(own)
    if not prefix:
        inner = split_backbone(inner)[0] or inner
    fmt = detect_format(list(inner)) or PVT_MM
    atoms = to_atoms(inner, fmt)
    tensors = backbone_tensors(atoms, target)
    if adapt_in_channels and _FIRST_CONV in tensors:
        channels = target[_FIRST_CONV].shape[1]
        if tensors[_FIRST_CONV].shape[1] != channels:
            tensors[_FIRST_CONV] = adapt_channels(tensors[_FIRST_CONV], channels, adapt_in_channels)
    fits = {key: value for key, value in tensors.items() if value.shape == target[key].shape}
    wanted = {atom for key in target for atom in match(key, PVT_MM)}
    surplus = _surplus(atoms, wanted)
    in_part = len(fits) < len(target) or surplus
    if in_part and not (allow_partial and (fits or not own)):
        raise CheckpointMismatchError(_mismatch(name, atoms, tensors, target, surplus))
    unknown = {key: value for key, value in inner.items() if not match(key, fmt)}
    for key in own:
        del state_dict[prefix + key]
    for key, value in (unknown | dict(target) | fits).items():
        state_dict[prefix + key] = value
    found = recognise_arch(atoms)
    dropped = sorted({_label(atom) for atom in atoms if _is_dropped(atom, wanted)}) + surplus
    return (
        f'{name}: loaded {len(fits)} of {len(target)} backbone tensors from weights of '
        f'{(found and found.name) or "a custom arch"} in {fmt.name} format; '
        f'dropped {", ".join(dropped) or "nothing"}.'
    )


def _surplus(atoms: Mapping[Atom, Any], wanted: Set[Atom]) -> list[str]:
    """Name the parts that the weights have, and the backbone's stage of that number has not."""
    surplus = [atom for atom in atoms if atom not in wanted and not _is_dropped(atom, wanted)]
    places = [f'blocks.{atom.block}' if atom.block >= 0 else atom.part for atom in surplus]
    return sorted({f'stages.{atom.stage}.{place}' for atom, place in zip(surplus, places)})


def _is_dropped(atom: Atom, wanted: Set[Atom]) -> bool:
    if atom.part in CLASSIFICATION_PARTS:
        return atom not in wanted
    return not any(atom.stage == other.stage for other in wanted)


def _label(atom: Atom) -> str:
    labels = {'final_norm': 'final norm', 'cls_position': 'class slot of the position embedding'}
    if atom.part in CLASSIFICATION_PARTS:
        return labels.get(atom.part, atom.part)
    return f'stage {atom.stage}'


def _mismatch(
    name: str,
    atoms: Mapping[Atom, Tensor],
    tensors: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    surplus: Sequence[str],
) -> str:
    own_atoms = {atom: own for key, own in target.items() for atom in match(key, PVT_MM)}
    wrong = []
    for key, own in target.items():
        if key not in tensors:
            wrong.append(f'{key} is missing')
        elif tensors[key].shape != own.shape:
            wrong.append(f'{key} is {tuple(tensors[key].shape)}, not {tuple(own.shape)}')
    fitting = len(target) - len(wrong)
    wrong += [f'{key} has no place' for key in surplus]
    found = recognise_arch(atoms)
    first = '; '.join(wrong[:3]) + ('; ...' if len(wrong) > 3 else '')
    return (
        f'The weights do not fit {name} ({recognise_arch(own_atoms)}): they hold '
        f'{found or "no PVT backbone"}, and {fitting} of {len(target)} tensors fit; {first}. '
        f'{_way_out(wrong)}'
    )


def _way_out(wrong: Sequence[str]) -> str:
    if len(wrong) == 1 and wrong[0].startswith(_FIRST_CONV):
        return (
            "Weights for other image channels are taken with adapt_in_channels='sum' or 'repeat'."
        )
    return (
        'Choose the arch of the weights, or the weights of the arch; allow_partial=True in the '
        'backbone takes what fits.'
    )
