"""Load weights in any published format into a backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import Tensor

from pvt_mm.archs import MIT_ARCHS
from pvt_mm.checkpoint.atoms import Arch, recognise_arch, to_atoms
from pvt_mm.checkpoint.convert import backbone_tensors
from pvt_mm.checkpoint.find import choose, find, unwrap
from pvt_mm.checkpoint.key_maps import (
    CLASSIFICATION_PARTS,
    PVT_MM,
    Atom,
    Format,
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
    weights_prefix: str | None = None,
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
        weights_prefix: Where the weights hold several PVTs, what stands before the one to take.

    Returns:
        A sentence that says what was loaded and what was dropped.

    Raises:
        CheckpointMismatchError: Where tensors are missing, have another shape or no place in the
            backbone, unless ``allow_partial`` is set and some fit.
    """
    own = {key.removeprefix(prefix): v for key, v in state_dict.items() if key.startswith(prefix)}
    inner, fmt, origin = _own_weights(own, recognise_arch(_atoms_of(target)), weights_prefix)
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
        raise CheckpointMismatchError(_mismatch(name, prefix, inner, fmt, target, tensors, surplus))
    unknown = {key: value for key, value in inner.items() if not match(key, fmt)}
    for key in own:
        del state_dict[prefix + key]
    for key, value in (unknown | dict(target) | fits).items():
        state_dict[prefix + key] = value
    found = recognise_arch(atoms)
    dropped = sorted({_label(atom) for atom in atoms if _is_dropped(atom, wanted)}) + surplus
    return (
        f'{name}: loaded {len(fits)} of {len(target)} backbone tensors from weights of '
        f'{(found and found.name) or "a custom arch"} in {fmt.name} format{origin}; '
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


def _atoms_of(target: Mapping[str, Tensor]) -> dict[Atom, Tensor]:
    return {atom: own for key, own in target.items() for atom in match(key, PVT_MM)}


def _own_weights(
    own: Mapping[str, Any], arch: Arch | None, prefix: str | None
) -> tuple[dict[str, Any], Format, str]:
    """Return the weights to load, their format, and words on where they were if that is unusual."""
    found = find(own)
    if not found:  # parts without any attention, or nothing of a PVT
        inner = unwrap(own)
        return inner, detect_format(list(inner)) or PVT_MM, ''
    choice, reason = choose(found, arch=arch, prefix=prefix)
    usual = choice.inner in ('', 'backbone.') and not reason
    origin = '' if usual else f' under {choice.prefix!r}{f" ({reason})" if reason else ""}'
    return choice.tensors, choice.fmt, origin


def _mismatch(
    name: str,
    prefix: str,
    inner: Mapping[str, Any],
    fmt: Format,
    target: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    surplus: Sequence[str],
) -> str:
    """Say what the weights are, what does not fit, and what to do."""
    wrong = []
    for key, own in target.items():
        if key not in tensors:
            wrong.append(f'{key} is missing')
        elif tensors[key].shape != own.shape:
            wrong.append(f'{key} is {tuple(tensors[key].shape)}, not {tuple(own.shape)}')
    fitting = len(target) - len(wrong)
    wrong += [f'{key} has no place' for key in surplus]
    first = '; '.join(wrong[:3]) + ('; ...' if len(wrong) > 3 else '')
    atoms = to_atoms(inner, fmt)
    found, own_arch = recognise_arch(atoms), recognise_arch(_atoms_of(target))
    holds = str(found) if found else 'parts of a PVT' if atoms else 'no PVT backbone'
    way_out = _way_out(wrong, found, own_arch) if atoms else _no_pvt(prefix, inner)
    if fitting and not way_out.endswith("'repeat'."):
        way_out += ' allow_partial=True in the backbone takes what fits.'
    strange = [key for key in inner if not match(key, fmt)]
    if atoms and strange and not (found and found.name):
        way_out += f' {len(strange)} of the keys are of no PVT, such as {strange[0]}.'
    return (
        f'The weights do not fit {name} ({own_arch}): they hold {holds}, and {fitting} of '
        f'{len(target)} tensors fit; {first}. {way_out}'
    )


def _no_pvt(prefix: str, inner: Mapping[str, Any]) -> str:
    place = f' under {prefix!r}' if prefix else ''
    if not inner:
        return f"They have no keys{place}; in a script, give a bare backbone's to the backbone."
    return f"Their keys{place} are named such as {', '.join(list(inner)[:2])}; take a PVT's."


def _way_out(wrong: Sequence[str], found: Arch | None, own: Arch | None) -> str:
    if len(wrong) == 1 and wrong[0].startswith(_FIRST_CONV):
        return (
            "Weights for other image channels are taken with adapt_in_channels='sum' or 'repeat'."
        )
    if found and found.is_mit:
        return f'PVTv2 takes them with {arch_dict(found)}.'
    if found and own and found.first_stages(len(own.dims)).matches(own):
        return (
            'They are of this arch, but not whole, or of other settings such as sr_mode; take '
            'whole weights, or the settings that they were trained with.'
        )
    return 'Choose the arch of the weights, or the weights of the arch.'


def arch_dict(mit: Arch) -> str:
    """Return the argument of PVTv2 that makes it SegFormer's MiT."""
    arch = MIT_ARCHS[str(mit.name)]
    return f'arch=dict({", ".join(f"{key}={value}" for key, value in arch.items())})'
