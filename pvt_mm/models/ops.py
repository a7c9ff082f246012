"""The hot operations of PVT as plain functions on tensors: linear, mlp, attention.

Each takes one of two roads by a static rule, ``on_cpu_kernels``: the kernels of
``pvt_mm.kernels``, or PyTorch's plain operations, as GPUs, compilers and other dtypes do.

Tokens are (B, H, W, C). A channels-last image is a view of such tokens, so that convolutions on
them need no transpose.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pvt_mm.models.fast import kernels

Layer = kernels.Layer
Norm = kernels.Norm

#: Queries x keys from which attention in pieces beats one call of PyTorch's fused one.
PIECED_SCORES = 2**17


def on_cpu_kernels(x: Tensor) -> bool:
    """Whether the CPU kernels take this tensor; the one rule for all operations here."""
    return (
        not is_tracing()
        and x.device.type == 'cpu'
        and compute_dtype(x) in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products run in: autocast's where it is on, else the tensor's own."""
    device = x.device.type
    return _autocast_dtype(device) if is_autocast(device) else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Project the last dimension.

    Shape:
        x: (..., in) -> (..., out); weight: (out, in); bias: (out,).
    """
    if not on_cpu_kernels(x):
        return F.linear(x, weight, bias)
    dtype = compute_dtype(x)
    if needs_grad(x, weight, bias):
        return kernels.LinearFunction.apply(x, weight, bias, dtype)
    return kernels.product(x.to(dtype), weight.to(dtype), bias.to(dtype))


def mlp(
    x: Tensor,
    fc1: Layer,
    fc2: Layer,
    dwconv: Layer | None = None,
    relu: bool = False,
    drop_rate: float = 0.0,
) -> Tensor:
    """Run a two-layer perceptron, with a depth-wise 3x3 convolution between the layers in v2.

    Paper: [PVTv2](https://arxiv.org/abs/2106.13797), Sec. 3.3.

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
    if drop_rate or not on_cpu_kernels(x):
        return plain_mlp(x, fc1, fc2, dwconv, relu, drop_rate)
    dtype = compute_dtype(x)
    if not needs_grad(x, *fc1, *fc2, *(dwconv or ())):
        return kernels.mlp(x, fc1, fc2, dwconv, relu, dtype)
    return kernels.MlpFunction.apply(x, *fc1, *fc2, *(dwconv or (None, None)), relu, dtype)


def add_mlp(
    x: Tensor,
    norm: Norm,
    fc1: Layer,
    fc2: Layer,
    dwconv: Layer | None = None,
    relu: bool = False,
    drop_rate: float = 0.0,
    drop_path: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return ``x + drop_path(mlp(norm(x)))``, in the place of ``x`` where autograd is off.

    Args:
        x: Tokens, not to be used again.
        norm: What comes before the perceptron, token by token.
        fc1: As for ``mlp``, and so are the other layers and ``drop_rate``.
        fc2: See ``mlp``.
        dwconv: See ``mlp``.
        relu: See ``mlp``.
        drop_rate: See ``mlp``.
        drop_path: What drops the branch for some images; None in evaluation.

    Shape:
        x: (B, H, W, C) -> (B, H, W, C).
    """
    layers = (*fc1, *fc2, *(dwconv or ()))
    in_place = not (drop_rate or drop_path or needs_grad(x, *layers)) and x.is_contiguous()
    if in_place and on_cpu_kernels(x):
        return kernels.add_mlp(x, norm, fc1, fc2, dwconv, relu, compute_dtype(x))
    branch = mlp(norm(x), fc1, fc2, dwconv, relu, drop_rate)
    return add_to(drop_path(branch) if drop_path else branch, x)


def plain_mlp(
    x: Tensor,
    fc1: Layer,
    fc2: Layer,
    dwconv: Layer | None = None,
    relu: bool = False,
    drop_rate: float = 0.0,
) -> Tensor:
    """Compute ``mlp`` in PyTorch's plain operations."""
    x = F.linear(x, *fc1)  # (B, H, W, hidden)
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
    x = F.linear(x, *fc2)  # (B, H, W, C)
    return F.dropout(x, drop_rate) if drop_rate else x


def attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, drop_rate: float = 0.0
) -> Tensor:
    """Attend with several heads, without writing the query x key matrix where that can be had.

    Paper: [PVT](https://arxiv.org/abs/2102.12122), Sec. 3.3, eq. 4.

    Args:
        query: Projected queries.
        key: Projected keys.
        value: Projected values.
        num_heads: Heads that C is split into.
        drop_rate: Dropout rate of the attention weights; pass 0 in evaluation.

    Shape:
        query: (B, N, C); key and value: (B, M, C) -> (B, N, C).
    """
    if drop_rate or not on_cpu_kernels(query):
        return plain_attention(query, key, value, num_heads, drop_rate)
    fused = kernels.FUSED_ATTENTION_IS_FASTER or not _has_many_scores(query, key)
    attend: Callable[..., Tensor]
    if needs_grad(query, key, value):
        fused |= kernels.FUSED_TRAINING_IS_FASTER and query.dtype == torch.float32
        attend = kernels.spread_attention if fused else kernels.AttentionFunction.apply
    else:
        attend = kernels.fused_attention if fused else kernels.attention
    return attend(query, key, value, num_heads)


def projected_attention(
    x: Tensor,
    query: Layer,
    key: Tensor,
    value: Tensor,
    proj: Layer,
    num_heads: int,
    drop_rate: float = 0.0,
    norm: Norm | None = None,
) -> Tensor:
    """Project queries, attend as ``attention`` does, and project the result.

    Args:
        x: Tokens that the queries come from.
        query: Weight and bias of the queries' projection.
        key: Projected keys.
        value: Projected values.
        proj: Weight and bias of the projection behind the attention.
        num_heads: Heads that C is split into.
        drop_rate: Dropout rate of the attention weights; pass 0 in evaluation.
        norm: What comes before the queries' projection, token by token.

    Shape:
        x: (B, N, C); key and value: (B, M, C) -> (B, N, C).
    """
    plain = drop_rate or needs_grad(x, key, *query, *proj) or not on_cpu_kernels(x)
    if not plain and _has_many_scores(x, key):
        dtype = compute_dtype(x)
        return kernels.projected_attention(x, norm, query, key, value, proj, num_heads, dtype)
    x = x if norm is None else norm(x)
    out = attention(linear(x, *query), key, value, num_heads, drop_rate)
    return linear(out, *proj)


def _has_many_scores(query: Tensor, key: Tensor) -> bool:
    return query.shape[1] * key.shape[1] >= PIECED_SCORES


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, drop_rate: float = 0.0
) -> Tensor:
    """Compute ``attention`` by PyTorch's fused kernel."""
    return kernels.fused_attention(query, key, value, num_heads, drop_rate)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int = 0,
    norm: Norm | None = None,
) -> Tensor:
    """Convolve tokens with a strided kernel.

    Args:
        x: Tokens.
        weight: The kernels.
        bias: Added to the result.
        stride: Tokens from one patch to the next.
        padding: Zeros on each side.
        norm: What comes before, token by token; only for patches that touch, without padding.

    Shape:
        x: (B, H, W, in) -> (B, H', W', out); weight: (out, in, k, k); bias: (out,).
    """
    if on_cpu_kernels(x):
        dtype = compute_dtype(x)
        # oneDNN's own reordering of a plain weight takes longer than the convolution at 224 x 224.
        weight = weight.to(dtype, memory_format=torch.channels_last)
        bias = None if bias is None else bias.to(dtype)
        if norm is not None:
            return kernels.reduced(x, norm, weight, bias, stride)
        return kernels.convolution(x.to(dtype), weight, bias, stride, padding)
    x = x if norm is None else norm(x)
    image = x.permute(0, 3, 1, 2)  # (B, in, H, W), channels-last
    return F.conv2d(image, weight, bias, stride, padding).permute(0, 2, 3, 1)


def normalises_in_pieces(x: Tensor) -> bool:
    """Whether tokens are so many that normalising them twice, a piece at a time, costs less.

    A normalised copy of them all would leave the cache before it is read.
    """
    return x.numel() > kernels.PIECE and not torch.is_grad_enabled() and on_cpu_kernels(x)


def add_to(branch: Tensor, x: Tensor) -> Tensor:
    """Add ``x`` to ``branch``, in its place where nobody can see it: outside of autograd.

    Shape:
        branch: (B, H, W, C); x: the same or (1, H, W, C) -> (B, H, W, C).
    """
    if is_tracing() or branch.dtype != x.dtype or needs_grad(branch, x):
        return x + branch
    return branch.add_(x)


def resize_grid(grid: Tensor, height: int, width: int) -> Tensor:
    """Resize a grid of vectors bilinearly, as the reference does with position embeddings.

    Shape:
        grid: (1, h, w, C) -> (1, height, width, C).
    """
    image = grid.permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(height, width), mode='bilinear', align_corners=False)
    return image.permute(0, 2, 3, 1)


def pool_to_grid(image: Tensor, side: int) -> Tensor:
    """Average an image over a grid of ``side`` x ``side`` cells, whatever its size.

    Shape:
        image: (B, C, H, W) -> (B, C, side, side).
    """
    if not is_exporting():
        return F.adaptive_avg_pool2d(image, side)
    # ONNX has no such pooling for sizes that are known only when the model runs; as two products
    # with the cells' weights it has.
    rows = _cell_weights(image, 2, side)  # (side, H)
    columns = _cell_weights(image, 3, side)  # (side, W)
    return rows @ (image @ columns.t())


def _cell_weights(image: Tensor, dim: int, side: int) -> Tensor:
    """Return what each of ``side`` cells takes of each position along a dimension."""
    length = image.shape[dim]
    cell = torch.arange(side, device=image.device)[:, None]
    start = cell * length // side
    end = ((cell + 1) * length + side - 1) // side
    position = torch.arange(length, device=image.device)
    inside = ((position >= start) & (position < end)).to(image.dtype)
    return inside / (end - start).to(image.dtype)


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd would record an operation on these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def is_tracing() -> bool:
    """Whether torch.compile or torch.export is recording, so that sizes must stay symbolic."""
    return bool(_is_compiling())


def is_exporting() -> bool:
    """Whether torch.export is recording, from PyTorch 2.7 on; before, it is not known."""
    known = getattr(torch.compiler, 'is_exporting', None)
    return known is not None and known()


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a kind of device."""
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:  # PyTorch < 2.4
        cpu = device_type == 'cpu'
        return torch.is_autocast_cpu_enabled() if cpu else torch.is_autocast_enabled()


def _autocast_dtype(device_type: str) -> torch.dtype:
    try:
        return torch.get_autocast_dtype(device_type)
    except AttributeError:  # PyTorch < 2.4
        cpu = device_type == 'cpu'
        return torch.get_autocast_cpu_dtype() if cpu else torch.get_autocast_gpu_dtype()


try:
    _is_compiling = torch.compiler.is_compiling
except AttributeError:  # PyTorch 2.1
    _is_compiling = torch._dynamo.is_compiling
