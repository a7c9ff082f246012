"""The layers of a PVT stage, from the bottom up: patch embedding, attention, MLP, block.

Names of parameters are those of the reference implementation's checkpoints, leaf by leaf.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvt_mm.models import fast
from pvt_mm.models.context import is_exporting

#: Block norms and v2's stage norm; PatchEmbed's and attention's norm keep PyTorch's 1e-5. The
#: reference mixes the two, and its weights were trained so.
BLOCK_NORM_EPS = 1e-6

#: Side of the grid of keys and values in v2's linear attention.
LINEAR_GRID = 7


def init_parameters(module: nn.Module, fan_out: bool = False) -> None:
    """Initialise one layer as the reference does; for use with ``nn.Module.apply``.

    Linear: truncated normal of std 0.02, bias 0. LayerNorm: 1 and 0.

    Args:
        module: Any module; what is no such layer stays as it is.
        fan_out: Initialise convolutions by a normal distribution of their fan-out within a group
            (v2), not as PyTorch does (v1).
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d) and fan_out:
        outputs = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / outputs))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        module.reset_parameters()


@fast.stock
class FanOutConv2d(nn.Conv2d):
    """A convolution in whole-model pickles of PVTv2 of 0.1.0."""


@fast.stock
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


@fast.stock
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
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride, kernel // 2 if overlap else 0)
        self.norm = nn.LayerNorm(dim)

    def grid_side(self, side: int) -> int:
        """Return the number of tokens along an input side of so many pixels."""
        return -(-side // self.stride) if self.overlap else side // self.stride

    def forward(self, x: Tensor) -> Tensor:
        """Embed the patches."""
        if fast.applies(self, x):
            return fast.patch_embed(self, x)
        x = self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, H', W', dim)
        # The residual stream that begins here stays in fp32 under autocast.
        dtype = next((p.dtype for p in self.norm.parameters() if p.is_floating_point()), x.dtype)
        return self.norm(x.to(dtype))


def add_position(x: Tensor, position: Tensor, patch_embed: nn.Module) -> Tensor:
    """Add a position embedding to what a patch embedding returned.

    Shape:
        x: (B, H, W, dim); position: (1, H, W, dim) -> (B, H, W, dim).
    """
    if position.dtype == x.dtype and fast.may_overwrite(x, patch_embed):
        return x.add_(position)
    return x + position


@fast.stock
class SpatialReductionAttention(nn.Module):
    """Multi-head attention whose keys and values come from a coarser grid than the queries.

    Paper: [PVT](https://arxiv.org/abs/2102.12122), Sec. 3.3; linear attention:
    [PVTv2](https://arxiv.org/abs/2106.13797), Sec. 3.1.

    Args:
        dim: Width of a token.
        num_heads: Attention heads; ``dim`` is a multiple of it.
        sr_ratio: Keys and values shrink by this factor per side; 1 disables.
        sr_mode: How they shrink: ``'conv'`` by a strided convolution, ``'avg'`` or ``'max'`` by
            pooling each sr_ratio x sr_ratio cell and a linear projection, ``'linear'`` by average
            pooling to 7 x 7 whatever the size, and at every ratio.
        attn_drop_rate: Dropout rate of the attention weights.
        drop_rate: Dropout rate of the output.

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
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.sr_mode = sr_mode
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1 or sr_mode == 'linear':
            if sr_mode == 'conv':
                self.sr: Any = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            elif sr_mode == 'linear':
                self.sr = nn.Conv2d(dim, dim, 1)
            else:
                self.sr = nn.Linear(dim, dim)
            self.norm: Any = nn.LayerNorm(dim)
        else:
            self.sr = self.norm = None
        self._add_functions(attn_drop_rate, drop_rate)

    def _add_functions(self, attn_drop_rate: float, drop_rate: float) -> None:
        """Add the modules without parameters."""
        pools = {
            'avg': nn.AvgPool2d(self.sr_ratio),
            'max': nn.MaxPool2d(self.sr_ratio),
            'linear': nn.AdaptiveAvgPool2d(LINEAR_GRID),
        }
        self.pool = None if self.sr is None else pools.get(self.sr_mode)
        self.act = nn.GELU() if self.sr_mode == 'linear' else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop_rate)
        self.proj_drop = nn.Dropout(drop_rate)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a whole-model pickle of 0.1.0 too, which has dropout rates in place of modules."""
        super().__setstate__(state)
        if 'drop_rate' in state:
            if not self.__dict__.pop('reduces'):
                self.sr = self.norm = None
            rates = (self.__dict__.pop(name) for name in ('attn_drop_rate', 'drop_rate'))
            self._add_functions(*rates)
            self.train(self.training)

    @property
    def min_side(self) -> int:
        """Smallest side of the token grid that leaves at least one key."""
        return 1 if self.sr_mode == 'linear' else self.sr_ratio

    def reduce(self, x: Tensor) -> Tensor:
        """Shrink the grid that keys and values come from.

        Shape:
            x: (B, H, W, dim) -> (B, H//sr_ratio, W//sr_ratio, dim) or (B, 7, 7, dim).
        """
        if self.sr is None:
            return x
        image = x.permute(0, 3, 1, 2)  # (B, dim, H, W), channels-last
        if self.sr_mode == 'linear' and is_exporting():
            image = _pool_by_matmul(image, LINEAR_GRID)
        elif self.pool is not None:
            image = self.pool(image)
        if self.sr_mode in ('avg', 'max'):
            x = self.sr(image.permute(0, 2, 3, 1))  # (B, H', W', dim)
        else:
            x = self.sr(image).permute(0, 2, 3, 1)  # (B, H', W', dim)
        return self.act(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every token to the coarser grid."""
        height, width = x.shape[1:3]
        query = self.q(x.flatten(1, 2))  # (B, N, dim)
        key, value = self.kv(self.reduce(x).flatten(1, 2)).chunk(2, dim=-1)  # (B, M, dim) each
        # A list: PyTorch 2.1 cannot compile a generator.
        q, k, v = [
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value)
        ]
        if torch.jit.is_tracing():  # counters of FLOPs trace, and know no fused attention
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, N, M)
            out = self.attn_drop(scores.softmax(-1)) @ v  # (B, heads, N, d)
        else:
            drop_rate = self.attn_drop.p if self.attn_drop.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=drop_rate)
        out = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))  # (B, N, dim)
        return out.unflatten(1, (height, width))


def _pool_by_matmul(image: Tensor, side: int) -> Tensor:
    """Average an image over a grid of ``side`` x ``side`` cells by two matmuls.

    ONNX has no adaptive pooling for sizes that are known only when the model runs.

    Shape:
        image: (B, C, H, W) -> (B, C, side, side).
    """
    rows = _cell_weights(image, 2, side)  # (side, H)
    columns = _cell_weights(image, 3, side)  # (side, W)
    return rows @ (image @ columns.t())


def _cell_weights(image: Tensor, dim: int, side: int) -> Tensor:
    """Return the weight of each position along a dimension in each of ``side`` cells."""
    length = image.shape[dim]
    cell = torch.arange(side, device=image.device)[:, None]
    start = cell * length // side
    end = ((cell + 1) * length + side - 1) // side
    position = torch.arange(length, device=image.device)
    inside = ((position >= start) & (position < end)).to(image.dtype)
    return inside / (end - start).to(image.dtype)


@fast.stock
class Mlp(nn.Module):
    """The MLP of a block; in v2 with a depth-wise 3x3 convolution inside.

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
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden) if dwconv else None
        self.fc2 = nn.Linear(hidden, dim)
        self._add_functions(relu, drop_rate)

    def _add_functions(self, relu: bool, drop_rate: float) -> None:
        """Add the modules without parameters."""
        self.relu = nn.ReLU() if relu else nn.Identity()
        self.act = nn.GELU()
        self.drop = nn.Dropout(drop_rate)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a whole-model pickle of 0.1.0 too, which has settings in place of modules."""
        super().__setstate__(state)
        if 'drop_rate' in state:
            self._add_functions(self.__dict__.pop('relu'), self.__dict__.pop('drop_rate'))
            self.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Run both layers on every token."""
        x = self.relu(self.fc1(x))  # (B, H, W, hidden)
        if self.dwconv is not None:
            x = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (B, H, W, hidden)
        return self.drop(self.fc2(self.drop(self.act(x))))


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each with a residual and drop path.

    Args:
        dim: Width of a token.
        attn: The attention.
        mlp: The MLP.
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
        if fast.applies(self, x, fast.is_known_block):
            return fast.block(self, x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
