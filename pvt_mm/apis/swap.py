"""Replace the backbone of any mmdet or mmseg config by a PVT.

The channels of the old backbone are computed from its settings and compared with the input channels
of every neck and head. Where they agree, they are mapped; all else is refused, with a ``Refusal``.
"""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

from mmengine.config import Config

from pvt_mm.archs import TOTAL_STRIDES, resolve_arch
from pvt_mm.config import BUNDLED, iter_dicts, read_config, refuse_old_config, type_name
from pvt_mm.errors import UserError
from pvt_mm.models import PVT, PVTv2
from pvt_mm.models.arguments import (
    ARCHS,
    DEFAULT_ARCHS,
    argument_names,
    find_arch,
    find_type,
    refuse_arguments,
)

ALL_STAGES = (0, 1, 2, 3)

#: How images were normalised, in RGB, for the published weights.
NORMALISATION = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
#: The published recipes for 16 images per step: RetinaNet's; with RoI heads, Mask R-CNN's.
LEARNING_RATE, ROI_LEARNING_RATE, WEIGHT_DECAY = 1e-4, 2e-4, 1e-4
#: Optimisers whose settings are kept.
ADAM = ('Adam', 'AdamW')


class Refusal(str, enum.Enum):
    """Every reason why the backbone of a config cannot be swapped."""

    NO_MODEL = 'no model'
    NO_BACKBONE = 'no backbone'
    UNKNOWN_BACKBONE = 'unknown backbone'
    LEVELS = 'other levels than four at strides 4 to 32'
    DARKNET = 'YOLO or RTMDet on Darknet stages'
    MULTI_BRANCH = 'branches that are no pyramid'
    DETECTORS = 'DetectoRS: the neck feeds the backbone'
    SHARED_HEAD = 'C4: the head is a stage of the ResNet'
    STRIDE = 'dilated backbone: strides would change'
    ONE_SIZE = 'dilated backbone: two heads need levels of one size'
    UNKNOWN_NECK = 'unknown neck'
    UNKNOWN_HEAD = 'unknown head on the backbone'
    CHANNELS = 'channels disagree'
    OTHER_PVT = 'a PVT that is not built as published'


class SwapRefusedError(UserError):
    """The backbone of this config cannot be swapped.

    Attributes:
        reason: One of the known reasons.
    """

    def __init__(self, reason: Refusal, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Level(NamedTuple):
    """One feature map that a backbone returns."""

    stage: int
    channels: int
    stride: int


class Swapped(NamedTuple):
    """A config with a PVT, and a sentence for each change."""

    cfg: Config
    changes: list[str]


# What a backbone returns


def _resnet(backbone: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    width = backbone.get('base_channels', 64) * (1 if backbone.get('depth') in (18, 34) else 4)
    return [width * 2**i for i in ALL_STAGES], _resnet_strides(backbone)


def _resnet_strides(backbone: Mapping[str, Any]) -> list[int]:
    return [4 * stride for stride in accumulate(backbone.get('strides', (1, 2, 2, 2)), mul)]


#: Widths of the stages, Table 5 ff. of [RegNet](https://arxiv.org/abs/2003.13678).
_REGNET_WIDTHS = {
    'regnetx_400mf': [32, 64, 160, 384],
    'regnetx_800mf': [64, 128, 288, 672],
    'regnetx_1.6gf': [72, 168, 408, 912],
    'regnetx_3.2gf': [96, 192, 432, 1008],
    'regnetx_4.0gf': [80, 240, 560, 1360],
    'regnetx_6.4gf': [168, 392, 784, 1624],
    'regnetx_8.0gf': [80, 240, 720, 1920],
    'regnetx_12gf': [224, 448, 896, 2240],
}


def _regnet(backbone: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    arch = backbone.get('arch')
    if arch not in _REGNET_WIDTHS:
        raise SwapRefusedError(
            Refusal.UNKNOWN_BACKBONE,
            f'The widths of the RegNet {arch!r} are not known here; {", ".join(_REGNET_WIDTHS)} '
            'can be swapped.',
        )
    # RegNet halves in its stem once and in every stage.
    strides = backbone.get('strides', (2, 2, 2, 2))
    return _REGNET_WIDTHS[arch], [2 * stride for stride in accumulate(strides, mul)]


def _hierarchical(dims: Sequence[int], backbone: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    return list(dims), list(accumulate(backbone.get('strides', (4, 2, 2, 2)), mul))


def _swin(backbone: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    return _hierarchical([backbone.get('embed_dims', 96) * 2**i for i in ALL_STAGES], backbone)


def _per_head(default_heads: Sequence[int]) -> Callable:
    def levels(backbone: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        width = backbone.get('embed_dims', 64)
        heads = backbone.get('num_heads', default_heads)
        return _hierarchical([width * number for number in heads], backbone)

    return levels


def _twins(backbone: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    default = (64, 128, 256, 512) if type_name(backbone) == 'PCPVT' else (64, 128, 256)
    return _hierarchical(backbone.get('embed_dims', default), backbone)


def _hrnet(backbone: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    return list(backbone['extra']['stage4']['num_channels']), list(TOTAL_STRIDES)


def _mscan(backbone: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    return list(backbone.get('embed_dims', (64, 128, 256, 512))), list(TOTAL_STRIDES)


def _pvt(backbone: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    archs = ARCHS[type_name(backbone)]
    arch = resolve_arch(backbone.get('arch', DEFAULT_ARCHS[type_name(backbone)]), archs)
    return list(arch['dims']), list(TOTAL_STRIDES)


#: Backbones of four levels: the channels and strides of all their stages.
BACKBONES: dict[str, Callable[[Mapping[str, Any]], tuple[list[int], list[int]]]] = {
    **dict.fromkeys(('ResNet', 'ResNetV1c', 'ResNetV1d', 'ResNeXt', 'ResNeSt', 'Res2Net'), _resnet),
    'RegNet': _regnet,
    'SwinTransformer': _swin,
    'PyramidVisionTransformer': _per_head((1, 2, 5, 8)),
    'PyramidVisionTransformerV2': _per_head((1, 2, 5, 8)),
    'MixVisionTransformer': _per_head((1, 2, 4, 8)),
    'PCPVT': _twins,
    'SVT': _twins,
    'HRNet': _hrnet,
    'MSCAN': _mscan,
    'PVT': _pvt,
    'PVTv2': _pvt,
}

#: Backbones that are known not to fit.
REFUSED_BACKBONES = {
    **dict.fromkeys(('Darknet', 'CSPDarknet', 'CSPNeXt'), Refusal.DARKNET),
    **dict.fromkeys(('DetectoRS_ResNet', 'DetectoRS_ResNeXt'), Refusal.DETECTORS),
    **dict.fromkeys(('BiSeNetV1', 'BiSeNetV2', 'CGNet', 'DDRNet', 'ERFNet'), Refusal.MULTI_BRANCH),
    **dict.fromkeys(('FastSCNN', 'ICNet', 'PIDNet', 'STDCContextPathNet'), Refusal.MULTI_BRANCH),
    **dict.fromkeys(('TridentResNet',), Refusal.MULTI_BRANCH),
    **dict.fromkeys(('BEiT', 'MAE', 'VisionTransformer', 'VPD', 'UNet'), Refusal.LEVELS),
    **dict.fromkeys(('EfficientNet', 'MobileNetV2', 'MobileNetV3'), Refusal.LEVELS),
    **dict.fromkeys(('HourglassNet', 'SSDVGG', 'STDCNet'), Refusal.LEVELS),
}

_WHY_REFUSED = {
    Refusal.DARKNET: "neck and head are cut to Darknet's stages",
    Refusal.DETECTORS: 'its neck feeds the backbone a second time, which only its own ResNet takes',
    Refusal.MULTI_BRANCH: 'its branches are no pyramid, and its heads read each of them',
    Refusal.LEVELS: 'it does not return levels at strides 4, 8, 16 and 32',
}


def old_levels(backbone: Mapping[str, Any]) -> list[Level]:
    """Return the levels of a backbone, in the order of its ``out_indices``.

    Raises:
        SwapRefusedError: Where it is unknown or has not four levels.
    """
    name = type_name(backbone)
    if name in REFUSED_BACKBONES:
        reason = REFUSED_BACKBONES[name]
        raise SwapRefusedError(
            reason, f'{name} cannot be swapped for a PVT: {_WHY_REFUSED[reason]}.'
        )
    own = _named_backbone(backbone)
    if own is None and name not in BACKBONES:
        raise SwapRefusedError(
            Refusal.UNKNOWN_BACKBONE,
            f'The backbone {name or "without a type"} is not known here; these can be swapped: '
            f'{", ".join(BACKBONES)}.',
        )
    channels, strides = _pvt(own.settings) if own else BACKBONES[name](backbone)
    stages = list(backbone.get('out_indices', range(backbone.get('num_stages', len(channels)))))
    if (
        len(channels) != len(TOTAL_STRIDES)
        or len(strides) > len(TOTAL_STRIDES)
        or stages != sorted(set(stages))
        or not set(stages) <= set(range(len(strides)))
    ):
        raise SwapRefusedError(
            Refusal.LEVELS,
            f'{name} returns its stages {stages} at strides {strides}; a PVT has four stages, at '
            'strides 4, 8, 16 and 32.',
        )
    return [Level(i, channels[i], strides[i]) for i in stages]


# The new backbone


class Own(NamedTuple):
    """A PVT that a config has already, in the words of this package.

    Attributes:
        settings: Its type, arch and other arguments.
        translated: Its arguments that have another name here.
    """

    settings: dict[str, Any]
    translated: frozenset[str] = frozenset()


#: mmdet's own PVTs. What they are built from must be as published, for PVT has no such arguments.
_MMDET = {'PyramidVisionTransformer': 'PVT', 'PyramidVisionTransformerV2': 'PVTv2'}
_MMDET_ARCH = ('embed_dims', 'num_layers', 'num_heads', 'mlp_ratios', 'sr_ratios')
_MMDET_SAME = ('pretrain_img_size', 'in_channels', 'drop_rate', 'attn_drop_rate', 'drop_path_rate')
_MMDET_FIXED = dict(
    num_stages=4, strides=[4, 2, 2, 2], qkv_bias=True, act_cfg=dict(type='GELU'), norm_cfg='LN'
)
_MMDET_FIXED_V1 = dict(
    patch_sizes=[4, 2, 2, 2],
    paddings=[0, 0, 0, 0],
    use_abs_pos_embed=True,
    norm_after_stage=False,
    use_conv_ffn=False,
)


def own_backbone(old: Mapping[str, Any]) -> Own | None:
    """Return the PVT that a config has already, ours, mmdet's or the authors'; None without one.

    Raises:
        SwapRefusedError: Where mmdet's is not built as published.
    """
    name = type_name(old)
    if name in ARCHS:
        settings = {key: value for key, value in old.items() if key != '_scope_'}
        return Own({**dict(type=name, arch=DEFAULT_ARCHS[name]), **settings, 'type': name})
    if name not in _MMDET:
        return _named_backbone(old)
    fixed = {**_MMDET_FIXED, **(_MMDET_FIXED_V1 if _MMDET[name] == 'PVT' else {})}
    for key, value in fixed.items():
        found = old.get(key, value)
        found = type_name(found) if key == 'norm_cfg' and isinstance(found, dict) else found
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise SwapRefusedError(
                Refusal.OTHER_PVT,
                f'{name} with {key}={old[key]!r} is no PVT as published, so that its weights and '
                f'widths cannot be kept; name a published arch instead, such as --arch '
                f'{"small" if _MMDET[name] == "PVT" else "v2_b2"}.',
            )
    try:
        arch = find_arch(_MMDET[name], {key: old[key] for key in _MMDET_ARCH if key in old})
    except ValueError as error:
        raise SwapRefusedError(Refusal.OTHER_PVT, f'{name}: {error}') from error
    settings = dict(type=_MMDET[name], arch=arch, drop_path_rate=0.1)  # mmdet's default
    settings.update({key: old[key] for key in _MMDET_SAME if key in old})
    return _with_weights(settings, old, {*_MMDET_ARCH, *fixed, 'convert_weights'})


def _named_backbone(old: Mapping[str, Any]) -> Own | None:
    """Return the PVT of the authors' or timm's that a type such as ``pvt_v2_b2`` names."""
    named = find_type(type_name(old)) or {}
    if type_name(old) in BACKBONES or 'arch' not in named:
        return None
    settings = {**named, 'drop_path_rate': 0.1}  # the authors' default
    settings.update({key: old[key] for key in _MMDET_SAME if key in old})
    return _with_weights(settings, old, {'style'})


def _with_weights(settings: dict[str, Any], old: Mapping[str, Any], others: set[str]) -> Own:
    init_cfg = old.get('init_cfg')
    if old.get('pretrained'):
        init_cfg = dict(checkpoint=old['pretrained'])
    if isinstance(init_cfg, dict):  # mmdet's needs no type
        init_cfg = {'type': 'Pretrained', **init_cfg}
    if init_cfg:
        settings['init_cfg'] = init_cfg
    return Own(settings, frozenset({*others, 'pretrained', 'init_cfg'}))


def make_backbone(backbone: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Complete the settings of a PVT, and return them with the channels of its four stages.

    A published arch gets the drop path rate and the weights of the bundled configs.

    Raises:
        UserError: Where there is no such type, arch or argument, or ``out_indices`` is given.
    """
    settings = _plain(dict(backbone))
    name = type_name(settings) or str(settings.get('type'))
    if name not in ARCHS:
        write = ', '.join(f'{key}={value!r}' for key, value in (find_type(name) or {}).items())
        raise UserError(
            f'There is no backbone {name!r} to swap in; '
            f'{f"write {write}" if write else "choose one of PVT, PVTv2"}.'
        )
    if 'out_indices' in settings:
        raise UserError(
            'Leave out_indices out of the backbone: the levels that the neck and heads read stay.'
        )
    known = argument_names(PVT if name == 'PVT' else PVTv2)
    others = {key: value for key, value in settings.items() if key not in ('type', *known)}
    if others:
        refuse_arguments(name, others, known)
    settings['type'] = name
    arch = settings.setdefault('arch', DEFAULT_ARCHS[name])
    try:
        dims = resolve_arch(arch, ARCHS[name])['dims']
    except ValueError as error:
        raise UserError(str(error)) from error
    if not isinstance(arch, str):
        return settings, tuple(dims)
    file = f'pvt_{arch[0]}.py' if name == 'PVT' else f'pvt_v2_{arch}.py'
    published = Config.fromfile(BUNDLED / '_base_' / 'backbones' / file).backbone.to_dict()
    return {**published, **settings}, tuple(dims)


class Choice(NamedTuple):
    """The backbone that takes the place of another.

    Attributes:
        settings: Its arguments, without the levels.
        dims: Channels of its four stages.
        own: The old one, if that is a PVT too.
        same: Whether it is the old one's arch, so that the old weights fit.
    """

    settings: dict[str, Any]
    dims: tuple[int, ...]
    own: Own | None = None
    same: bool = False


def _choose(given: Mapping[str, Any] | None, old: Mapping[str, Any]) -> Choice:
    """Return the backbone that is asked for, with the arguments that the old PVT shares with it.

    Raises:
        UserError: Where none is named and the old one is no PVT, or the named one does not exist.
    """
    if given is None:
        own = own_backbone(old)
        if own is None:
            raise UserError(
                f'{type_name(old)} is no PVT whose arch could be kept; name the one to swap in, '
                "such as --arch v2_b2 (backbone=dict(type='PVTv2', arch='b2'))."
            )
        kind = own.settings['type']
        return Choice(_shared(own, kind, True), _arch(own.settings)['dims'], own, True)
    settings, dims = make_backbone(given)
    try:
        own = own_backbone(old)
    except SwapRefusedError:
        own = None  # it is replaced as any other backbone is
    if own is None:
        return Choice(settings, dims)
    same = own.settings['type'] == settings['type'] and _arch(own.settings) == _arch(settings)
    asked = {**_plain(dict(given)), 'type': settings['type']}
    return Choice({**settings, **_shared(own, settings['type'], same), **asked}, dims, own, same)


def _arch(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arch of a PVT with all its keys, as tuples."""
    arch = resolve_arch(settings['arch'], ARCHS[settings['type']])
    return {'linear': False} | {k: v if k == 'linear' else tuple(v) for k, v in arch.items()}


def _shared(own: Own, kind: str, same: bool) -> dict[str, Any]:
    """Return the arguments of a PVT that another of this kind takes too.

    The weights and the drop path rate belong to the arch: they are shared only by the same one.
    """
    left_out = {'out_indices'} | (set() if same else {'arch', 'type', 'init_cfg', 'drop_path_rate'})
    if kind == 'PVTv2' and own.settings['type'] == 'PVT':
        left_out |= {'sr_mode', 'with_cls_token'}
    return {key: value for key, value in own.settings.items() if key not in left_out}


def _place(choice: Choice, old: Mapping[str, Any], levels: Sequence[Level]) -> dict[str, Any]:
    """Return the new backbone, with the old one's levels, image channels and checkpointing."""
    new = copy.deepcopy(choice.settings)
    stages = tuple(level.stage for level in levels)
    if stages != ALL_STAGES:
        new['out_indices'] = stages
    if old.get('with_cp'):
        new.setdefault('with_cp', True)
    if old.get('in_channels', 3) != 3:
        new.setdefault('in_channels', old['in_channels'])
    weights = new.get('init_cfg')
    if choice.own and choice.same and weights == choice.own.settings.get('init_cfg'):
        return new
    if new.get('in_channels', 3) != 3 and weights:
        # One channel takes the sum of the weights for red, green and blue; more repeat them.
        new.setdefault('adapt_in_channels', 'sum' if new['in_channels'] == 1 else 'repeat')
    return new


# Necks and heads: their settings are mapped from the old levels to the new ones


def _replace_list(part: dict, key: str, old: Sequence[Level], new: Sequence[Level]) -> None:
    found = part.get(key)
    if not isinstance(found, (list, tuple)) or list(found) != [level.channels for level in old]:
        _disagree(part, key, [level.channels for level in old])
    part[key] = type(found)(level.channels for level in new)  # type: ignore[misc]


def _replace_int(part: dict, key: str, old: Level, new: Level) -> None:
    if part.get(key) != old.channels:
        _disagree(part, key, old.channels)
    part[key] = new.channels


def _disagree(part: Mapping[str, Any], key: str, expected: Any) -> None:
    raise SwapRefusedError(
        Refusal.CHANNELS,
        f'{type_name(part)} has {key}={part.get(key)}, but the old backbone gives {expected}: '
        'correct the config first.',
    )


#: Necks that take a list with the channels of every level.
LIST_NECKS = (
    'CSPNeXtPAFPN',
    'ChannelMapper',
    'FPG',
    'FPN',
    'FPN_CARAFE',
    'FPN_DropBlock',
    'HRFPN',
    'JPU',
    'MultiLevelNeck',
    'NASFCOS_FPN',
    'NASFPN',
    'PAFPN',
    'YOLOXPAFPN',
)
#: Necks that take the channels of the last level.
LAST_LEVEL_NECKS = ('CTResNetNeck', 'DilatedEncoder')
#: Necks that keep channels as they are.
PLAIN_NECKS = ('GlobalAveragePooling',)

Levels = list[Level]


def _map_neck(neck: dict, old: Levels, new: Levels) -> tuple[Levels, Levels]:
    """Map a neck; return the old and new levels that it passes on to the heads, if any."""
    name = type_name(neck)
    if name in PLAIN_NECKS:
        return old, new
    if name in LAST_LEVEL_NECKS:
        _replace_int(neck, 'in_channels', old[-1], new[-1])
    elif name in LIST_NECKS:
        _replace_list(neck, 'in_channels', old, new)
        _check_groups(neck, new)
    else:
        raise SwapRefusedError(
            Refusal.UNKNOWN_NECK,
            f'How the neck {name} reads a backbone is not known here; known are '
            f'{", ".join(sorted((*LIST_NECKS, *LAST_LEVEL_NECKS, *PLAIN_NECKS)))}.',
        )
    if name != 'JPU':
        return [], []
    # JPU passes on all levels but the last, which its own output replaces.
    end = neck.get('end_level', -1)
    own = Level(-1, 0, 0)
    kept = slice(neck.get('start_level', 0), (len(old) if end == -1 else end) - 1)
    return [*old[kept], own], [*new[kept], own]


def _check_groups(neck: Mapping[str, Any], levels: Levels) -> None:
    """Refuse a group norm that cannot divide half of a level's channels, as these necks do."""
    norm = neck.get('norm_cfg') or {}
    if type_name(neck) not in ('CSPNeXtPAFPN', 'YOLOXPAFPN') or type_name(norm) != 'GN':
        return
    odd = [level.channels for level in levels if level.channels // 2 % norm['num_groups']]
    if odd:
        raise SwapRefusedError(
            Refusal.CHANNELS,
            f'{type_name(neck)} normalises half of {odd[0]} channels in {norm["num_groups"]} '
            'groups, which does not come out even: take another arch or another norm_cfg.',
        )


#: Heads that pick their levels by ``in_index``.
INDEXED_HEADS = (
    'ANNHead',
    'APCHead',
    'ASPPHead',
    'CCHead',
    'DAHead',
    'DMHead',
    'DNLHead',
    'DepthwiseSeparableASPPHead',
    'DepthwiseSeparableFCNHead',
    'EMAHead',
    'EncHead',
    'FCNHead',
    'FPNHead',
    'GCHead',
    'ISAHead',
    'LightHamHead',
    'NLHead',
    'OCRHead',
    'PSAHead',
    'PSPHead',
    'SegformerHead',
    'SegmenterMaskTransformerHead',
    'UPerHead',
)
#: Heads that read all levels, a list.
WHOLE_HEADS = ('Mask2FormerHead', 'Mask2FormerTrackHead', 'MaskFormerHead')
#: Heads that read no features.
BLIND_HEADS = ('MaskFormerFusionHead',)


def _map_head(head: dict, old: Levels, new: Levels) -> None:
    """Map a head that stands on these levels."""
    name = type_name(head)
    if name in BLIND_HEADS:
        return
    if name == 'IterativeDecodeHead':
        _map_head(head['kernel_generate_head'], old, new)
    elif name in INDEXED_HEADS:
        _map_indexed_head(head, old, new)
    elif name in WHOLE_HEADS:
        _replace_list(head, 'in_channels', old, new)
    elif name == 'LinearReIDHead' and len(old) == 1:
        _replace_int(head, 'in_channels', old[0], new[0])
    elif name == 'RPNHead' and len(old) == 1:
        _replace_int(head, 'in_channels', old[0], new[0])
        _replace_stride(head.get('anchor_generator', {}), 'strides', old[0], new[0])
    elif name == 'StandardRoIHead' and len(old) == 1:
        _map_roi_head(head, old[0], new[0])
    else:
        raise SwapRefusedError(
            Refusal.UNKNOWN_HEAD,
            f'How the head {name} reads a backbone without a neck is not known here.',
        )


def _indices(head: Mapping[str, Any]) -> Sequence[int]:
    index = head.get('in_index', -1)
    return index if isinstance(index, (list, tuple)) else [index]


def _map_indexed_head(head: dict, old: Levels, new: Levels) -> None:
    index = head.get('in_index', -1)
    indices = _indices(head)
    if not all(-len(old) <= i < len(old) for i in indices):
        raise SwapRefusedError(
            Refusal.CHANNELS,
            f'{type_name(head)} reads in_index={index}, but the old backbone gives {len(old)} '
            'levels: mend the config first.',
        )
    read = [old[i] for i in indices], [new[i] for i in indices]
    if any(level.stage < 0 for level in read[0]):  # the neck's own output
        _map_passed_on(head, *read)
    elif isinstance(index, (list, tuple)):
        concatenated = sum(level.channels for level in read[0])
        if head.get('input_transform') == 'resize_concat' and head.get('channels') == concatenated:
            head['channels'] = sum(level.channels for level in read[1])
        _replace_list(head, 'in_channels', *read)
    else:
        _replace_int(head, 'in_channels', read[0][0], read[1][0])
    if head.get('c1_in_channels'):
        _replace_int(head, 'c1_in_channels', old[0], new[0])


def _map_passed_on(head: dict, old: Levels, new: Levels) -> None:
    """Map those channels of a head that the neck passes on; those of the neck's output stay."""
    found = head['in_channels']
    if isinstance(found, int):
        return
    mapped = list(found)
    for i, (before, after) in enumerate(zip(old, new)):
        if before.stage >= 0:
            if mapped[i] != before.channels:
                _disagree(head, 'in_channels', [level.channels or 'any' for level in old])
            mapped[i] = after.channels
    head['in_channels'] = type(found)(mapped)


def _replace_stride(part: dict, key: str, old: Level, new: Level) -> None:
    if list(part.get(key, ())) != [old.stride]:
        _disagree(part, key, [old.stride])
    part[key] = [new.stride]


def _map_roi_head(head: dict, old: Level, new: Level) -> None:
    for name in ('bbox', 'mask'):
        extractor, part = head.get(f'{name}_roi_extractor'), head.get(f'{name}_head')
        if extractor:
            _replace_int(extractor, 'out_channels', old, new)
            _replace_stride(extractor, 'featmap_strides', old, new)
        if part:
            _replace_int(part, 'in_channels', old, new)


def _check_one_size(host: Mapping[str, Any], new: Levels) -> None:
    """Refuse an OCRHead whose level has another size than the output of the head before it."""
    heads = host.get('decode_head')
    if host.get('neck') or not isinstance(heads, list):
        return
    read = [new[_indices(head)[0]].stride for head in heads]
    if len(set(read)) > 1 and any(type_name(head) == 'OCRHead' for head in heads):
        raise SwapRefusedError(
            Refusal.ONE_SIZE,
            'The OCRHead needs its level as large as the output of the head before it, but the '
            f'levels of a PVT that they read lie at strides {", ".join(map(str, read))}; take a '
            'config whose heads read all levels, such as '
            'mmseg::ocrnet/ocrnet_hr18_4xb2-40k_cityscapes-512x1024.py.',
        )


#: Parts of a model that are no heads.
_NOT_HEADS = ('backbone', 'neck', 'data_preprocessor', 'train_cfg', 'test_cfg', 'init_cfg')


def _heads(host: Mapping[str, Any]) -> Iterator[dict]:
    for key, value in host.items():
        if key in _NOT_HEADS or key.startswith('teacher_'):
            continue
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, dict) and 'type' in part:
                yield part


# A whole model


def _hosts(model: Any) -> Iterator[dict]:
    """Yield the parts of a model that have a backbone: itself, or the detectors that it wraps."""
    for node in iter_dicts(model):
        if isinstance(node.get('backbone'), dict) and 'type' in node['backbone']:
            yield node


def _swap_host(
    host: dict, backbone: Mapping[str, Any] | None, allow_stride_change: bool
) -> tuple[bool, list[str]]:
    """Swap the backbone of one model in place.

    Returns:
        Whether the arch is still the same, and the changes.
    """
    before = copy.deepcopy(host)
    _take_pretrained(host)
    choice = _choose(backbone, host['backbone'])
    levels = old_levels(host['backbone'])
    new = [Level(at.stage, choice.dims[at.stage], TOTAL_STRIDES[at.stage]) for at in levels]
    if (host.get('roi_head') or {}).get('shared_head'):
        raise SwapRefusedError(
            Refusal.SHARED_HEAD,
            'The RoI head runs the last stage of the ResNet (shared_head), which a PVT has not; '
            'take the config with an FPN.',
        )
    old = host['backbone']
    host['backbone'] = _place(choice, old, levels)
    seen = levels, new
    if host.get('neck'):
        neck = host['neck'][0] if isinstance(host['neck'], (list, tuple)) else host['neck']
        seen = _map_neck(neck, levels, new)
    if seen[0]:
        for head in _heads(host):
            _map_head(head, *seen)
    _check_one_size(host, new)
    strides = [level.stride for level in levels], [level.stride for level in new]
    if strides[0] != strides[1] and not allow_stride_change:
        raise SwapRefusedError(
            Refusal.STRIDE,
            f'The levels of this {type_name(before["backbone"])} lie at strides '
            f'{", ".join(map(str, strides[0]))}, those of a PVT at '
            f'{", ".join(map(str, strides[1]))}: the features get coarser. Allow it with '
            'allow_stride_change=True (--allow-stride-change).',
        )
    return choice.same, [
        *_describe_backbone(old, host['backbone'], choice),
        *([f'strides {strides[0]} became {strides[1]}'] if strides[0] != strides[1] else []),
        *([] if choice.same else _drop_weights(host)),
        *_differences(before, host),
    ]


def _take_pretrained(host: dict) -> None:
    """Give the weights that mmseg's ``pretrained`` names to a PVT itself, which may keep them."""
    is_pvt = type_name(host['backbone']) in _MMDET or _named_backbone(host['backbone'])
    if host.get('pretrained') and is_pvt:
        host['backbone'].pop('init_cfg', None)
        host['backbone']['pretrained'] = host.pop('pretrained')


def _describe_backbone(old: Mapping[str, Any], new: Mapping[str, Any], choice: Choice) -> list[str]:
    sizes = [old[key] for key in ('depth', 'arch') if isinstance(old.get(key), (int, str))]
    size = f' {sizes[0]}' if sizes else ''
    translated = choice.own.translated if choice.own else frozenset()
    mapped = {'depth', 'arch', 'in_channels', 'num_stages', 'out_indices', '_scope_'}
    dropped = ', '.join(sorted(set(old) - set(new) - mapped - translated))
    name = new['arch'] if isinstance(new['arch'], str) else 'of its own arch'
    text = f'backbone: {type_name(old)}{size} became {new["type"]} {name}'
    changes = [f'{text}, without {dropped}' if dropped else text]
    if choice.own and choice.same and translated:
        arch, weights = _arch(new), choice.own.settings.get('init_cfg')
        kept = f', and its weights, {_value(weights)}' if weights == new.get('init_cfg') else ''
        changes.append(
            f'its depths {_joined(arch["depths"])} and widths {_joined(arch["dims"])} stay'
            f'{kept if weights else ""}'
        )
    theirs = {**old, **(choice.own.settings if choice.own else {})}
    for key in sorted(set(theirs) & set(new) - {'type', 'arch', 'in_channels', 'out_indices'}):
        if theirs[key] != new[key]:
            changes.append(f'its {key}: {_value(theirs[key])} became {_value(new[key])}')
    if 'adapt_in_channels' in new and 'adapt_in_channels' not in old:
        changes.append(
            f'its weights for RGB are adapted to {new["in_channels"]} image channels '
            f'({new["adapt_in_channels"]})'
        )
    return changes


def _joined(values: Sequence[int]) -> str:
    return ', '.join(map(str, values))


def _value(value: Any) -> str:
    """Show a value; of weights, only the file."""
    file = value.get('checkpoint') if isinstance(value, dict) else None
    return str(file or value)


def _drop_weights(host: dict) -> list[str]:
    """Remove the initial weights of the whole model or of its old backbone."""
    changes = []
    if host.pop('pretrained', None):
        changes.append("pretrained: removed, the old backbone's weights")
    if (host.get('init_cfg') or {}).get('type') == 'Pretrained':
        host.pop('init_cfg')
        changes.append('init_cfg: removed, weights of a model with the old backbone')
    return changes


def _differences(before: Any, after: Any, path: str = '') -> list[str]:
    """Return the values that differ between two versions of a part, backbone and weights aside."""
    if isinstance(before, dict) and isinstance(after, dict):
        skipped = ('backbone', 'pretrained', 'init_cfg') if not path else ()
        return [
            line
            for key in after
            if key not in skipped
            for line in _differences(before.get(key), after[key], f'{path}.{key}'.strip('.'))
        ]
    if (
        isinstance(before, (list, tuple))
        and len(before) == len(after)
        and any(isinstance(item, (dict, list, tuple)) for item in after)
    ):
        return [
            line
            for i, pair in enumerate(zip(before, after))
            for line in _differences(*pair, f'{path}.{i}')
        ]
    return [] if before == after else [f'{path}: {before} became {after}']


# Images


def _set_normalisation(model: dict, statistics: bool) -> list[str]:
    """Normalise images as the published weights expect, and pad them to whole patches.

    Args:
        model: The model, or a config with a ``data_preprocessor`` at its top.
        statistics: Set mean and std; those that were made for the weights that stay are kept.
    """
    changes = []
    for node in iter_dicts(model):
        preprocessor = node.get('data_preprocessor')
        if isinstance(preprocessor, dict):
            before = copy.deepcopy(preprocessor)
            _set_preprocessor(preprocessor, statistics)
            changes += _differences(before, preprocessor, 'data_preprocessor')
    return list(dict.fromkeys(changes))


def _set_preprocessor(preprocessor: dict, statistics: bool) -> None:
    if statistics and len(preprocessor.get('mean') or ()) == 3:
        preprocessor.update(copy.deepcopy(NORMALISATION))
        order = 'to_rgb' if 'to_rgb' in preprocessor else 'bgr_to_rgb'
        preprocessor[order] = True
        preprocessor.pop('rgb_to_bgr', None)
    name = type_name(preprocessor)
    if name == 'SegDataPreProcessor':
        if not preprocessor.get('test_cfg'):
            preprocessor['test_cfg'] = dict(size_divisor=32)
    elif name in ('DetDataPreprocessor', 'BoxInstDataPreprocessor', 'TrackDataPreprocessor'):
        divisor = preprocessor.get('pad_size_divisor', 1)
        preprocessor['pad_size_divisor'] = math.lcm(divisor, 32)


# Training


def _set_optimizer(cfg: dict) -> list[str]:
    """Replace SGD by AdamW, and scale the schedule's minimum with the learning rate."""
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer')
    if not optimizer or type_name(optimizer) in ADAM:
        return []
    has_roi_head = any(host.get('roi_head') for host in _hosts(cfg['model']))
    rate = ROI_LEARNING_RATE if has_roi_head else LEARNING_RATE
    new = dict(type='AdamW', lr=rate, weight_decay=WEIGHT_DECAY)
    cfg['optim_wrapper']['optimizer'] = new
    if cfg.get('optimizer') == optimizer:  # the variable that it was made from
        cfg['optimizer'] = dict(new)
    old_rate = optimizer.get('lr', rate)
    changes = [
        f'optimizer: {type_name(optimizer)}, learning rate {old_rate:g}, became AdamW, '
        f'learning rate {rate:g}, weight decay {WEIGHT_DECAY:g}'
    ]
    schedulers = cfg.get('param_scheduler') or []
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        if scheduler.get('eta_min'):
            floor = scheduler['eta_min']
            scheduler['eta_min'] = float(f'{floor * rate / old_rate:.6g}')
            changes.append(
                f'param_scheduler: eta_min {floor:g} became {scheduler["eta_min"]:g}, the same '
                'fraction of the learning rate'
            )
    return changes


def _import_package(cfg: dict) -> list[str]:
    """Add pvt_mm to the config's imports, and its hook."""
    changes = []
    imports = cfg.setdefault('custom_imports', dict(imports=[], allow_failed_imports=False))
    names = imports['imports']
    names = [names] if isinstance(names, str) else list(names)
    if 'pvt_mm' not in names:
        imports['imports'] = [*names, 'pvt_mm']
        changes.append('custom_imports: pvt_mm added')
    hooks = list(cfg.get('custom_hooks') or [])
    if not any(type_name(hook) == 'PVTCheckpointHook' for hook in hooks):
        cfg['custom_hooks'] = [*hooks, dict(type='PVTCheckpointHook')]
        changes.append('custom_hooks: PVTCheckpointHook added')
    return changes


# A whole config


def swap_backbone(
    cfg: str | Path | Config,
    backbone: Mapping[str, Any] | None = None,
    *,
    allow_stride_change: bool = False,
    keep_optimizer: bool = False,
) -> Config:
    """Return a config with a PVT in place of its backbone; the given one is not changed.

    Args:
        cfg: A config, its file, or a name such as
            ``mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py``.
        backbone: ``type`` (``'PVT'`` or ``'PVTv2'``), ``arch`` and any of their other arguments. A
            published arch gets its ImageNet weights unless ``init_cfg`` is given. In place of a
            PVT, ours or mmdet's, it keeps the other arguments of that, and its weights where the
            arch is the same. None keeps the arch too.
        allow_stride_change: Swap a dilated backbone too: its levels become coarser.
        keep_optimizer: Keep SGD and its learning rate; they are not replaced by AdamW.

    Raises:
        SwapRefusedError: Where this config cannot be swapped; its ``reason`` says why.
        UserError: Where there is no such config, backbone or arch.
    """
    swapped = swap_with_changes(
        cfg, backbone, allow_stride_change=allow_stride_change, keep_optimizer=keep_optimizer
    )
    return swapped.cfg


def swap_with_changes(
    cfg: str | Path | Config,
    backbone: Mapping[str, Any] | None = None,
    *,
    allow_stride_change: bool = False,
    keep_optimizer: bool = False,
) -> Swapped:
    """Do the same as ``swap_backbone``, and also return a sentence for each change."""
    if not isinstance(cfg, Config):
        cfg = read_config(cfg, import_custom_modules=False)
    refuse_old_config(cfg)
    if backbone is not None:
        make_backbone(backbone)  # a wrong one is told first
    plain = _plain(cfg.to_dict())
    model = plain.get('model')
    if not isinstance(model, dict):
        raise SwapRefusedError(
            Refusal.NO_MODEL, 'The config defines no model; give one that can be trained.'
        )
    parts = [(copy.deepcopy(node), node) for node in iter_dicts(model)]
    hosts = list(_hosts(model))
    if not hosts:
        raise SwapRefusedError(
            Refusal.NO_BACKBONE,
            f'The model {type_name(model)} has no part named backbone, so nothing can be swapped.',
        )
    changes: list[str] = []
    same = True
    for host in hosts:
        is_same, said = _swap_host(host, backbone, allow_stride_change)
        same, changes = same and is_same, changes + said
    if not same and all(host is not model for host in hosts):
        changes += _drop_weights(model)
    if any('teacher_config' in host or 'teacher_backbone' in host for host in hosts):
        changes.append('the teacher keeps its backbone, whose trained weights it needs')
    changes += _set_normalisation(model, statistics=not same)
    _update_variables(plain, parts)
    if 'data_preprocessor' in plain and 'data_preprocessor' not in model:  # the Runner adds it
        changes += _set_normalisation(
            {'data_preprocessor': plain['data_preprocessor']}, statistics=not same
        )
    if not keep_optimizer:
        changes += _set_optimizer(plain)
    changes += _import_package(plain)
    if plain.get('load_from') and not same:
        plain['load_from'] = None
        changes.append('load_from: removed, weights of a model with the old backbone')
    return Swapped(Config(plain), list(dict.fromkeys(changes)))


def _update_variables(cfg: dict, parts: Sequence[tuple[dict, dict]]) -> None:
    """Change the variables that the model was made from, such as ``detector``, like the model."""
    for key, value in cfg.items():
        if key != 'model' and isinstance(value, dict):
            cfg[key] = next((copy.deepcopy(new) for old, new in parts if old == value), value)


def _plain(node: Any) -> Any:
    """Return builtin containers; a class or function that is a type becomes its dotted name."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_plain(item) for item in node)
    if isinstance(node, (type, FunctionType)):
        return f'{node.__module__}.{node.__qualname__}'
    return node


# Files


def write(swapped: Swapped, file: str | Path, source: str) -> None:
    """Write a config without bases, below a comment with the changes.

    Args:
        swapped: The config and the changes.
        file: The ``.py`` file to write.
        source: The config that was swapped.
    """
    lines = [f'{source}, its backbone swapped for a PVT. Changed:', *swapped.changes]
    header = '\n'.join(f'#  - {line}' if i else f'# {line}' for i, line in enumerate(lines))
    Path(file).write_text(f'{header}\n{swapped.cfg.pretty_text.strip()}\n', encoding='utf-8')
