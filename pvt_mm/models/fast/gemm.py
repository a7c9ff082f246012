"""Matrix multiplications and convolutions of tokens, by oneDNN or MKL, in fp32 and bf16.

Nothing here is recorded by autograd but ``linear`` and ``convolution``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvt_mm.models.fast import cpu
from pvt_mm.models.fast.autograd import textbook_grads, textbook_is_needed

#: Weight and bias of a layer.
Layer = tuple[Tensor, Tensor]
Kernel = TypeVar('Kernel', bound=Callable)

# oneDNN's operations with an activation behind them. They are Inductor's, not public: where one is
# missing, a public operation takes its place.
_linear: Any = getattr(torch.ops.mkldnn, '_linear_pointwise', None)
_convolution: Any = getattr(torch.ops.mkldnn, '_convolution_pointwise', None)
_NO_ACTIVATION: tuple = ('none', [], '')
_GELU: tuple = ('gelu', [], 'none')  # the exact form, no approximation


def chunks(length: int, size: int) -> Iterator[slice]:
    """Cut a length into chunks of at most ``size``, which counts as 1 below that."""
    size = max(size, 1)
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def chunk_rows(elements: int, dtype: torch.dtype) -> int:
    """Return how many rows of so many elements a chunk holds.

    In bf16 it is three times as many: a GEMM takes less time, and calls around it as much.
    """
    return cpu.traits().chunk * (3 if dtype == torch.bfloat16 else 1) // elements


def cast_layer(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> Layer:
    """Return weight and bias of a layer in a dtype."""
    assert layer.bias is not None  # a condition of the fast path
    return layer.weight.to(dtype), layer.bias.to(dtype)


def _never(*args: Any) -> bool:
    return False


def fp32_fallback(kernel: Kernel, is_wrong: Callable[..., bool] = _never) -> Kernel:
    """Run a kernel in fp32 on bf16 tensors where bf16 is slow or wrong, and round its results.

    Sums are in fp32 either way.
    """

    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        if args[0].dtype != torch.bfloat16 or not (cpu.traits().bf16_is_slow or is_wrong(*args)):
            return kernel(*args, **kwargs)
        with torch.autocast('cpu', enabled=False):
            out = kernel(*(a.float() if isinstance(a, Tensor) else a for a in args), **kwargs)
        return out.bfloat16() if isinstance(out, Tensor) else tuple(t.bfloat16() for t in out)

    return cast(Kernel, run)


@fp32_fallback
def gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Multiply as ``torch.nn.functional.linear`` does, without autograd.

    Args:
        x: Tokens.
        weight: Contiguous, or the transpose of a contiguous one.
        bias: Added to the result.
        gelu: Apply GELU to the result while it is in registers or in the cache.

    Shape:
        x: (..., in) -> (..., out); weight: (out, in); bias: (out,).
    """
    by_mkl = cpu.traits().mkl_is_faster and x.dtype == torch.float32
    if _linear is not None and not by_mkl and x.dtype in (torch.float32, torch.bfloat16):
        return _linear(x, weight, bias, *(_GELU if gelu else _NO_ACTIVATION))
    out = F.linear(x, weight, bias)
    return torch.ops.aten.gelu_(out) if gelu else out


def _image(x: Tensor) -> Tensor:
    """View tokens (..., C) as a channels-last image (1, C, N, 1)."""
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


@fp32_fallback
def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of a GEMM's weight.

    Shape:
        grad: (N, out); x: (N, in) -> (out, in).
    """
    few_tokens = grad.shape[1] * x.shape[1] > 1024 * len(x)
    if few_tokens or x.dtype != torch.float32 or not cpu.traits().mkl_is_narrow:
        return torch.mm(grad.t(), x)
    weight = x.new_empty(grad.shape[1], x.shape[1], 1, 1)
    grads = torch.ops.aten.convolution_backward(
        _image(grad), _image(x), weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
        [False, True, False],
    )  # fmt: skip
    return grads[1].reshape(weight.shape[:2])


def linear(x: Tensor, layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Compute ``layer(x)`` in a dtype; autograd can follow.

    Shape:
        x: (..., in) -> (..., out).
    """
    if needs_grad(x, *layer.parameters()):
        return LinearFunction.apply(x.to(dtype), layer.weight, layer.bias)
    return gemm(x.to(dtype), *cast_layer(layer, dtype))


def needs_grad(*tensors: Tensor) -> bool:
    """Tell whether autograd would record an operation on these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class LinearFunction(torch.autograd.Function):
    """``torch.nn.functional.linear`` whose backward pass runs in oneDNN too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Multiply in the dtype of ``x``."""
        ctx.save_for_backward(x, weight, bias)
        return gemm(x, weight.to(x.dtype), bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of tokens, weight and bias that are needed."""
        x, weight, bias = ctx.saved_tensors
        if textbook_is_needed(grad):
            return tuple(textbook_grads(_plain_linear, (x, weight, bias), grad))
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        rows = grad.flatten(0, -2)  # (N, out)
        return (
            gemm(grad, weight.to(x.dtype).t()) if needs_x else None,
            weight_grad(rows, x.flatten(0, -2)) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _plain_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


# Convolutions


def _is_wrong_in_bf16(x: Tensor, weight: Tensor, _bias: Tensor, conv: nn.Conv2d) -> bool:
    """Tell whether oneDNN's bf16 convolution may be wrong, as with AMX it is in two cases.

    They are 5 to 31 channels under kernels of 4, 8 or 16 a side, and results of width 1.
    """
    few_channels = 4 < x.shape[-1] < 32
    padding = conv.padding[1] if isinstance(conv.padding, tuple) else 0
    return few_channels or x.shape[2] + 2 * padding < weight.shape[3] + conv.stride[1]


@functools.partial(fp32_fallback, is_wrong=_is_wrong_in_bf16)
def convolve(x: Tensor, weight: Tensor, bias: Tensor, conv: nn.Conv2d) -> Tensor:
    """Convolve tokens as a layer does, by weights that ``cast_kernel`` returned.

    Shape:
        x: (B, H, W, in) -> (B, H', W', out).
    """
    image = x.permute(0, 3, 1, 2)  # (B, in, H, W), channels-last
    out = F.conv2d(image, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return out.permute(0, 2, 3, 1)  # (B, H', W', out)


def cast_kernel(conv: nn.Conv2d, dtype: torch.dtype) -> Layer:
    """Return weight and bias of a convolution in a dtype, the weight channels-last.

    oneDNN's own reordering of a plain weight takes longer than the convolution at 224 x 224.
    """
    assert conv.bias is not None  # a condition of the fast path
    return conv.weight.to(dtype, memory_format=torch.channels_last), conv.bias.to(dtype)


def convolution(x: Tensor, conv: nn.Conv2d, dtype: torch.dtype) -> Tensor:
    """Compute ``conv`` on tokens in a dtype; autograd can follow.

    Shape:
        x: (B, H, W, in) -> (B, H', W', out).
    """
    return convolve(x.to(dtype), *cast_kernel(conv, dtype), conv)


@fp32_fallback
def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve each channel with its own 3x3 kernel.

    Shape:
        x: (B, H, W, C) -> (B, H, W, C); weight: (C, 1, 3, 3).
    """
    image = x.permute(0, 3, 1, 2)  # (B, C, H, W), channels-last
    out = F.conv2d(image, weight, bias, padding=1, groups=len(weight))
    return out.permute(0, 2, 3, 1)


@fp32_fallback
def depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve as ``depthwise`` does and apply GELU."""
    if _convolution is None or x.dtype not in (torch.float32, torch.bfloat16):
        return F.gelu(depthwise(x, weight, bias))
    ones = [1, 1]
    image = x.permute(0, 3, 1, 2)  # (B, C, H, W), channels-last
    out = _convolution(image, weight, bias, ones, ones, ones, len(weight), *_GELU)
    return out.permute(0, 2, 3, 1)


@fp32_fallback
def depthwise_grads(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``depthwise``: of its input (B, H, W, C), weight and bias."""
    grad_image, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, [len(weight)],
        [1, 1], [1, 1], [1, 1], False, [0, 0], len(weight), [True, True, True],
    )  # fmt: skip
    return grad_image.permute(0, 2, 3, 1).contiguous(), grad_weight, grad_bias
