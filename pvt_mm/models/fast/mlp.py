"""The MLP of a block in chunks that stay in the cache, forward and backward.

PyTorch's plain form writes the whole hidden layer to memory and reads it back; at detection sizes
that costs more than the arithmetic. Here a chunk is made, used and freed. Training saves the inputs
and recomputes the chunks in the backward pass, but for small hidden layers, which it saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvt_mm.models.fast.autograd import textbook_grads, textbook_is_needed
from pvt_mm.models.fast.gemm import (
    Layer,
    chunk_rows,
    chunks,
    depthwise,
    depthwise_gelu,
    depthwise_grads,
    gemm,
    weight_grad,
)

#: Elements of a hidden layer, before and after its convolution, up to which training saves it.
SAVED = 2**22
#: Hidden channels that go through the depth-wise convolution together.
CHANNELS = 128


class MlpLayers(NamedTuple):
    """The layers of an MLP, each a weight and a bias.

    Attributes:
        fc1: (hidden, C).
        fc2: (C, hidden).
        dwconv: (hidden, 1, 3, 3), in v2.
        relu: Whether a ReLU stands before the depth-wise convolution (linear attention).
    """

    fc1: Layer
    fc2: Layer
    dwconv: Layer | None
    relu: bool


def add_mlp(x: Tensor, norm: nn.LayerNorm, mlp: Any, dtype: torch.dtype) -> Tensor:
    """Compute ``x + mlp(norm(x))`` in the place of ``x``, without autograd.

    Args:
        x: Tokens that the caller made itself; they are overwritten.
        norm: The norm before the MLP.
        mlp: A ``pvt_mm.models.layers.Mlp``.
        dtype: What matmuls run in.

    Shape:
        x: (B, H, W, C), contiguous -> (B, H, W, C).
    """
    image = x if mlp.dwconv is not None else x.view(1, -1, 1, x.shape[-1])
    waiting: tuple[Tensor, Tensor] | None = None
    layers = _inputs(x, mlp).layers(isinstance(mlp.relu, nn.ReLU), dtype)
    for place, part in _parts(image, norm, layers):
        # A tile of rows reads the last row of the tile before as it was.
        if waiting is not None:
            waiting[0].add_(waiting[1])
        waiting = image[place], part
    if waiting is not None:  # None for an empty batch
        waiting[0].add_(waiting[1])
    return x


def mlp_branch(x: Tensor, mlp: Any, dtype: torch.dtype) -> Tensor:
    """Compute ``mlp(x)`` in a dtype; autograd can follow.

    Shape:
        x: (B, H, W, C) -> (B, H, W, C).
    """
    return MlpFunction.apply(*_inputs(x, mlp), isinstance(mlp.relu, nn.ReLU), dtype)


def _inputs(x: Tensor, mlp: Any) -> MlpInputs:
    dwconv = (None, None) if mlp.dwconv is None else (mlp.dwconv.weight, mlp.dwconv.bias)
    fc1, fc2 = mlp.fc1, mlp.fc2
    return MlpInputs(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, *dwconv)


# Inference


def _parts(
    image: Tensor, norm: nn.LayerNorm | None, layers: MlpLayers
) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Yield some images and rows of them, and the MLP's result for these.

    Args:
        image: Tokens. Without a convolution they do not meet: all may count as one column.
        norm: The norm before the MLP; None for none.
        layers: The MLP.

    Shape:
        image: (B, H, W, C).
    """
    dtype, hidden = layers.fc1[0].dtype, len(layers.fc1[0])
    if layers.dwconv is None:
        for rows in chunks(image.shape[1], chunk_rows(hidden, dtype)):
            tokens = image[:, rows] if norm is None else norm(image[:, rows])
            yield (
                (slice(None), rows),
                gemm(gemm(tokens.to(dtype), *layers.fc1, gelu=True), *layers.fc2),
            )
        return
    elements = 2 * image.shape[1] * image.shape[2] * hidden
    for images in chunks(len(image), chunk_rows(elements, dtype)):
        for rows, part in _row_tiles(image[images], norm, layers):
            yield (images, rows), part


def _row_tiles(
    x: Tensor, norm: nn.LayerNorm | None, layers: MlpLayers
) -> Iterator[tuple[slice, Tensor]]:
    """Yield tiles of rows and the MLP's result for them.

    The convolution needs one row more on each side of a tile.
    """
    fc1, fc2, _, _ = layers
    images, height, width, _ = x.shape
    hidden, dtype = len(fc1[0]), fc1[0].dtype
    all_fit = chunk_rows(images * height * width * hidden, dtype)
    group = hidden if all_fit else min(hidden, CHANNELS)
    groups = list(chunks(hidden, group))
    weights2 = [fc2[0][:, channels].contiguous() for channels in groups]
    for rows in chunks(height, chunk_rows(2 * images * width * group, dtype)):  # two buffers
        top = max(rows.start - 1, 0)
        tile = x[:, top : rows.stop + 1]
        tile = (tile if norm is None else norm(tile)).to(dtype)
        inner = slice(rows.start - top, rows.stop - top)
        total: Any = None
        for channels, weight in zip(groups, weights2):
            # The hidden layer has no name here: it is freed before the next one is made.
            bias = fc2[1] if total is None else None
            part = gemm(_activated(tile, layers, channels)[:, inner], weight, bias)
            total = part if total is None else total.add_(part)
        yield rows, total


def _activated(x: Tensor, layers: MlpLayers, channels: slice) -> Tensor:
    """Return some channels of the hidden layer after GELU, (B, H, W, channels)."""
    assert layers.dwconv is not None
    x = gemm(x, layers.fc1[0][channels], layers.fc1[1][channels])
    if layers.relu:
        x.relu_()
    return depthwise_gelu(x, layers.dwconv[0][channels], layers.dwconv[1][channels])


def _mlp(x: Tensor, layers: MlpLayers) -> Tensor:
    """Compute the MLP chunk by chunk, without autograd."""
    has_conv = layers.dwconv is not None
    image = x if has_conv else x.reshape(1, -1, 1, x.shape[-1])
    out = image.new_empty(image.shape, dtype=layers.fc1[0].dtype)
    for place, part in _parts(image, None, layers):
        out[place] = part
    return out.view(x.shape)


# Training


class MlpFunction(torch.autograd.Function):
    """An MLP that saves its input, and its hidden layer only where that is small."""

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
        """Compute the MLP in ``dtype``."""
        ctx.relu, ctx.dtype = relu, dtype
        inputs = MlpInputs(x, weight1, bias1, weight2, bias2, dw_weight, dw_bias)
        hidden_layers = 1 if dw_weight is None else 2
        if x.numel() // x.shape[-1] * len(weight1) * hidden_layers > SAVED:
            ctx.save_for_backward(*inputs)
            return _mlp(x, inputs.layers(relu, dtype))
        weights = inputs.weights(slice(None), dtype)
        hidden = _hidden(x.to(dtype), weights, relu)
        ctx.save_for_backward(*inputs, *hidden)
        return gemm(F.gelu(hidden.after), weights.fc2, bias2.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; a hidden layer that was not saved is recomputed in chunks."""
        tensors = ctx.saved_tensors  # once: with activation checkpointing, twice is an error
        inputs = MlpInputs(*tensors[: len(MlpInputs._fields)])
        saved = tensors[len(MlpInputs._fields) :]
        if textbook_is_needed(grad):

            def textbook(*tensors: Tensor) -> Tensor:
                return _plain_mlp(MlpInputs(*tensors), ctx.relu, ctx.dtype)

            return *textbook_grads(textbook, inputs, grad), None, None
        x, grad = inputs.x.to(ctx.dtype), grad.to(ctx.dtype).contiguous()
        if saved:
            weights = inputs.weights(slice(None), ctx.dtype)
            grads = _mlp_grads(x, grad, weights, Hidden(*saved), ctx.relu)
        else:
            grads = _summed_grads(x, grad, inputs, ctx.relu)
        bias2 = grad.flatten(0, -2).sum(0)
        dwconv = grads.dw_weight, grads.dw_bias
        return grads.x, grads.weight1, grads.bias1, grads.weight2, bias2, *dwconv, None, None


class Weights(NamedTuple):
    """Weights of some hidden channels, as the backward pass needs them."""

    fc1: Tensor
    bias1: Tensor
    fc2: Tensor
    dwconv: Layer | None


class Hidden(NamedTuple):
    """The hidden layer after fc1 (and ReLU), and after the convolution, before GELU."""

    before: Tensor
    after: Tensor


class MlpInputs(NamedTuple):
    """What ``MlpFunction`` saves."""

    x: Tensor
    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor
    dw_weight: Tensor | None
    dw_bias: Tensor | None

    def layers(self, relu: bool, dtype: torch.dtype) -> MlpLayers:
        """Return all layers in a dtype."""
        return MlpLayers(
            (self.weight1.to(dtype), self.bias1.to(dtype)),
            (self.weight2.to(dtype), self.bias2.to(dtype)),
            self._dwconv(slice(None), dtype),
            relu,
        )

    def weights(self, channels: slice, dtype: torch.dtype) -> Weights:
        """Return the weights of some hidden channels in a dtype."""
        return Weights(
            self.weight1[channels].to(dtype),
            self.bias1[channels].to(dtype),
            self.weight2[:, channels].to(dtype).contiguous(),
            self._dwconv(channels, dtype),
        )

    def _dwconv(self, channels: slice, dtype: torch.dtype) -> Layer | None:
        if self.dw_weight is None or self.dw_bias is None:
            return None
        return self.dw_weight[channels].to(dtype), self.dw_bias[channels].to(dtype)


class MlpGrads(NamedTuple):
    """Gradients of tokens, fc1's weight and bias, fc2's weight, and the depth-wise convolution."""

    x: Tensor
    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    dw_weight: Tensor | None
    dw_bias: Tensor | None


def _plain_mlp(inputs: MlpInputs, relu: bool, dtype: torch.dtype) -> Tensor:
    """Compute the MLP in PyTorch's plain operations."""
    fc1, fc2, dwconv, _ = inputs.layers(relu, dtype)
    x = F.linear(inputs.x.to(dtype), *fc1)  # (B, H, W, hidden)
    if relu:
        x = F.relu(x)
    if dwconv is not None:
        image = x.permute(0, 3, 1, 2)  # (B, hidden, H, W), channels-last
        x = F.conv2d(image, *dwconv, padding=1, groups=len(fc1[0])).permute(0, 2, 3, 1)
    return F.linear(F.gelu(x), *fc2)


def _hidden(x: Tensor, weights: Weights, relu: bool) -> Hidden:
    before = gemm(x, weights.fc1, weights.bias1)
    if relu:
        before.relu_()
    return Hidden(before, before if weights.dwconv is None else depthwise(before, *weights.dwconv))


def _summed_grads(x: Tensor, grad: Tensor, inputs: MlpInputs, relu: bool) -> MlpGrads:
    """Recompute the hidden layer chunk by chunk, and sum what ``_mlp_grads`` returns.

    A chunk is some tokens or, since the convolution needs each channel whole, some channels.
    """
    hidden, shape, everything = len(inputs.weight1), x.shape, slice(None)
    token_chunks, channel_chunks = [everything], [everything]
    if inputs.dw_weight is None:
        x, grad = (t.reshape(1, 1, -1, shape[-1]) for t in (x, grad))
        token_chunks = list(chunks(x.shape[2], chunk_rows(hidden, x.dtype)))
    else:
        most = chunk_rows(x.numel() // shape[-1], x.dtype) // 64 * 64
        channel_chunks = list(chunks(hidden, max(most, 64)))
    sums = MlpGrads(
        torch.zeros_like(x),
        torch.zeros_like(inputs.weight1),
        torch.zeros_like(inputs.bias1),
        torch.zeros_like(inputs.weight2),
        None if inputs.dw_weight is None else torch.zeros_like(inputs.dw_weight),
        None if inputs.dw_bias is None else torch.zeros_like(inputs.dw_bias),
    )
    for channels in channel_chunks:
        weights = inputs.weights(channels, x.dtype)
        for tokens in token_chunks:
            chunk = x[:, :, tokens]
            made = _hidden(chunk, weights, relu)
            new = _mlp_grads(chunk, grad[:, :, tokens], weights, made, relu)
            sums.x[:, :, tokens].add_(new.x)
            sums.weight1[channels].add_(new.weight1)
            sums.bias1[channels].add_(new.bias1)
            sums.weight2[:, channels].add_(new.weight2)
            for total, part in ((sums.dw_weight, new.dw_weight), (sums.dw_bias, new.dw_bias)):
                if total is not None and part is not None:
                    total[channels].add_(part)
    return sums._replace(x=sums.x.view(shape))


def _mlp_grads(x: Tensor, grad: Tensor, weights: Weights, hidden: Hidden, relu: bool) -> MlpGrads:
    """Return the gradients of some tokens and hidden channels.

    Args:
        x: Tokens.
        grad: Gradient of the result for them.
        weights: Of the hidden channels.
        hidden: The hidden layer of these tokens and channels.
        relu: Whether a ReLU stands before the convolution.

    Shape:
        x and grad: (B, H, W, C); hidden: (B, H, W, channels) each.
    """
    weight2 = weight_grad(grad.flatten(0, -2), F.gelu(hidden.after).flatten(0, -2))
    grad_hidden = gemm(grad, weights.fc2.t())
    torch.ops.aten.gelu_backward(grad_hidden, hidden.after, grad_input=grad_hidden)
    dw_weight = dw_bias = None
    if weights.dwconv is not None:
        grad_hidden, dw_weight, dw_bias = depthwise_grads(
            grad_hidden, hidden.before, weights.dwconv[0]
        )
    if relu:
        torch.ops.aten.threshold_backward(grad_hidden, hidden.before, 0, grad_input=grad_hidden)
    rows = grad_hidden.flatten(0, -2)  # (N, channels)
    weight1 = weight_grad(rows, x.flatten(0, -2))
    grad_x = gemm(grad_hidden, weights.fc1.t())
    return MlpGrads(grad_x, weight1, rows.sum(0), weight2, dw_weight, dw_bias)
