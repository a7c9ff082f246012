"""The hot operations of PVT as plain functions on tensors: linear, mlp, attention.

Tokens are (B, H, W, C). A channels-last image is a view of such tokens, so that convolutions on
them need no transpose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Project the last dimension.

    Shape:
        x: (..., in) -> (..., out); weight: (out, in); bias: (out,).
    """
    return F.linear(x, weight, bias)


def mlp(
    x: Tensor,
    fc1: tuple[Tensor, Tensor],
    fc2: tuple[Tensor, Tensor],
    dwconv: tuple[Tensor, Tensor] | None = None,
    relu: bool = False,
    drop_rate: float = 0.0,
) -> Tensor:
    """Run a two-layer perceptron, with a depth-wise 3x3 convolution between the layers in v2.

    Paper: `PVTv2 <https://arxiv.org/abs/2106.13797>`_, Sec. 3.3.

    Args:
        x: Tokens.
        fc1: Weight (hidden, C) and bias (hidden,) of the first layer.
        fc2: Weight (C, hidden) and bias (C,) of the second layer.
        dwconv: Weight (hidden, 1, 3, 3) and bias (hidden,) of the depth-wise convolution.
        relu: Put a ReLU before the depth-wise convolution, as linear attention does.
        drop_rate: Dropout rate after each layer; pass 0 in evaluation.

    Shape:
        x: (B, H, W, C) -> (B, H, W, C).
    """
    x = linear(x, *fc1)  # (B, H, W, hidden)
    if relu:
        x = F.relu(x)
    if dwconv is not None:
        image = x.permute(0, 3, 1, 2)  # (B, hidden, H, W), channels-last
        weight, bias = dwconv
        image = F.conv2d(image, weight, bias, padding=1, groups=weight.shape[0])
        x = image.permute(0, 2, 3, 1)  # (B, H, W, hidden)
    x = F.gelu(x)
    if drop_rate:
        x = F.dropout(x, drop_rate)
    x = linear(x, *fc2)  # (B, H, W, C)
    return F.dropout(x, drop_rate) if drop_rate else x


def attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, drop_rate: float = 0.0
) -> Tensor:
    """Attend with several heads, without writing the query x key matrix where PyTorch can do so.

    Paper: `PVT <https://arxiv.org/abs/2102.12122>`_, Sec. 3.3, eq. 4.

    Args:
        query: Projected queries.
        key: Projected keys.
        value: Projected values.
        num_heads: Heads that C is split into.
        drop_rate: Dropout rate of the attention weights; pass 0 in evaluation.

    Shape:
        query: (B, N, C); key and value: (B, M, C) -> (B, N, C).
    """
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=drop_rate)  # (B, heads, N, C/heads)
    return out.transpose(1, 2).flatten(2)


def resize_grid(grid: Tensor, height: int, width: int) -> Tensor:
    """Resize a grid of vectors bilinearly, as the reference does with position embeddings.

    Shape:
        grid: (1, h, w, C) -> (1, height, width, C).
    """
    image = grid.permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(height, width), mode='bilinear', align_corners=False)
    return image.permute(0, 2, 3, 1)


def is_tracing() -> bool:
    """Whether torch.compile or torch.export is recording, so that sizes must stay symbolic."""
    return _is_compiling()


try:
    _is_compiling = torch.compiler.is_compiling
except AttributeError:  # PyTorch 2.1
    _is_compiling = torch._dynamo.is_compiling
