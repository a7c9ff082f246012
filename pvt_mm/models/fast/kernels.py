"""CPU kernels behind ``pvt_mm.ops``: products by oneDNN or MKL, in pieces that stay in the cache.

PyTorch's own forms write whole hidden layers and attention matrices to memory and read them back;
at detection sizes that costs more than the arithmetic. These kernels make a piece, use it and
forget it. In training they keep the inputs and make the pieces again in the backward pass.

Each has a plain twin in ``pvt_mm.ops`` with the same result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pvt_mm.models.fast.cpu import last_level_cache, vendor_and_family

# glibc gives what tensors free back to the system, and then gets it again page by page at every
# pass. A block just below 32 MiB, the largest it learns from, makes it keep up to 64 MiB. Nothing
# is written to it, so that it takes no memory itself.
torch.empty(31 * 2**20, dtype=torch.uint8)

VENDOR, FAMILY = vendor_and_family()

#: Elements of an intermediate buffer in fp32, some of which share the last-level cache: 4 MiB of
#: 32, 8 of 64 or more.
PIECE = 2**21 if last_level_cache() >= 2**26 else 2**20

#: Elements of a hidden layer, before and after its convolution, up to which training keeps it
#: rather than make it again.
KEPT = 2**22

#: Hidden channels that go through the depth-wise convolution together.
BLOCK = 128

#: Scores below this are raised to powers without taking their maximum off first: neither a power
#: nor a sum of powers times values leaves fp32's or bf16's range of 2**-126 to 2**127.
MAX_POWER = 64.0

LOG2_E = math.log2(math.e)

Layer = tuple[Tensor, Tensor]
Norm = Callable[[Tensor], Tensor]
Kernel = TypeVar('Kernel', bound=Callable)

# oneDNN's operations with an activation behind them, and whether it takes bf16. Inductor's own, not
# public: hence the other road beside each use.
_linear: Any = getattr(torch.ops.mkldnn, '_linear_pointwise', None)
_convolution: Any = getattr(torch.ops.mkldnn, '_convolution_pointwise', None)
_has_bf16: Any = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', None)
PLAIN: tuple = ('none', [], '')
GELU: tuple = ('gelu', [], 'none')  # the exact form, no approximation

#: Whether the vector units are AVX2's. There MKL multiplies faster in fp32 than oneDNN, whose GELU
#: is slow too.
MKL_IS_FASTER = (
    torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == 'AVX2'
)

#: Whether PyTorch's fused attention, which is made of MKL's products, beats the one in pieces.
FUSED_ATTENTION_IS_FASTER = MKL_IS_FASTER or (
    torch.backends.mkl.is_available() and VENDOR == 'GenuineIntel'
)

#: Whether oneDNN multiplies twice as fast in fp32 as MKL, which uses 256 bits on AMD: all that the
#: vector units of Zen 4 have, half of what those of Zen 5 (family 26) have. Elsewhere the two are
#: equals.
MKL_IS_NARROW = VENDOR == 'AuthenticAMD' and FAMILY >= 26

#: Whether the fused attention beats the one in pieces in training in fp32.
FUSED_TRAINING_IS_FASTER = torch.backends.mkl.is_available() and not MKL_IS_NARROW

#: Whether oneDNN has no way to multiply bf16 on this CPU, so that PyTorch does it in plain loops.
BF16_IS_SLOW = _has_bf16 is not None and not _has_bf16()


def _never(*args: Any) -> bool:
    return False


def rounded(kernel: Kernel, wrong: Callable[..., bool] = _never) -> Kernel:
    """Let a kernel run in fp32 on bf16 tensors where bf16 is slow or wrong, and round its results.

    The sums are of fp32 either way.
    """

    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        if args[0].dtype != torch.bfloat16 or not (BF16_IS_SLOW or wrong(*args)):
            return kernel(*args, **kwargs)
        with torch.autocast('cpu', enabled=False):
            out = kernel(*(a.float() if isinstance(a, Tensor) else a for a in args), **kwargs)
        return out.bfloat16() if isinstance(out, Tensor) else tuple(t.bfloat16() for t in out)

    return cast(Kernel, run)


@rounded
def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Multiply by a weight as ``torch.nn.functional.linear`` does, without autograd.

    Args:
        x: Tokens.
        weight: Contiguous, or the transpose of what is.
        bias: Added to the product.
        gelu: Activate the result, while it is in registers or at least in the cache.

    Shape:
        x: (..., in) -> (..., out); weight: (out, in); bias: (out,).
    """
    if MKL_IS_FASTER and x.dtype == torch.float32:
        out = F.linear(x, weight, bias)
    elif _linear is not None and x.dtype in (torch.float32, torch.bfloat16):
        return _linear(x, weight, bias, *(GELU if gelu else PLAIN))
    else:
        out = convolved(x, weight, bias)
    return torch.ops.aten.gelu_(out) if gelu else out


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by a weight as a 1x1 convolution, which oneDNN runs forward and backward.

    Shape:
        x: (..., in) -> (..., out); weight: (out, in); bias: (out,).
    """
    out = F.conv2d(_image(x), weight[:, :, None, None], bias)  # (1, out, N, 1)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def _image(x: Tensor) -> Tensor:
    """View tokens (..., C) as a channels-last image (1, C, N, 1)."""
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


@rounded
def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of a product's weight.

    Shape:
        grad: (N, out); x: (N, in) -> (out, in).
    """
    few_tokens = grad.shape[1] * x.shape[1] > 1024 * len(x)
    if few_tokens or x.dtype != torch.float32 or not MKL_IS_NARROW:
        return torch.mm(grad.t(), x)
    weight = x.new_empty(grad.shape[1], x.shape[1], 1, 1)
    grads = torch.ops.aten.convolution_backward(
        _image(grad), _image(x), weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
        [False, True, False],
    )  # fmt: skip
    return grads[1].reshape(weight.shape[:2])


class LinearFunction(torch.autograd.Function):
    """``pvt_mm.ops.linear`` with its backward pass in oneDNN too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """Project in ``dtype``."""
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        return product(x, weight.to(dtype), bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Send the gradient to the tokens, weight and bias that need it."""
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad = grad.to(x.dtype).contiguous()
        rows = grad.flatten(0, -2)
        return (
            product(grad, weight.to(x.dtype).t()) if needs_x else None,
            weight_grad(rows, x.flatten(0, -2)) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
            None,
        )


def _pieces(length: int, size: int) -> Iterator[slice]:
    size = max(size, 1)
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _fitting(elements: int, dtype: torch.dtype) -> int:
    """How many rows of so many elements a piece holds.

    In bf16 three times as many: products are over sooner, while calls around them cost the same.
    """
    return PIECE * (3 if dtype == torch.bfloat16 else 1) // elements


def _cast(layer: Layer, dtype: torch.dtype) -> Layer:
    return layer[0].to(dtype), layer[1].to(dtype)


# Perceptron, inference


def mlp(
    x: Tensor, fc1: Layer, fc2: Layer, dwconv: Layer | None, relu: bool, dtype: torch.dtype
) -> Tensor:
    """Run ``pvt_mm.ops.mlp`` without autograd, computing in ``dtype``.

    Shape:
        x: (B, H, W, C) -> (B, H, W, C) of ``dtype``.
    """
    out = x.new_empty(x.shape, dtype=dtype)
    results = out if dwconv else out.view(1, -1, 1, x.shape[-1])
    for place, part in _mlp_parts(x, None, fc1, fc2, dwconv, relu, dtype):
        results[place] = part
    return out


def add_mlp(
    x: Tensor,
    norm: Norm,
    fc1: Layer,
    fc2: Layer,
    dwconv: Layer | None,
    relu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Add ``mlp(norm(x))`` to ``x`` in its place, without autograd.

    Shape:
        x: (B, H, W, C), contiguous -> (B, H, W, C).
    """
    image = x if dwconv else x.view(1, -1, 1, x.shape[-1])
    waiting: Any = None
    for place, part in _mlp_parts(x, norm, fc1, fc2, dwconv, relu, dtype):
        # A band needs the last row of the band before as it was.
        if waiting is not None:
            image[waiting[0]] += waiting[1]
        waiting = place, part
    if waiting is not None:  # no image, no part
        image[waiting[0]] += waiting[1]
    return x


def _mlp_parts(
    x: Tensor,
    norm: Norm | None,
    fc1: Layer,
    fc2: Layer,
    dwconv: Layer | None,
    relu: bool,
    dtype: torch.dtype,
) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Yield some images, some rows of them and the result for them.

    Without a convolution tokens do not meet, and all of them count as one image of width 1.
    """
    fc1, fc2 = _cast(fc1, dtype), _cast(fc2, dtype)
    if dwconv is None:
        tokens = x.reshape(-1, 1, x.shape[-1])
        for rows in _pieces(len(tokens), _fitting(len(fc1[0]), dtype)):
            part = _normed(tokens[rows], norm, dtype)
            yield (slice(None), rows), product(product(part, *fc1, gelu=True), *fc2)
        return
    dwconv = _cast(dwconv, dtype)
    batch, height, width, _ = x.shape
    for images in _pieces(batch, _fitting(2 * height * width * len(fc1[0]), dtype)):
        for rows, part in _mlp_bands(x[images], norm, fc1, fc2, dwconv, relu):
            yield (images, rows), part


def _normed(x: Tensor, norm: Norm | None, dtype: torch.dtype) -> Tensor:
    return (x if norm is None else norm(x)).to(dtype)


def _mlp_bands(
    x: Tensor, norm: Norm | None, fc1: Layer, fc2: Layer, dwconv: Layer, relu: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Yield result bands; each takes one row more on each side for the convolution."""
    images, height, width, _ = x.shape
    hidden, dtype = len(fc1[0]), fc1[0].dtype
    block = hidden if _fitting(images * height * width * hidden, dtype) else min(hidden, BLOCK)
    blocks = list(_pieces(hidden, block))
    last = [fc2[0][:, channels].contiguous() for channels in blocks]
    for rows in _pieces(height, _fitting(2 * images * width * block, dtype)):  # two buffers at once
        top = max(rows.start - 1, 0)
        band = _normed(x[:, top : rows.stop + 1], norm, dtype)
        inner = slice(rows.start - top, rows.stop - top)
        total: Any = None
        for channels, weight in zip(blocks, last):
            # Without a name for the hidden layer: it is gone before there is another.
            bias = fc2[1] if total is None else None
            part = product(_activated(band, fc1, dwconv, channels, relu)[:, inner], weight, bias)
            total = part if total is None else total.add_(part)
        yield rows, total


def _activated(x: Tensor, fc1: Layer, dwconv: Layer, channels: slice, relu: bool) -> Tensor:
    """Return some channels of the hidden layer, (B, H, W, channels), after their activation."""
    x = product(x, fc1[0][channels], fc1[1][channels])
    if relu:
        x.relu_()
    return _depthwise_gelu(x, dwconv[0][channels], dwconv[1][channels])


@rounded
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve each channel of (B, H, W, C) with its own 3x3 kernel."""
    image = x.permute(0, 3, 1, 2)  # (B, C, H, W), channels-last
    out = F.conv2d(image, weight, bias, padding=1, groups=len(weight))
    return out.permute(0, 2, 3, 1)


@rounded
def _depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if _convolution is None or x.dtype not in (torch.float32, torch.bfloat16):
        return F.gelu(_depthwise(x, weight, bias))
    ones = [1, 1]
    image = x.permute(0, 3, 1, 2)  # (B, C, H, W), channels-last
    out = _convolution(image, weight, bias, ones, ones, ones, len(weight), *GELU)
    return out.permute(0, 2, 3, 1)


# Perceptron, training


class MlpFunction(torch.autograd.Function):
    """``pvt_mm.ops.mlp`` that keeps its input, and its hidden layer only where that is small."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        dw_weight: Tensor | None,
        dw_bias: Tensor | None,
        relu: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        """Run the perceptron in ``dtype``."""
        ctx.relu, ctx.dtype = relu, dtype
        saved = (x, weight1, bias1, weight2, bias2, dw_weight, dw_bias)
        layers_kept = 1 if dw_weight is None else 2
        if x.numel() // x.shape[-1] * len(weight1) * layers_kept > KEPT:
            ctx.save_for_backward(*saved)
            dwconv: Any = None if dw_weight is None else (dw_weight, dw_bias)
            return mlp(x, (weight1, bias1), (weight2, bias2), dwconv, relu, dtype)
        layers = _block_layers(saved, slice(None), dtype)
        hidden = _hidden(x.to(dtype), layers, relu)
        ctx.save_for_backward(*saved, *hidden)
        return product(F.gelu(hidden[1]), layers[2], bias2.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Send the gradient through the hidden layer, made again in parts where it is not kept."""
        tensors = ctx.saved_tensors  # once: under with_cp a second look is an error
        saved, hidden = tensors[:7], tensors[7:]
        x, grad = saved[0].to(ctx.dtype), grad.to(ctx.dtype).contiguous()
        grads: Sequence[Tensor | None]
        if hidden:
            layers = _block_layers(saved, slice(None), ctx.dtype)
            grads = _part_grads(x, grad, layers, hidden, ctx.relu)
        else:
            grads = _summed_grads(x, grad, saved, ctx.relu)
        grad_x, grad1, grad_bias1, grad2, *grad_dwconv = grads
        grad_bias2 = grad.flatten(0, -2).sum(0)
        return grad_x, grad1, grad_bias1, grad2, grad_bias2, *grad_dwconv, None, None


def _summed_grads(x: Tensor, grad: Tensor, saved: tuple, relu: bool) -> list[Tensor | None]:
    """Make the hidden layer again part by part, and gather what ``_part_grads`` gives.

    A part is some tokens or, since the convolution needs each channel whole, some channels.
    """
    _, weight1, bias1, weight2, _, *dwconv = saved
    hidden, shape, whole = len(weight1), x.shape, slice(None)
    channel_parts, token_parts = [whole], [whole]
    if dwconv[0] is None:
        x, grad = (t.reshape(1, 1, -1, shape[-1]) for t in (x, grad))
        token_parts = list(_pieces(x.shape[2], _fitting(hidden, x.dtype)))
    else:
        channel_parts = list(_channel_parts(x, hidden))
    sums: list[Any] = [
        None if t is None else torch.zeros_like(t) for t in (x, weight1, bias1, weight2, *dwconv)
    ]
    for channels in channel_parts:
        layers = _block_layers(saved, channels, x.dtype)
        for tokens in token_parts:
            part = (whole, whole, tokens)
            made = _hidden(x[part], layers, relu)
            grads = _part_grads(x[part], grad[part], layers, made, relu)
            places = part, channels, channels, (whole, channels), channels, channels
            for total, place, new in zip(sums, places, grads):
                if new is not None:
                    total[place].add_(new)
    return [sums[0].view(shape), *sums[1:]]


def _part_grads(
    x: Tensor, grad: Tensor, layers: tuple, hidden: Sequence[Tensor], relu: bool
) -> tuple[Tensor | None, ...]:
    """Send the gradient through a part of the hidden layer.

    Args:
        x: Tokens.
        grad: Gradient of the result for them.
        layers: What ``_block_layers`` gives.
        hidden: What ``_hidden`` gives.
        relu: As for ``mlp``.

    Returns:
        The gradients of the tokens, of fc1's weight and bias, fc2's weight, and the depth-wise
        convolution's weight and bias, which are None without one.

    Shape:
        x and grad: (B, H, W, C); hidden: (B, H, W, channels).
    """
    weight1, _, weight2, dwconv = layers
    first, middle = hidden
    grad2 = weight_grad(grad.flatten(0, -2), F.gelu(middle).flatten(0, -2))
    grad_h = product(grad, weight2.t())
    torch.ops.aten.gelu_backward(grad_h, middle, grad_input=grad_h)
    grad_dwconv: Sequence[Tensor | None] = (None, None)
    if dwconv is not None:
        grad_h, *grad_dwconv = _depthwise_grads(grad_h, first, dwconv[0])
    if relu:
        torch.ops.aten.threshold_backward(grad_h, first, 0, grad_input=grad_h)
    rows = grad_h.flatten(0, -2)
    grad1 = weight_grad(rows, x.flatten(0, -2))
    return product(grad_h, weight1.t()), grad1, rows.sum(0), grad2, *grad_dwconv


def _channel_parts(x: Tensor, hidden: int) -> Iterator[slice]:
    """Cut hidden channels into about a piece each; the convolution needs each one whole."""
    return _pieces(hidden, max(_fitting(x.numel() // x.shape[-1], x.dtype) // 64 * 64, 64))


def _block_layers(saved: tuple, channels: slice, dtype: torch.dtype) -> tuple:
    """Weights of a block: fc1's weight and bias, fc2's weight, and the depth-wise layer."""
    _, weight1, bias1, weight2, _, dw_weight, dw_bias = saved
    dwconv = None if dw_weight is None else _cast((dw_weight[channels], dw_bias[channels]), dtype)
    return (
        weight1[channels].to(dtype),
        bias1[channels].to(dtype),
        weight2[:, channels].to(dtype).contiguous(),
        dwconv,
    )


def _hidden(x: Tensor, layers: tuple, relu: bool) -> tuple[Tensor, Tensor]:
    """Return the hidden layer after fc1 and after the convolution, before GELU."""
    first = product(x, layers[0], layers[1])
    if relu:
        first.relu_()
    return first, first if layers[3] is None else _depthwise(first, *layers[3])


@rounded
def _depthwise_grads(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the depth-wise convolution: of its input (B, H, W, C), weight and bias."""
    grad_image, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, [len(weight)],
        [1, 1], [1, 1], [1, 1], False, [0, 0], len(weight), [True, True, True],
    )  # fmt: skip
    return grad_image.permute(0, 2, 3, 1).contiguous(), grad_weight, grad_bias


# Attention


def _is_wrong_in_bf16(
    x: Tensor, weight: Tensor, _bias: Tensor | None, stride: int, padding: int = 0
) -> bool:
    """Whether oneDNN's bf16 convolution may be wrong, as with AMX it is in two cases.

    They are 5 to 31 channels under kernels of 4, 8 or 16 a side, and results of width 1.
    """
    few_channels = 4 < x.shape[-1] < 32
    return few_channels or x.shape[2] + 2 * padding < weight.shape[3] + stride


@functools.partial(rounded, wrong=_is_wrong_in_bf16)
def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int = 0
) -> Tensor:
    """Convolve tokens with a strided kernel.

    Shape:
        x: (B, H, W, in) -> (B, H', W', out); weight: (out, in, k, k); bias: (out,).
    """
    image = x.permute(0, 3, 1, 2)  # (B, in, H, W), channels-last
    return F.conv2d(image, weight, bias, stride, padding).permute(0, 2, 3, 1)


def reduced(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Normalise tokens and shrink their grid by a convolution whose patches touch, band by band.

    Shape:
        x: (B, H, W, C) -> (B, H // stride, W // stride, C); weight: (C, C, stride, stride).
    """
    height = x.shape[1] // stride * stride
    band = max(_fitting(x[:, :stride].numel(), x.dtype), 1) * stride
    parts = [
        convolution(norm(x[:, rows]).to(weight.dtype), weight, bias, stride)
        for rows in _pieces(height, band)
    ]
    return torch.cat(parts, 1)


def projected_attention(
    x: Tensor,
    norm: Norm | None,
    query: Layer,
    key: Tensor,
    value: Tensor,
    proj: Layer,
    num_heads: int,
    dtype: torch.dtype,
) -> Tensor:
    """Run ``pvt_mm.ops.projected_attention`` without autograd, some tokens at a time.

    Args:
        x: Tokens that the queries come from.
        norm: What comes before the queries' projection, token by token.
        query: Weight and bias of the queries' projection.
        key: Projected keys, of ``dtype``.
        value: Projected values, of ``dtype``.
        proj: Weight and bias of the projection behind the attention.
        num_heads: Heads that C is split into.
        dtype: What products run in.

    Shape:
        x: (B, N, C); key and value: (B, M, C) -> (B, N, C), of the dtype of ``x``.
    """
    query, proj = _cast(query, dtype), _cast(proj, dtype)
    out = torch.empty_like(x)
    for tokens, k, v, result in zip(x, key, value, out):
        attend, piece = _attention_to(k, v, num_heads)
        for rows in _pieces(len(tokens), piece):
            queries = product(_normed(tokens[rows], norm, dtype), *query)  # (n, C)
            result[rows] = product(attend(queries), *proj)
    return out


def _attention_to(
    key: Tensor, value: Tensor, num_heads: int
) -> tuple[Callable[[Tensor], Tensor], int]:
    """Return the attention to keys and values (M, C), and how many queries it best takes at a time.

    It takes queries (n, C), which it may overwrite, and returns the result in this shape.
    """
    piece = _fitting(len(key), key.dtype)
    if FUSED_ATTENTION_IS_FASTER:
        k, v = key[None], value[None]
        return lambda q: fused_attention(q[None], k, v, num_heads)[0], piece
    heads = _prepared(key, value, num_heads)
    return functools.partial(_attend, heads=heads), piece


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, drop_rate: float = 0.0
) -> Tensor:
    """Run ``pvt_mm.ops.attention`` by PyTorch's fused kernel, which autograd can follow.

    Shape:
        query: (B, N, C); key and value: (B, M, C) -> (B, N, C).
    """
    # A list, since the compiler of PyTorch 2.1 cannot follow a generator.
    q, k, v = [t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (query, key, value)]
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=drop_rate)  # (B, heads, N, C/heads)
    return out.transpose(1, 2).flatten(2)


def spread_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Run ``fused_attention`` so that its backward pass keeps all threads busy.

    That shares out images and heads, no queries; so where these are few, an image's queries count
    as several images with the same keys and values.

    Shape:
        query: (B, N, C); key and value: (B, M, C) -> (B, N, C).
    """
    length, shares = query.shape[1], max(len(query) * num_heads, 1)  # no image, no share
    parts = math.gcd(length, max(torch.get_num_threads() // shares, 1))
    query = query.unflatten(1, (parts, length // parts)).flatten(0, 1)
    key, value = (t[:, None].expand(-1, parts, -1, -1).flatten(0, 1) for t in (key, value))
    out = fused_attention(query, key, value, num_heads)  # (B * parts, N / parts, C)
    return out.unflatten(0, (-1, parts)).flatten(1, 2)


class Head(NamedTuple):
    """Keys and values of a head, ready for any number of queries."""

    keys: Tensor  # (M, d), scaled so that scores are powers of two
    values: Tensor  # (d, M); both the transpose of what is contiguous, the faster way in fp32
    longest: float  # of the keys


def _prepared(key: Tensor, value: Tensor, num_heads: int) -> list[Head]:
    """Split keys and values of an image, (M, C), by heads."""
    scale = (key.shape[1] // num_heads) ** -0.5 * LOG2_E
    key = key * scale
    keys, values = (t.unflatten(1, (num_heads, -1)).unbind(1) for t in (key, value))
    return [
        Head(k.t().contiguous().t(), v.contiguous().t(), longest)
        for k, v, longest in zip(keys, values, _longest(key, num_heads))
    ]


def _attend(queries: Tensor, heads: list[Head]) -> Tensor:
    """Attend from some queries (n, C), a head at a time, and leave the result in their place."""
    split = queries.unflatten(1, (len(heads), -1)).unbind(1)
    for q, head, longest in zip(split, heads, _longest(queries, len(heads))):
        weights = product(q.contiguous(), head.keys)  # (n, M)
        if longest * head.longest < MAX_POWER:  # bounds each score; not so for NaN
            total = weights.exp2_().sum(-1, keepdim=True)
            torch.div(product(weights, head.values), total, out=q)
        else:
            q.copy_(product(weights.mul_(1 / LOG2_E).softmax(-1), head.values))
        del weights  # before there are others
    return queries


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Run ``pvt_mm.ops.attention`` without autograd, some queries of one head at a time.

    Shape:
        query: (B, N, C); key and value: (B, M, C) -> (B, N, C).
    """
    out = query.clone()
    for queries, k, v in zip(out, key, value):
        heads = _prepared(k, v, num_heads)
        for rows in _pieces(len(queries), _fitting(len(k), k.dtype)):
            _attend(queries[rows], heads)
    return out


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of long sums: fp32 for bf16."""
    return torch.promote_types(x.dtype, torch.float32)


def _longest(vectors: Tensor, num_heads: int) -> list[float]:
    """Length of each head's longest vector among (n, C)."""
    split = vectors.unflatten(1, (num_heads, -1))
    lengths = torch.linalg.vector_norm(split, dim=-1, dtype=_wide(vectors))  # (n, heads)
    return lengths.amax(0).tolist()


def _heads(num_heads: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views (N, d) of each (B, N, C), for every image and head."""
    split = [t.unflatten(-1, (num_heads, -1)) for t in tensors]
    for image in range(len(tensors[0])):
        for head in range(num_heads):
            yield tuple(t[image, :, head] for t in split)


class AttentionFunction(torch.autograd.Function):
    """``pvt_mm.ops.attention`` that never holds the query x key matrix whole."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
        """Attend, and keep only the inputs."""
        ctx.num_heads = num_heads
        ctx.save_for_backward(query, key, value)
        return attention(query, key, value, num_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Make the attention weights again, some queries at a time."""
        inputs = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in inputs]
        for q, k, v, g, gq, gk, gv in _heads(ctx.num_heads, *inputs, grad, *grads):
            scale = k.shape[1] ** -0.5
            k, v = k * scale, v.contiguous()  # (M, d)
            k_t = k.t()  # (d, M)
            sum_k, sum_v = (k.new_zeros(k.shape, dtype=_wide(k)) for _ in range(2))
            for rows in _pieces(len(q), _fitting(len(k), k.dtype)):
                queries, grad_rows = q[rows].contiguous(), g[rows].contiguous()
                weights = product(queries, k).softmax(-1)  # (n, M)
                sum_v += weight_grad(weights, grad_rows)
                grad_scores = torch.ops.aten._softmax_backward_data(
                    product(grad_rows, v), weights, -1, weights.dtype
                )
                del weights
                gq[rows] = product(grad_scores, k_t)
                sum_k += weight_grad(grad_scores, queries)
            gk.copy_(sum_k.mul_(scale))
            gv.copy_(sum_v)
        return grads[0], grads[1], grads[2], None
