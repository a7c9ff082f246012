"""The published architectures, and how custom ones are checked.

Papers: [PVT](https://arxiv.org/abs/2102.12122), Table 1;
[PVTv2](https://arxiv.org/abs/2106.13797), Table 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pvt_mm.errors import ArchError

#: Stride of the patch embedding, one value per stage.
STRIDES = (4, 2, 2, 2)
#: Input pixels from one token to the next, one value per stage.
TOTAL_STRIDES = (4, 8, 16, 32)

# One value per stage: channels of a token, attention heads, hidden channels of the MLP over those
# of a token, and the factor by which a side shrinks for keys and values.
_PYRAMID: dict[str, Any] = {
    'dims': (64, 128, 320, 512),
    'num_heads': (1, 2, 5, 8),
    'mlp_ratios': (8, 8, 4, 4),
    'sr_ratios': (8, 4, 2, 1),
}

PVT_ARCHS: dict[str, dict[str, Any]] = {
    'tiny': {**_PYRAMID, 'depths': (2, 2, 2, 2)},
    'small': {**_PYRAMID, 'depths': (3, 4, 6, 3)},
    'medium': {**_PYRAMID, 'depths': (3, 4, 18, 3)},
    'large': {**_PYRAMID, 'depths': (3, 8, 27, 3)},
}

PVT_V2_ARCHS: dict[str, dict[str, Any]] = {
    'b0': {**_PYRAMID, 'dims': (32, 64, 160, 256), 'depths': (2, 2, 2, 2)},
    'b1': {**_PYRAMID, 'depths': (2, 2, 2, 2)},
    'b2': {**_PYRAMID, 'depths': (3, 4, 6, 3)},
    'b2_li': {**_PYRAMID, 'depths': (3, 4, 6, 3), 'linear': True},
    'b3': {**_PYRAMID, 'depths': (3, 4, 18, 3)},
    'b4': {**_PYRAMID, 'depths': (3, 8, 27, 3)},
    'b5': {**_PYRAMID, 'depths': (3, 6, 40, 3), 'mlp_ratios': (4, 4, 4, 4)},
}


#: SegFormer's MiT ([paper](https://arxiv.org/abs/2105.15203), Table 6), to tell its weights from
#: PVTv2's: the layers are the same, hidden channels are fewer. MiT-B5 is PVTv2-B5.
MIT_ARCHS: dict[str, dict[str, Any]] = {
    f'mit_{name}': {**PVT_V2_ARCHS[name], 'mlp_ratios': (4, 4, 4, 4)}
    for name in ('b0', 'b1', 'b2', 'b3', 'b4')
}


def resolve_arch(
    arch: str | Mapping[str, Any], archs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Look an architecture up by name, or check one given as a dict.

    Args:
        arch: A name, or a dict with the keys of the named ones; each value but ``linear`` is a
            sequence of four, one value per stage.
        archs: The named architectures.

    Raises:
        ArchError: Where the name or a key is unknown, a key is missing or a value is wrong; the
            message lists what is allowed.
    """
    if not isinstance(arch, Mapping):
        if not isinstance(arch, str) or arch not in archs:
            raise ArchError(f'There is no arch {arch!r}; choose one of {", ".join(archs)}.')
        return dict(archs[arch])
    keys = {key for named in archs.values() for key in named}
    required = keys - {'linear'}
    if not required <= set(arch) <= keys:
        raise ArchError(
            f'A custom arch needs the keys {", ".join(sorted(required))}'
            f'{" (and may have linear)" if keys - required else ""}, but got '
            f'{", ".join(sorted(arch)) or "none"}.'
        )
    for key in sorted(required):
        values = arch[key]
        if not isinstance(values, (list, tuple)) or len(values) != len(STRIDES):
            raise ArchError(f'arch[{key!r}] must have {len(STRIDES)} values, got {values}.')
        whole = key != 'mlp_ratios'
        if not all(_is_positive(value, whole) for value in values):
            kind = 'positive whole numbers' if whole else 'positive numbers'
            raise ArchError(f'arch[{key!r}] must hold {kind}, got {arch[key]}.')
    for dim, heads in zip(arch['dims'], arch['num_heads']):
        if dim % heads:
            raise ArchError(f'A width of {dim} does not split into {heads} attention heads.')
    return dict(arch)


def _is_positive(value: Any, whole: bool) -> bool:
    """Tell whether a value is a positive number, and a whole one if need be."""
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < math.inf
