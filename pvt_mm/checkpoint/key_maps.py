"""Checkpoint formats as tables of names, and how a format is recognised.

A table maps *atoms*, the smallest tensors that all formats share (queries, keys and values apart),
to a format's own names. One table serves both directions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Atom(NamedTuple):
    """The name that a tensor has in every format.

    ``stage`` is -1 for what stands outside of the stages, ``block`` -1 outside of the blocks, and
    ``leaf`` is ``weight``, ``bias``, or empty for a bare parameter.
    """

    part: str
    stage: int = -1
    block: int = -1
    leaf: str = ''


@dataclass(frozen=True, eq=False)  # each is one of its kind, and a key of caches
class Format:
    """How one format names the atoms.

    Attributes:
        name: As users know it.
        rows: Parts, and the template of the one tensor that holds them, joined along dimension 0.
        first_stage: Number of the first stage in names.
        first_block: Number of a stage's first block in names.
        prefix: Stands before every key but the head's; may be missing when read.
        alias: A beginning of keys, and what it stands for in the templates.
        conv_mlp: Whether fc1 and fc2 are stored as 1x1 convolutions.
        grid_position: Whether position embeddings are stored as (1, H, W, C), not (1, H*W, C).
    """

    name: str
    rows: dict[tuple[str, ...], str]
    first_stage: int = 0
    first_block: int = 0
    prefix: str = ''
    alias: tuple[str, str] | None = None
    conv_mlp: bool = False
    grid_position: bool = False


def _rows(stage: dict[str, str], block: str, names: dict[str, str], extra: dict[str, str]) -> dict:
    """Assemble a format's rows from templates of a stage's parts and names inside a block."""
    rows: dict[tuple[str, ...], str] = {(part,): name for part, name in stage.items()}
    for parts, name in names.items():
        leaf = '{leaf}' if name.endswith('_') else '.{leaf}'
        rows[tuple(f'blocks.{part}' for part in parts.split('+'))] = f'{block}.{name}{leaf}'
    return rows | {(part,): template for part, template in extra.items()}


_BLOCK_NAMES = {
    'norm1': 'norm1',
    'attn.q': 'attn.q',
    'attn.k+attn.v': 'attn.kv',
    'attn.sr': 'attn.sr',
    'attn.norm': 'attn.norm',
    'attn.proj': 'attn.proj',
    'norm2': 'norm2',
    'mlp.fc1': 'mlp.fc1',
    'mlp.dwconv': 'mlp.dwconv',
    'mlp.fc2': 'mlp.fc2',
}
_MMDET_ATTENTION = {
    'norm1': 'norm1',
    'attn.q+attn.k+attn.v': 'attn.attn.in_proj_',
    'attn.proj': 'attn.attn.out_proj',
    'attn.sr': 'attn.sr',
    'attn.norm': 'attn.norm',
    'norm2': 'norm2',
    'mlp.fc1': 'ffn.layers.0',
}

PVT_MM = Format(
    'pvt_mm',
    _rows(
        {
            'patch_embed.proj': 'stages.{stage}.patch_embed.proj.{leaf}',
            'patch_embed.norm': 'stages.{stage}.patch_embed.norm.{leaf}',
            'pos_embed': 'stages.{stage}.pos_embed',
            'norm': 'stages.{stage}.norm.{leaf}',
        },
        'stages.{stage}.blocks.{block}',
        _BLOCK_NAMES,
        {
            'cls_token': 'stages.3.cls_token',
            'cls_position': 'stages.3.cls_position',
            'final_norm': 'stages.3.final_norm.{leaf}',
            'head': 'head.{leaf}',
        },
    ),
    grid_position=True,
)

_OFFICIAL = Format(
    'official',
    _rows(
        {
            'patch_embed.proj': 'patch_embed{stage}.proj.{leaf}',
            'patch_embed.norm': 'patch_embed{stage}.norm.{leaf}',
            'pos_embed': 'pos_embed{stage}',
            'norm': 'norm{stage}.{leaf}',
        },
        'block{stage}.{block}',
        _BLOCK_NAMES | {'mlp.dwconv': 'mlp.dwconv.dwconv'},
        {'cls_token': 'cls_token', 'final_norm': 'norm.{leaf}', 'head': 'head.{leaf}'},
    ),
    first_stage=1,
)

_TIMM = Format(
    'timm',
    _rows(
        {
            'patch_embed.proj': 'stages.{stage}.downsample.proj.{leaf}',
            'patch_embed.norm': 'stages.{stage}.downsample.norm.{leaf}',
            'norm': 'stages.{stage}.norm.{leaf}',
        },
        'stages.{stage}.blocks.{block}',
        _BLOCK_NAMES,
        {'head': 'head.{leaf}'},
    ),
    alias=('patch_embed.', 'stages.0.downsample.'),
)

_HUGGINGFACE_NAMES = {
    'norm1': 'layer_norm_1',
    'attn.q': 'attention.self.query',
    'attn.k': 'attention.self.key',
    'attn.v': 'attention.self.value',
    'attn.sr': 'attention.self.sequence_reduction',
    'attn.norm': 'attention.self.layer_norm',
    'attn.proj': 'attention.output.dense',
    'norm2': 'layer_norm_2',
    'mlp.fc1': 'mlp.dense1',
    'mlp.fc2': 'mlp.dense2',
}

_HUGGINGFACE_V1 = Format(
    'huggingface',
    _rows(
        {
            'patch_embed.proj': 'encoder.patch_embeddings.{stage}.projection.{leaf}',
            'patch_embed.norm': 'encoder.patch_embeddings.{stage}.layer_norm.{leaf}',
            'pos_embed': 'encoder.patch_embeddings.{stage}.position_embeddings',
        },
        'encoder.block.{stage}.{block}',
        _HUGGINGFACE_NAMES,
        {
            'cls_token': 'encoder.patch_embeddings.3.cls_token',
            'final_norm': 'encoder.layer_norm.{leaf}',
            'head': 'classifier.{leaf}',
        },
    ),
    prefix='pvt.',
)

_HUGGINGFACE_V2 = Format(
    'huggingface',
    _rows(
        {
            'patch_embed.proj': 'encoder.layers.{stage}.patch_embedding.proj.{leaf}',
            'patch_embed.norm': 'encoder.layers.{stage}.patch_embedding.layer_norm.{leaf}',
            'norm': 'encoder.layers.{stage}.layer_norm.{leaf}',
        },
        'encoder.layers.{stage}.blocks.{block}',
        {
            'norm1': 'layer_norm_1',
            'attn.q': 'attention.query',
            'attn.k': 'attention.key',
            'attn.v': 'attention.value',
            'attn.sr': 'attention.spatial_reduction',
            'attn.norm': 'attention.layer_norm',
            'attn.proj': 'attention.proj',
            'norm2': 'layer_norm_2',
            'mlp.fc1': 'mlp.dense1',
            'mlp.dwconv': 'mlp.dwconv.dwconv',
            'mlp.fc2': 'mlp.dense2',
        },
        {'head': 'classifier.{leaf}'},
    ),
    prefix='pvt_v2.',
)

_MMDET_STAGE = {
    'patch_embed.proj': 'layers.{stage}.0.projection.{leaf}',
    'patch_embed.norm': 'layers.{stage}.0.norm.{leaf}',
}
_MMDET_V1 = Format(
    'mmdet',
    _rows(
        {**_MMDET_STAGE, 'pos_embed': 'layers.{stage}.1.0.pos_embed'},
        'layers.{stage}.1.{block}',
        {**_MMDET_ATTENTION, 'mlp.fc2': 'ffn.layers.3'},
        {},
    ),
    first_block=1,  # the position embedding is layer 0
    conv_mlp=True,
)
_MMDET_V2 = Format(
    'mmdet',
    _rows(
        {**_MMDET_STAGE, 'norm': 'layers.{stage}.2.{leaf}'},
        'layers.{stage}.1.{block}',
        {**_MMDET_ATTENTION, 'mlp.dwconv': 'ffn.layers.1', 'mlp.fc2': 'ffn.layers.4'},
        {},
    ),
    conv_mlp=True,
)

_HUGGINGFACE_MIT = Format(
    'huggingface',
    _rows(
        {
            'patch_embed.proj': 'encoder.patch_embeddings.{stage}.proj.{leaf}',
            'patch_embed.norm': 'encoder.patch_embeddings.{stage}.layer_norm.{leaf}',
            'norm': 'encoder.layer_norm.{stage}.{leaf}',
        },
        'encoder.block.{stage}.{block}',
        _HUGGINGFACE_NAMES | {'attn.sr': 'attention.self.sr', 'mlp.dwconv': 'mlp.dwconv.dwconv'},
        {'head': 'classifier.{leaf}'},
    ),
    prefix='segformer.',
)

FORMATS = (PVT_MM, _OFFICIAL, _TIMM, _HUGGINGFACE_V1, _HUGGINGFACE_V2, _MMDET_V1, _MMDET_V2)

#: SegFormer has an encoder with the layers of PVTv2: read, never written.
_READABLE = (*FORMATS, _HUGGINGFACE_MIT)

#: Linear layers that some formats store as 1x1 convolutions.
MLP_LINEARS = ('blocks.mlp.fc1', 'blocks.mlp.fc2')

#: What only classification has: dropped on the way into a backbone that has no place for it.
CLASSIFICATION_PARTS = ('cls_token', 'cls_position', 'final_norm', 'head')

_INSERTED = re.compile(r'\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)[.]')


def _pattern(template: str, fmt: Format) -> re.Pattern[str]:
    pattern = re.escape(template)
    if fmt is _TIMM:  # features_only writes stages_0
        pattern = pattern.replace(re.escape('stages.'), 'stages[._]')
    for field, what in (('stage', r'\d+'), ('block', r'\d+'), ('leaf', 'weight|bias')):
        pattern = pattern.replace(re.escape(f'{{{field}}}'), f'(?P<{field}>{what})')
    return re.compile(pattern)


_PATTERNS = {
    fmt: [(_pattern(template, fmt), parts) for parts, template in fmt.rows.items()]
    for fmt in _READABLE
}
_QUERIES = [
    re.compile(f'((?:.*[.])?){_pattern(template, fmt).pattern}', re.DOTALL)
    for fmt in _READABLE
    for parts, template in fmt.rows.items()
    if 'blocks.attn.q' in parts
]


def plain(key: str) -> str:
    """Return a key without the names that compilation, FSDP and recomputation put into it."""
    return _INSERTED.sub('', key)


def query_prefixes(key: str) -> list[str]:
    """Return what stands before a key of any format for the queries of an attention.

    Every block of a PVT has such a key, and hardly any other model does.
    """
    return [found[1] for pattern in _QUERIES if (found := pattern.fullmatch(key))]


@functools.lru_cache(maxsize=2**15)  # one load asks several times
def match(key: str, fmt: Format) -> tuple[Atom, ...]:
    """Return the atoms that a key of a format holds; none where the format has no such key."""
    key = plain(key).removeprefix(fmt.prefix)
    if fmt.alias and key.startswith(fmt.alias[0]):
        key = fmt.alias[1] + key.removeprefix(fmt.alias[0])
    for pattern, parts in _PATTERNS[fmt]:
        found = pattern.fullmatch(key)
        if found:
            fields = found.groupdict()
            stage = int(fields['stage']) - fmt.first_stage if 'stage' in fields else -1
            block = int(fields['block']) - fmt.first_block if 'block' in fields else -1
            return tuple(Atom(part, stage, block, fields.get('leaf', '')) for part in parts)
    return ()


def detect_format(keys: Sequence[str]) -> Format | None:
    """Recognise a format by its keys: the one that explains most of them; None where none does.

    Keys of classification alone do not count: ``head.weight`` may be any model's.
    """
    counts = [(sum(_is_backbone_key(key, fmt) for key in keys), fmt) for fmt in _READABLE]
    best, fmt = max(counts, key=lambda item: item[0])
    return fmt if best else None


def _is_backbone_key(key: str, fmt: Format) -> bool:
    held = match(key, fmt)
    return bool(held) and held[0].part not in CLASSIFICATION_PARTS
