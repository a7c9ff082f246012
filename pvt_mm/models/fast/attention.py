"""Attention that never holds the query x key matrix whole, forward and backward.

PyTorch's fused attention does the same; which of the two is faster depends on the CPU and on the
size. Here a chunk of queries of one head is taken at a time, and its scores stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvt_mm.models.fast import cpu
from pvt_mm.models.fast.autograd import textbook_grads, textbook_is_needed
from pvt_mm.models.fast.gemm import cast_layer, chunk_rows, chunks, gemm, needs_grad, weight_grad

#: Queries x keys from which chunked attention beats one call of PyTorch's fused one.
MANY_SCORES = 2**17
#: Scores below this are exponentiated without subtracting their maximum: neither a power of two nor
#: a sum of such times values leaves the range of fp32 and bf16, 2**-126 to 2**127.
MAX_EXPONENT = 64.0

_LOG2_E = math.log2(math.e)
_fused: Any = getattr(torch.ops.aten, '_scaled_dot_product_flash_attention_for_cpu', None)
_fused_backward: Any = getattr(
    torch.ops.aten, '_scaled_dot_product_flash_attention_for_cpu_backward', None
)


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Attend with several heads; autograd can follow.

    Paper: [PVT](https://arxiv.org/abs/2102.12122), Sec. 3.3, eq. 4.

    Shape:
        query: (B, N, C); key and value: (B, M, C) -> (B, N, C).
    """
    traits = cpu.traits()
    fused = traits.fused_attention or not has_many_scores(query, key)
    attend: Callable[..., Tensor]
    if needs_grad(query, key, value):
        fused |= traits.fused_attention_backward and query.dtype == torch.float32
        attend = split_fused_attention if fused else ChunkedAttention.apply
    else:
        attend = fused_attention if fused else chunked_attention
    return attend(query, key, value, num_heads)


def has_many_scores(query: Tensor, key: Tensor) -> bool:
    """Tell whether there are enough scores for chunks to pay."""
    return query.shape[1] * key.shape[1] >= MANY_SCORES


def projected_attention(
    x: Tensor, norm: nn.LayerNorm | None, attn: Any, key: Tensor, value: Tensor, dtype: torch.dtype
) -> Tensor:
    """Project queries, attend and project the result, chunk by chunk, without autograd.

    Args:
        x: Tokens that the queries come from.
        norm: The norm before the queries' projection; None where ``x`` is normalised.
        attn: A ``pvt_mm.models.layers.SpatialReductionAttention``.
        key: Projected keys, of ``dtype``.
        value: Projected values, of ``dtype``.
        dtype: What matmuls run in.

    Shape:
        x: (B, N, C); key and value: (B, M, C) -> (B, N, C), of the dtype of ``x``.
    """
    query, proj = cast_layer(attn.q, dtype), cast_layer(attn.proj, dtype)
    out = torch.empty_like(x)
    for tokens, k, v, result in zip(x, key, value, out):
        attend, size = _attention_to(k, v, attn.num_heads)
        for rows in chunks(len(tokens), size):
            chunk = tokens[rows] if norm is None else norm(tokens[rows])
            queries = gemm(chunk.to(dtype), *query)  # (n, C)
            result[rows] = gemm(attend(queries), *proj)
    return out


def _attention_to(
    key: Tensor, value: Tensor, num_heads: int
) -> tuple[Callable[[Tensor], Tensor], int]:
    """Return the attention to keys and values (M, C), and how many queries it takes best.

    It takes queries (n, C), which it may overwrite, and returns the result in this shape.
    """
    size = chunk_rows(len(key), key.dtype)
    if cpu.traits().fused_attention:
        k, v = key[None], value[None]
        return lambda queries: fused_attention(queries[None], k, v, num_heads)[0], size
    heads = _prepared(key, value, num_heads)
    return lambda queries: _attend(queries, heads), size


# PyTorch's fused attention


def fused_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Attend by PyTorch's fused kernel; autograd can follow, and differentiate twice.

    Shape:
        query: (B, N, C); key and value: (B, M, C) -> (B, N, C).
    """
    q, k, v = (_split_heads(t, num_heads) for t in (query, key, value))
    if _fused is None or not needs_grad(query, key, value):
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C/heads)
    else:
        out = FusedAttention.apply(q, k, v)
    return out.transpose(1, 2).flatten(2)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, heads, N, C/heads)


def split_fused_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Run ``fused_attention`` so that its backward pass keeps all threads busy.

    That pass shares out images and heads, not queries. Where these are few, the queries of an image
    count as several images with the same keys and values.

    Shape:
        query: (B, N, C); key and value: (B, M, C) -> (B, N, C).
    """
    length, shares = query.shape[1], max(len(query) * num_heads, 1)  # 1 for an empty batch
    parts = math.gcd(length, max(torch.get_num_threads() // shares, 1))
    query = query.unflatten(1, (parts, length // parts)).flatten(0, 1)
    key, value = (t[:, None].expand(-1, parts, -1, -1).flatten(0, 1) for t in (key, value))
    out = fused_attention(query, key, value, num_heads)  # (B * parts, N / parts, C)
    return out.unflatten(0, (-1, parts)).flatten(1, 2)


class FusedAttention(torch.autograd.Function):
    """PyTorch's fused attention, with a backward pass that can be differentiated again.

    Shape:
        query: (B, heads, N, d); key and value: (B, heads, M, d) -> (B, heads, N, d).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend, and save the inputs, the result and the logarithms of the softmax's sums."""
        out, log_sums = _fused(query, key, value)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Run PyTorch's backward kernel."""
        query, key, value, out, log_sums = ctx.saved_tensors
        if textbook_is_needed(grad):
            return tuple(textbook_grads(_plain_attention, (query, key, value), grad))
        return _fused_backward(grad, query, key, value, out, log_sums, 0.0, False)


def _plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend in plain operations.

    Shape:
        query: (..., N, d); key and value: (..., M, d) -> (..., N, d).
    """
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(-1) @ value


# Chunked attention


class Head(NamedTuple):
    """Keys and values of a head, ready for any number of queries."""

    keys: Tensor  # (M, d), scaled so that scores are exponents of two
    values: Tensor  # (d, M); both are transposes of contiguous tensors, the faster way in fp32
    max_norm: float  # of the keys


def _prepared(key: Tensor, value: Tensor, num_heads: int) -> list[Head]:
    """Split keys and values of an image, (M, C), by heads."""
    scale = (key.shape[1] // num_heads) ** -0.5 * _LOG2_E
    key = key * scale
    keys, values = (t.unflatten(1, (num_heads, -1)).unbind(1) for t in (key, value))
    return [
        Head(k.t().contiguous().t(), v.contiguous().t(), max_norm)
        for k, v, max_norm in zip(keys, values, _max_norms(key, num_heads))
    ]


def _attend(queries: Tensor, heads: list[Head]) -> Tensor:
    """Attend from some queries (n, C), a head at a time, and leave the result in their place."""
    split = queries.unflatten(1, (len(heads), -1)).unbind(1)
    for q, head, max_norm in zip(split, heads, _max_norms(queries, len(heads))):
        scores = gemm(q.contiguous(), head.keys)  # (n, M)
        if max_norm * head.max_norm < MAX_EXPONENT:  # bounds each score (Cauchy-Schwarz); not NaN
            total = scores.exp2_().sum(-1, keepdim=True)
            torch.div(gemm(scores, head.values), total, out=q)
        else:
            q.copy_(gemm(scores.mul_(1 / _LOG2_E).softmax(-1), head.values))
        del scores  # before the next ones are made
    return queries


def chunked_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Attend without autograd, from a chunk of queries of one head at a time.

    Shape:
        query: (B, N, C); key and value: (B, M, C) -> (B, N, C).
    """
    out = query.clone()
    for queries, k, v in zip(out, key, value):
        heads = _prepared(k, v, num_heads)
        for rows in chunks(len(queries), chunk_rows(len(k), k.dtype)):
            _attend(queries[rows], heads)
    return out


def _sum_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of long sums: fp32 for bf16."""
    return torch.promote_types(x.dtype, torch.float32)


def _max_norms(vectors: Tensor, num_heads: int) -> list[float]:
    """Return the largest norm among each head's vectors, of (n, C)."""
    split = vectors.unflatten(1, (num_heads, -1))
    norms = torch.linalg.vector_norm(split, dim=-1, dtype=_sum_dtype(vectors))  # (n, heads)
    return norms.amax(0).tolist()


class ChunkedAttention(torch.autograd.Function):
    """Attention that saves its inputs alone, and recomputes its weights in the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
        """Attend, and save only the inputs."""
        ctx.num_heads = num_heads
        ctx.save_for_backward(query, key, value)
        return chunked_attention(query, key, value, num_heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Recompute the attention weights, some queries at a time."""
        query, key, value = ctx.saved_tensors
        num_heads = ctx.num_heads
        if textbook_is_needed(grad):

            def textbook(*tensors: Tensor) -> Tensor:
                out = _plain_attention(*(_split_heads(t, num_heads) for t in tensors))
                return out.transpose(1, 2).flatten(2)

            return *textbook_grads(textbook, (query, key, value), grad), None
        grads = tuple(torch.empty_like(t) for t in (query, key, value))
        for tensors in _heads(num_heads, query, key, value, grad, *grads):
            _attention_grads(*tensors)
        return *grads, None


def _heads(num_heads: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views (N, d) of each (B, N, C), for every image and head."""
    split = [t.unflatten(-1, (num_heads, -1)) for t in tensors]
    for image in range(len(tensors[0])):
        for head in range(num_heads):
            yield tuple(t[image, :, head] for t in split)


def _attention_grads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Write the gradients of one head into the last three tensors.

    Shape:
        query, grad and grad_query: (N, d); the others: (M, d).
    """
    scale = key.shape[1] ** -0.5
    key, value = key * scale, value.contiguous()  # (M, d)
    key_t = key.t()  # (d, M)
    sum_key, sum_value = (key.new_zeros(key.shape, dtype=_sum_dtype(key)) for _ in range(2))
    for rows in chunks(len(query), chunk_rows(len(key), key.dtype)):
        queries, grad_rows = query[rows].contiguous(), grad[rows].contiguous()
        weights = gemm(queries, key).softmax(-1)  # (n, M)
        sum_value += weight_grad(weights, grad_rows)
        grad_scores = torch.ops.aten._softmax_backward_data(
            gemm(grad_rows, value), weights, -1, weights.dtype
        )
        del weights
        grad_query[rows] = gemm(grad_scores, key_t)
        sum_key += weight_grad(grad_scores, queries)
    grad_key.copy_(sum_key.mul_(scale))
    grad_value.copy_(sum_value)
