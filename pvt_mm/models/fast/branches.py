"""A block and a patch embedding by the kernels: what the textbook computes, in another order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pvt_mm.models.fast import cpu
from pvt_mm.models.fast.attention import attention, has_many_scores, projected_attention
from pvt_mm.models.fast.conditions import compute_dtype
from pvt_mm.models.fast.gemm import (
    cast_kernel,
    chunk_rows,
    chunks,
    convolution,
    convolve,
    linear,
    needs_grad,
)
from pvt_mm.models.fast.mlp import add_mlp, mlp_branch

#: What does nothing to a tensor here: active dropout never comes this far.
_DROPOUTS = (nn.Dropout, nn.Identity)


def is_known_block(block: nn.Module) -> bool:
    """Tell whether the layers of a block are those that the kernels compute, and fit together.

    A layer may have been replaced by another stock one, or by one of another shape or geometry.
    """
    parts = block.__dict__['_modules']
    try:
        return _is_known_attention(parts['attn'], parts['norm1']) and _is_known_mlp(
            parts['mlp'].__dict__['_modules'], parts['norm2']
        )
    except (
        AttributeError,
        KeyError,
        ValueError,
    ):  # a layer of another kind lacks what is asked for
        return False


def _is_known_attention(attn: Any, norm: nn.LayerNorm) -> bool:
    layers = attn.__dict__['_modules']
    (dim,) = norm.normalized_shape
    square = (dim, dim)
    sr = layers.get('sr')
    return (
        _weight(layers['q']).shape == square
        and _weight(layers['kv']).shape == (2 * dim, dim)
        and _weight(layers['proj']).shape == square
        and dim % attn.num_heads == 0
        and isinstance(layers['attn_drop'], _DROPOUTS)
        and isinstance(layers['proj_drop'], _DROPOUTS)
        and (sr is None or attn.sr_mode != 'conv' or _takes_whole_patches(sr, dim))
    )


def _takes_whole_patches(conv: nn.Conv2d, dim: int) -> bool:
    """Tell whether a convolution takes patches that touch each other, without padding."""
    return (
        _weight(conv).shape == (dim, dim, *conv.stride)
        and conv.padding == (0, 0)
        and conv.dilation == (1, 1)
        and conv.groups == 1
    )


def _is_known_mlp(layers: dict[str, Any], norm: nn.LayerNorm) -> bool:
    (dim,) = norm.normalized_shape
    hidden = len(_weight(layers['fc1']))
    dwconv = layers.get('dwconv')
    before = nn.Identity if dwconv is None else (nn.ReLU, nn.Identity)
    return (
        _weight(layers['fc1']).shape == (hidden, dim)
        and _weight(layers['fc2']).shape == (dim, hidden)
        and isinstance(layers['relu'], before)
        and isinstance(layers['act'], nn.GELU)
        and isinstance(layers['drop'], _DROPOUTS)
        and (dwconv is None or _is_depthwise(dwconv, hidden))
    )


def _is_depthwise(conv: nn.Conv2d, channels: int) -> bool:
    return (
        _weight(conv).shape == (channels, 1, 3, 3)
        and conv.groups == channels
        and conv.stride == conv.padding == conv.dilation == (1, 1)
    )


def _weight(layer: nn.Module) -> Tensor:
    return layer.__dict__['_parameters']['weight']  # faster than layer.weight


def patch_embed(module: Any, x: Tensor) -> Tensor:
    """Compute ``PatchEmbed.forward``.

    Shape:
        x: (B, H, W, in_channels) -> (B, H', W', dim).
    """
    cpu.keep_freed_memory()
    tokens = convolution(x, module.proj, compute_dtype(x))
    return module.norm(tokens.to(module.norm.weight.dtype))


def block(module: Any, x: Tensor) -> Tensor:
    """Compute ``Block.forward``; ``x`` keeps its values.

    Shape:
        x: (B, H, W, dim) -> (B, H, W, dim).
    """
    cpu.keep_freed_memory()
    dtype = compute_dtype(x)
    branch = module.drop_path(_attention_branch(module, x, dtype))
    in_place = branch.dtype == x.dtype and not needs_grad(x, branch)
    x = branch.add_(x) if in_place else x + branch
    drops = getattr(module.drop_path, 'drops', True)
    if drops or _trains(x, module.norm2, module.mlp) or not x.is_contiguous():
        return x + module.drop_path(mlp_branch(module.norm2(x), module.mlp, dtype))
    return add_mlp(x, module.norm2, module.mlp, dtype)


def _trains(x: Tensor, *modules: nn.Module) -> bool:
    """Tell whether autograd would record what modules do to tokens."""
    return torch.is_grad_enabled() and (
        x.requires_grad or any(p.requires_grad for module in modules for p in module.parameters())
    )


def _attention_branch(module: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``attn(norm1(x))``."""
    attn, norm = module.attn, module.norm1
    height, width = x.shape[1:3]
    # Normalising chunk by chunk, and twice, costs less than a normalised copy that leaves the
    # cache before it is read.
    in_chunks = x.numel() > cpu.traits().chunk and not torch.is_grad_enabled()
    is_conv = attn.sr is not None and attn.sr_mode == 'conv' and attn.pool is None
    later = norm if in_chunks and is_conv else None
    tokens = x if later is not None else norm(x)
    if later is None:
        reduced = _reduce(attn, tokens, dtype)
    else:
        reduced = attn.act(attn.norm(_convolve_by_rows(x, norm, attn.sr, dtype)))
    key, value = linear(reduced, attn.kv, dtype).flatten(1, 2).chunk(2, dim=-1)  # (B, M, dim)
    tokens = tokens.flatten(1, 2)  # (B, H*W, dim)
    if has_many_scores(tokens, key) and not needs_grad(key) and not _trains(tokens, attn):
        out = projected_attention(tokens, later, attn, key, value, dtype)
    else:
        tokens = tokens if later is None else later(tokens)
        query = linear(tokens, attn.q, dtype)
        out = linear(attention(query, key, value, attn.num_heads), attn.proj, dtype)
    return out.unflatten(1, (height, width))


def _reduce(attn: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``SpatialReductionAttention.reduce``."""
    if attn.sr is None:
        return x
    if attn.pool is not None:
        x = attn.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, H', W', dim)
    layer = linear if isinstance(attn.sr, nn.Linear) else convolution
    return attn.act(attn.norm(layer(x, attn.sr, dtype)))


def _convolve_by_rows(x: Tensor, norm: nn.LayerNorm, sr: nn.Conv2d, dtype: torch.dtype) -> Tensor:
    """Normalise tokens and shrink their grid, a tile of rows at a time.

    Shape:
        x: (B, H, W, C) -> (B, H // stride, W // stride, C).
    """
    stride = sr.stride[0]
    height = x.shape[1] // stride * stride
    rows_per_tile = max(chunk_rows(x[:, :stride].numel(), x.dtype), 1) * stride
    weight, bias = cast_kernel(sr, dtype)
    tiles = [
        convolve(norm(x[:, rows]).to(dtype), weight, bias, sr)
        for rows in chunks(height, rows_per_tile)
    ]
    return torch.cat(tiles, 1)
