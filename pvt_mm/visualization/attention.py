"""Attention weights, which the fast path never stores, and the area that they cover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pvt_mm.models.layers import SpatialReductionAttention
from pvt_mm.models.pyramid import PyramidBackbone


class Attention(NamedTuple):
    """Weights and values of an attention.

    Attributes:
        weights: (B, heads, queries, keys); each row sums to 1.
        values: (B, heads, keys, dim / heads).
        key_grid: Height and width of the grid that the keys form, row by row.
    """

    weights: Tensor
    values: Tensor
    key_grid: tuple[int, int]


class StageTrace(NamedTuple):
    """What a stage computed for one image.

    Attributes:
        feature: Its output, (H, W, dim).
        attn: The attention of its last block.
        tokens: That attention's normalised input, (1, H, W, dim).
        stride: Input pixels from one token to the next.
    """

    feature: Tensor
    attn: SpatialReductionAttention
    tokens: Tensor
    stride: int


def explicit_attention(
    attn: SpatialReductionAttention, x: Tensor, queries: Sequence[int] | None = None
) -> Attention:
    """Compute attention weights from the module's own layers.

    Args:
        attn: The attention of a block.
        x: Normalised tokens.
        queries: Query tokens, counted row by row; all by default, whose matrix may be large.

    Shape:
        x: (B, H, W, dim).
    """
    reduced = attn.kv(attn.reduce(x))  # (B, h, w, 2 dim)
    tokens = x.flatten(1, 2)  # (B, H*W, dim)
    if queries is not None:
        tokens = tokens[:, list(queries)]
    key, value = reduced.flatten(1, 2).chunk(2, dim=-1)  # (B, h*w, dim) each
    q, k, v = (
        t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (attn.q(tokens), key, value)
    )  # (B, heads, queries or keys, dim / heads)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return Attention(scores.softmax(-1), v, (reduced.shape[1], reduced.shape[2]))


def attention_output(attn: SpatialReductionAttention, attention: Attention) -> Tensor:
    """Mix the values by the weights and project, as the block does.

    Shape:
        -> (B, queries, dim).
    """
    mixed = attention.weights @ attention.values  # (B, heads, queries, dim / heads)
    return attn.proj(mixed.transpose(1, 2).flatten(2))


def keyed_tokens(attn: SpatialReductionAttention, height: int, width: int) -> tuple[int, int]:
    """Return how many rows and columns of an H x W token grid the keys cover.

    Cells of sr_ratio x sr_ratio tokens leave out a rest at the lower and the right edge.
    """
    if attn.sr_mode == 'linear' or attn.sr is None:
        return height, width
    ratio = attn.sr_ratio
    return height // ratio * ratio, width // ratio * ratio


@torch.no_grad()
def trace_stages(backbone: PyramidBackbone, image: Tensor) -> list[StageTrace]:
    """Run a backbone on one image; keep each stage's output and the input of its last attention.

    Shape:
        image: (1, in_channels, H, W).
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    handles = []
    for stage in backbone.stages:
        attn = stage.blocks[-1].attn
        handles.append(attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
        handles.append(stage.register_forward_hook(lambda *args: outputs.append(args[2])))
    try:
        backbone(image)
    finally:
        for handle in handles:
            handle.remove()
    traces, stride = [], 1
    for stage, tokens, feature in zip(backbone.stages, inputs, outputs):
        stride *= stage.patch_embed.stride
        traces.append(StageTrace(feature[0], stage.blocks[-1].attn, tokens, stride))
    return traces
