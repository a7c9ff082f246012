"""The arguments of a PVT: what they may hold, and what other implementations call them.

mmdet, timm, Hugging Face and the authors' repository each have a PVT with other names. A config
that was written for one of them gets a sentence that says what to write here.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any

from pvt_mm.archs import PVT_ARCHS, PVT_V2_ARCHS, resolve_arch
from pvt_mm.errors import ArchError, ArgumentError

ARCHS = {'PVT': PVT_ARCHS, 'PVTv2': PVT_V2_ARCHS}
#: The arch that each backbone takes where none is named.
DEFAULT_ARCHS = {'PVT': 'small', 'PVTv2': 'b2'}

#: What others call the keys of an arch.
_ARCH_KEYS = {
    'embed_dims': 'dims',
    'hidden_sizes': 'dims',
    'dims': 'dims',
    'num_layers': 'depths',
    'depths': 'depths',
    'num_heads': 'num_heads',
    'num_attention_heads': 'num_heads',
    'mlp_ratios': 'mlp_ratios',
    'mlp_ratio': 'mlp_ratios',
    'sr_ratios': 'sr_ratios',
    'sequence_reduction_ratios': 'sr_ratios',
    'linear': 'linear',
    'linear_attention': 'linear',
}
_RENAMED = {
    'in_chans': 'in_channels',
    'num_channels': 'in_channels',
    'img_size': 'pretrain_img_size',
    'image_size': 'pretrain_img_size',
    'hidden_dropout_prob': 'drop_rate',
    'proj_drop_rate': 'drop_rate',
    'attention_probs_dropout_prob': 'attn_drop_rate',
    'use_checkpoint': 'with_cp',
}
#: Arguments of other PVTs that nobody changes: they belong to what was published.
_FIXED = (
    'act_cfg',
    'convert_weights',
    'hidden_act',
    'initializer_range',
    'layer_norm_eps',
    'norm_after_stage',
    'norm_cfg',
    'norm_layer',
    'num_classes',
    'num_encoder_blocks',
    'num_stages',
    'paddings',
    'patch_size',
    'patch_sizes',
    'qk_scale',
    'qkv_bias',
    'strides',
    'use_abs_pos_embed',
    'use_conv_ffn',
)
#: Arguments that only another backbone has: the base config's, which was not removed.
_OF_OTHERS = {
    'ResNet': (
        'avg_down',
        'base_channels',
        'base_width',
        'contract_dilation',
        'dcn',
        'deep_stem',
        'depth',
        'dilations',
        'groups',
        'norm_eval',
        'plugins',
        'stage_with_dcn',
        'style',
        'zero_init_residual',
    ),
    'Swin Transformer': ('patch_norm', 'window_size'),
}


def argument_names(kind: type) -> list[str]:
    """Return the names of a class's arguments."""
    parameters = inspect.signature(kind).parameters.values()
    return [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]


def refuse_arguments(name: str, others: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse arguments that a PVT does not have, and say for each what to write instead.

    Args:
        name: ``'PVT'`` or ``'PVTv2'``.
        others: The arguments that it does not have, with their values.
        known: Those that it has.

    Raises:
        ArgumentError: Always.
    """
    owner = next((who for who, keys in _OF_OTHERS.items() if set(keys) & set(others)), None)
    if owner:
        raise ArgumentError(
            f'{name} has no {_listed(others)}: these are left from the {owner} of a base config; '
            f"write backbone=dict(_delete_=True, type='{name}', ...), which removes them."
        )
    raise ArgumentError(f'{name} has no {_listed(others)}: {_advice(name, others, known)}.')


def _advice(name: str, others: Mapping[str, Any], known: Collection[str]) -> str:
    arch = {key: value for key, value in others.items() if key in _ARCH_KEYS}
    renamed = {key: _RENAMED.get(key) or _similar(key, known) for key in others}
    write = [f'arch={_arch_text(name, arch)} for {_listed(arch)}'] if arch else []
    fixed, unknown = [], []
    for key, value in others.items():
        if key in arch:
            continue
        if key == 'pretrained' and value:
            file = repr(value) if isinstance(value, str) else 'FILE'
            write.append(f"init_cfg=dict(type='Pretrained', checkpoint={file}) for pretrained")
        elif key in _FIXED or key == 'pretrained':
            fixed.append(key)
        elif renamed[key]:
            write.append(f'{renamed[key]}={value!r} for {key}')
        else:
            unknown.append(key)
    return '; '.join(
        [
            *([f'write {", ".join(write)}'] if write else []),
            *([f'leave out {_listed(fixed)}, which need no setting here'] if fixed else []),
            *([f'leave out {_listed(unknown)}; it has {", ".join(known)}'] if unknown else []),
        ]
    )


def _arch_text(name: str, given: Mapping[str, Any]) -> str:
    try:
        found = find_arch(name, given)
    except ArchError:
        return 'dict(dims=..., depths=..., num_heads=..., mlp_ratios=..., sr_ratios=...)'
    if isinstance(found, str):
        return repr(found)
    return f'dict({", ".join(f"{key}={value!r}" for key, value in found.items())})'


def _similar(key: str, known: Collection[str]) -> str | None:
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.75)), None)


def _listed(names: Collection[str]) -> str:
    *first, last = names
    return f'{", ".join(first)} and {last}' if first else str(last)


def find_arch(name: str, theirs: Mapping[str, Any]) -> str | dict[str, Any]:
    """Return the arch that the arguments of another PVT describe.

    Args:
        name: ``'PVT'`` or ``'PVTv2'``.
        theirs: Arguments as mmdet, timm, Hugging Face or the authors name them; those that are
            missing are as in PVT-Small and PVTv2-B2. ``embed_dims`` may be the width of a head, as
            in mmdet.

    Returns:
        The name of a published arch, or a dict for ``arch``.

    Raises:
        ArchError: Where they do not fit together.
    """
    arch = dict(ARCHS[name][DEFAULT_ARCHS[name]])
    for key, value in theirs.items():
        if key in _ARCH_KEYS:
            arch[_ARCH_KEYS[key]] = value
    if isinstance(arch['dims'], int) and isinstance(arch['num_heads'], (list, tuple)):
        arch['dims'] = [arch['dims'] * heads for heads in arch['num_heads']]
    if not arch.get('linear'):
        arch.pop('linear', None)
    arch = resolve_arch(arch, ARCHS[name])
    arch = {key: tuple(value) if key != 'linear' else value for key, value in arch.items()}
    return next((named for named, own in ARCHS[name].items() if own == arch), arch)


def find_type(name: str) -> dict[str, str] | None:
    """Return the type, and the arch if it says one, for what others call a PVT; else None.

    ``'pvt_v2_b2_li'`` of timm and the authors is ``dict(type='PVTv2', arch='b2_li')``.
    """
    plain = re.sub(r'[^a-z0-9]', '', name.rpartition('.')[2].lower())
    match = re.fullmatch(
        r'(?:pvt|pyramidvisiontransformer)(?:v1)?(v2)?(?:model|backbone)?'
        r'(tiny|small|medium|large|b[0-5])?(li|linear)?',
        plain,
    )
    if match is None:
        return None
    version, arch, linear = match.groups()
    kind = 'PVTv2' if version else 'PVT'
    arch = f'{arch}_li' if arch and linear else arch
    if arch is None and not linear:
        return dict(type=kind)
    return dict(type=kind, arch=arch) if arch in ARCHS[kind] else None


# Values


def check_init_cfg(init_cfg: Any) -> None:
    """Check that ``init_cfg`` is what mmengine reads.

    Raises:
        ArchError: Naming what to write instead.
    """
    for part in init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]:
        if part is None or (isinstance(part, dict) and _is_whole(part)):
            continue
        file = part.get('checkpoint') if isinstance(part, dict) else part
        file = repr(str(file)) if file and not isinstance(file, dict) else 'FILE'
        raise ArchError(
            f'init_cfg={part!r} says not how the weights are initialised; write '
            f"init_cfg=dict(type='Pretrained', checkpoint={file}), or init_cfg=None."
        )


def _is_whole(init_cfg: Mapping[str, Any]) -> bool:
    kind, checkpoint = init_cfg.get('type'), init_cfg.get('checkpoint')
    return bool(kind) and (kind != 'Pretrained' or bool(checkpoint and isinstance(checkpoint, str)))


def check_numbers(in_channels: Any, pretrain_img_size: Any, **rates: Any) -> None:
    """Check the numbers that every PVT takes.

    Args:
        in_channels: Channels of the input image.
        pretrain_img_size: One side or two, in pixels.
        rates: Probabilities.

    Raises:
        ArchError: Naming the argument and what it may hold.
    """
    sides = pretrain_img_size
    sides = sides if isinstance(sides, (list, tuple)) and len(sides) == 2 else [sides]
    for key, value in {'in_channels': [in_channels], 'pretrain_img_size': sides}.items():
        if not all(_is_count(number) for number in value):
            given = value[0] if len(value) == 1 else value
            raise ArchError(f'{key}={given!r} must hold whole numbers from 1 on.')
    for key, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ArchError(f'{key}={rate!r} must be a number from 0 to below 1.')


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
