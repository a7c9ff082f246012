"""The parts of a PVT stage, from the bottom up: drop path, patches, attention, MLP, block.

Names of parameters are those of the reference implementation's checkpoints, leaf by leaf.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pvt_mm.models import ops

#: Block norms and v2's stage norm; PatchEmbed's and attention's norm keep PyTorch's 1e-5. The
#: reference mixes the two, and its weights were trained so.
BLOCK_NORM_EPS = 1e-6

#: Side of the grid of keys and values in v2's linear attention.
LINEAR_GRID = 7


def init_parameters(module: nn.Module) -> None:
    """Draw one layer's parameters as the reference does; for use with ``nn.Module.apply``.

    Linear: truncated normal of std 0.02, bias 0. LayerNorm: 1 and 0. The convolutions of a
    ``PatchEmbed``, attention or MLP decide for themselves through ``fan_out_init``.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, FanOutConv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        module.reset_parameters()


class FanOutConv2d(nn.Conv2d):
    """A convolution of v2: drawn normally by its fan-out within a group. See init_parameters."""

    bias: nn.Parameter


class DropPath(nn.Module):
    """Drop a residual branch for some samples of the batch while training.

    Paper: [Deep Networks with Stochastic Depth](https://arxiv.org/abs/1603.09382).

    Args:
        rate: Chance in [0, 1) that a sample skips the branch; the others are scaled up by
            1 / (1 - rate).

    Shape:
        x: (B, ...) -> (B, ...).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    @property
    def drops(self) -> bool:
        """Whether a branch may be dropped at all: in training, at a rate above 0."""
        return self.training and self.rate > 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Zero the branch of the samples drawn."""
        if not self.drops:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        """Show the rate."""
        return f'rate={self.rate:g}'


class PatchEmbed(nn.Module):
    """Turn patches of an image or feature map into normalised tokens.

    Patches touch each other in v1 (kernel = stride) and overlap in v2 (kernel = 2 stride - 1).
    Paper: [PVT](https://arxiv.org/abs/2102.12122), Sec. 3.2;
    [PVTv2](https://arxiv.org/abs/2106.13797), Sec. 3.2.

    Args:
        in_channels: Channels of the input.
        dim: Width of a token.
        stride: Input pixels from one patch to the next.
        overlap: Take patches of 2 stride - 1 pixels with zero padding instead of stride pixels.

    Shape:
        x: (B, H, W, in_channels) -> (B, H', W', dim), with H' = H // stride, or
        ceil(H / stride) where patches overlap.
    """

    def __init__(self, in_channels: int, dim: int, stride: int, overlap: bool = False) -> None:
        super().__init__()
        self.stride = stride
        self.overlap = overlap
        kernel = 2 * stride - 1 if overlap else stride
        self.padding = kernel // 2 if overlap else 0
        conv = FanOutConv2d if overlap else nn.Conv2d
        self.proj = conv(in_channels, dim, kernel, stride, self.padding)
        self.norm = nn.LayerNorm(dim)

    def grid_side(self, side: int) -> int:
        """Tokens along an input side of so many pixels."""
        return -(-side // self.stride) if self.overlap else side // self.stride

    def forward(self, x: Tensor) -> Tensor:
        """Embed the patches."""
        x = ops.convolution(x, self.proj.weight, self.proj.bias, self.stride, self.padding)
        # The residual stream that begins here stays in fp32 under autocast.
        return self.norm(x.to(self.norm.weight.dtype))  # (B, H', W', dim)


class SpatialReductionAttention(nn.Module):
    """Multi-head attention whose keys and values come from a coarser grid than the queries.

    Paper: [PVT](https://arxiv.org/abs/2102.12122), Sec. 3.3; linear attention:
    [PVTv2](https://arxiv.org/abs/2106.13797), Sec. 3.1.

    Args:
        dim: Width of a token.
        num_heads: Attention heads; ``dim`` is a multiple of it.
        sr_ratio: Keys and values shrink by this factor a side; 1 disables.
        sr_mode: How they shrink: ``'conv'`` by a strided convolution, ``'avg'`` or ``'max'`` by
            pooling each sr_ratio x sr_ratio cell and a linear projection, ``'linear'`` by average
            pooling to 7 x 7 whatever the size, and at every ratio.
        attn_drop_rate: Dropout rate of the attention weights.
        drop_rate: Dropout rate of the output.
        fan_out_init: Draw the convolution by its fan-out (v2).

    Shape:
        x: (B, H, W, dim) -> (B, H, W, dim); keys and values: (B, (H//sr_ratio)*(W//sr_ratio), dim),
        or (B, 49, dim) for ``'linear'``. H and W must be at least sr_ratio, unless ``'linear'``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int = 1,
        sr_mode: str = 'conv',
        attn_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
        fan_out_init: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.sr_mode = sr_mode
        self.attn_drop_rate = attn_drop_rate
        self.drop_rate = drop_rate
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.reduces = sr_ratio > 1 or sr_mode == 'linear'
        if not self.reduces:
            return
        conv = FanOutConv2d if fan_out_init else nn.Conv2d
        if sr_mode == 'conv':
            self.sr: Any = conv(dim, dim, sr_ratio, sr_ratio)
        elif sr_mode == 'linear':
            self.sr = conv(dim, dim, 1)
        else:
            self.sr = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    @property
    def min_side(self) -> int:
        """Smallest side of the token grid that leaves at least one key."""
        return 1 if self.sr_mode == 'linear' else self.sr_ratio

    def reduce(self, x: Tensor, norm: ops.Norm | None = None) -> Tensor:
        """Shrink the grid that keys and values come from.

        Args:
            x: Tokens.
            norm: What comes before a strided convolution, if tokens are not normalised yet.

        Shape:
            x: (B, H, W, dim) -> (B, H//sr_ratio, W//sr_ratio, dim) or (B, 7, 7, dim).
        """
        if not self.reduces:
            return x
        if self.sr_mode != 'conv':
            image = x.permute(0, 3, 1, 2)  # (B, dim, H, W), channels-last
            x = self._pool(image).permute(0, 2, 3, 1)  # (B, H', W', dim)
        if self.sr_mode in ('avg', 'max'):
            x = ops.linear(x, self.sr.weight, self.sr.bias)
        else:
            stride = self.sr_ratio if self.sr_mode == 'conv' else 1
            x = ops.convolution(x, self.sr.weight, self.sr.bias, stride, norm=norm)
        x = self.norm(x)
        return F.gelu(x) if self.sr_mode == 'linear' else x

    def _pool(self, image: Tensor) -> Tensor:
        if self.sr_mode == 'linear':
            return ops.pool_to_grid(image, LINEAR_GRID)
        pool = F.avg_pool2d if self.sr_mode == 'avg' else F.max_pool2d
        return pool(image, self.sr_ratio)

    def forward(self, x: Tensor, norm: ops.Norm) -> Tensor:
        """Normalise, and attend from every token to the coarser grid."""
        _, height, width, _ = x.shape
        later: ops.Norm | None = norm  # norms piece by piece, where x is used
        if not (self.reduces and self.sr_mode == 'conv' and ops.normalises_in_pieces(x)):
            x, later = norm(x), None
        reduced = self.reduce(x, later)
        keys_values = ops.linear(reduced, self.kv.weight, self.kv.bias).flatten(1, 2)
        key, value = keys_values.chunk(2, dim=-1)  # (B, M, dim) each
        out = ops.projected_attention(
            x.flatten(1, 2),
            (self.q.weight, self.q.bias),
            key,
            value,
            (self.proj.weight, self.proj.bias),
            self.num_heads,
            self.attn_drop_rate if self.training else 0.0,
            later,
        )  # (B, H*W, dim)
        out = F.dropout(out, self.drop_rate, self.training)
        return out.unflatten(1, (height, width))


class Mlp(nn.Module):
    """The feed-forward half of a block; in v2 with a depth-wise 3x3 convolution inside.

    Paper: [PVTv2](https://arxiv.org/abs/2106.13797), Sec. 3.3.

    Args:
        dim: Width of a token.
        hidden: Width between the two layers.
        dwconv: Put the depth-wise convolution before the GELU (v2).
        relu: Put a ReLU before the depth-wise convolution (v2's linear attention).
        drop_rate: Dropout rate after each layer.

    Shape:
        x: (B, H, W, dim) -> (B, H, W, dim).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        dwconv: bool = False,
        relu: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.relu = relu
        self.drop_rate = drop_rate
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = FanOutConv2d(hidden, hidden, 3, 1, 1, groups=hidden) if dwconv else None
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, norm: ops.Norm, drop_path: DropPath) -> Tensor:
        """Add the perceptron's result for every normalised token to ``x``, perhaps in place."""
        dwconv = None if self.dwconv is None else (self.dwconv.weight, self.dwconv.bias)
        return ops.add_mlp(
            x,
            norm,
            (self.fc1.weight, self.fc1.bias),
            (self.fc2.weight, self.fc2.bias),
            dwconv,
            self.relu,
            self.drop_rate if self.training else 0.0,
            drop_path if drop_path.drops else None,
        )


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each with a residual and drop path.

    Args:
        dim: Width of a token.
        attn: The attention.
        mlp: The perceptron.
        drop_path_rate: Chance that a sample skips a branch while training.

    Shape:
        x: (B, H, W, dim) -> (B, H, W, dim).
    """

    def __init__(
        self,
        dim: int,
        attn: SpatialReductionAttention,
        mlp: Mlp,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=BLOCK_NORM_EPS)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Run both branches."""
        x = ops.add_to(self.drop_path(self.attn(x, self.norm1)), x)
        return self.mlp(x, self.norm2, self.drop_path)
