"""The tensors of a state dict under names that all formats share, and the arch that they show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pvt_mm.archs import MIT_ARCHS, PVT_ARCHS, PVT_V2_ARCHS
from pvt_mm.checkpoint.key_maps import MLP_LINEARS, Atom, Format, match
from pvt_mm.errors import CheckpointMismatchError


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
    last = last_position(atoms)
    atom = Atom('pos_embed', last)
    position = atoms.get(atom)
    if position is None or position.ndim != 3:
        return
    before = atoms.get(Atom('pos_embed', last - 1))
    tokens = position.shape[1]
    # Each stage halves the grid; without the stage before, a square grid tells.
    odd = before is not None and before.ndim == 3 and before.shape[1] == 4 * (tokens - 1)
    if odd or (not is_square(tokens) and is_square(tokens - 1)):
        atoms[Atom('cls_position')], atoms[atom] = position[:, :1], position[:, 1:]


def last_position(atoms: Mapping[Atom, Any]) -> int:
    """Return the last stage that has a position embedding; -1 where none has."""
    return max((atom.stage for atom in atoms if atom.part == 'pos_embed'), default=-1)


def is_square(number: int) -> bool:
    """Tell whether tokens may lie in a square."""
    return number > 0 and math.isqrt(number) ** 2 == number


class Arch(NamedTuple):
    """An architecture, as far as its weights show it.

    A ratio of the MLP is None where the weights lack the layers that show it.
    """

    version: str
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    linear: bool
    mlp_ratios: tuple[float | None, ...]

    @property
    def name(self) -> str | None:
        """The published name, such as ``'small'`` or ``'b2'``; None where it has none."""
        return next((name for name, arch in _PUBLISHED.items() if self.matches(arch)), None)

    @property
    def is_mit(self) -> bool:
        """Whether it is SegFormer's MiT, which has PVTv2's layers under the same names."""
        return self.name in MIT_ARCHS

    def first_stages(self, count: int) -> Arch:
        """Return the part of it that a backbone with fewer stages takes."""
        first = {name: getattr(self, name)[:count] for name in ('dims', 'depths', 'mlp_ratios')}
        return self._replace(**first)

    def matches(self, other: Arch) -> bool:
        """Tell whether these weights may be of another arch."""
        ratios = zip(self.mlp_ratios, other.mlp_ratios)
        known = tuple(theirs if own else None for own, theirs in ratios)
        return self == other._replace(mlp_ratios=known)

    def __str__(self) -> str:
        """Return a short description for messages."""
        layout = f'depths {self.depths}, widths {self.dims}'
        if self.linear:
            layout += ', linear attention'
        if self.is_mit or not self.name:
            layout += f', MLP ratios ({", ".join(f"{r:g}" if r else "?" for r in self.mlp_ratios)})'
        if self.is_mit:
            return f"SegFormer's {self.name} ({layout})"
        return f'{self.version} {self.name or "of no published arch"} ({layout})'


_PUBLISHED = {
    name: Arch(
        version,
        arch['dims'],
        arch['depths'],
        arch.get('linear', False),
        arch['mlp_ratios'],
    )
    for version, archs in (('PVT', PVT_ARCHS), ('PVTv2', PVT_V2_ARCHS), ('PVTv2', MIT_ARCHS))
    for name, arch in archs.items()
}


def recognise_arch(atoms: Mapping[Atom, Any]) -> Arch | None:
    """Recognise an architecture by its layout; None where there is no patch embedding.

    Args:
        atoms: Tensors, or anything with a ``shape``, by atom.
    """
    norms = {atom.stage: norm for atom, norm in atoms.items() if atom.part == 'patch_embed.norm'}
    dims = {stage: norm.shape[0] for stage, norm in norms.items()}
    if not dims:
        return None
    blocks = {(atom.stage, atom.block) for atom in atoms if atom.block >= 0}
    depths = Counter(stage for stage, _ in blocks)
    hidden = {atom.stage: fc1.shape[0] for atom, fc1 in atoms.items() if _is_fc1(atom)}
    ratios = {stage: hidden[stage] / dim for stage, dim in dims.items() if stage in hidden}
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
        tuple(ratios.get(stage) for stage in order),
    )


def _is_fc1(atom: Atom) -> bool:
    return atom.part == 'blocks.mlp.fc1'
