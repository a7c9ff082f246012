"""What PVT v1 and v2 share: a stage, and the backbone that strings four of them together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint as recompute

from pvt_mm.archs import STRIDES
from pvt_mm.checkpoint.convert import resize_grid
from pvt_mm.checkpoint.load import CHANNEL_MODES, load_into_backbone
from pvt_mm.errors import ArchError
from pvt_mm.models.arguments import check_init_cfg
from pvt_mm.models.context import is_autocast, is_tracing
from pvt_mm.models.layers import Block, PatchEmbed, add_position, init_parameters

#: What the backbone alone may compute in. Not fp16: without loss scaling its gradients vanish.
COMPUTE_DTYPES = ('bfloat16',)


class StageSpec(NamedTuple):
    """What differs from stage to stage."""

    stride: int
    in_channels: int
    dim: int
    num_heads: int
    mlp_ratio: float
    sr_ratio: int
    drop_path_rates: tuple[float, ...]


class Stage(nn.Module):
    """Patch embedding, position embedding (v1), blocks and a final norm (v2).

    Args:
        patch_embed: Makes the tokens.
        blocks: Transformer blocks, run in order.
        pos_grid: Height and width of the learned position embedding; None for none (v2).
        drop_rate: Dropout rate after the position embedding.
        norm: Norm after the blocks; None for none (v1).
        with_cp: Recompute each block's activations in the backward pass to save memory.

    Shape:
        x: (B, H, W, C) -> (B, H', W', dim), as ``patch_embed`` gives.
    """

    def __init__(
        self,
        patch_embed: PatchEmbed,
        blocks: Sequence[Block],
        pos_grid: tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        norm: nn.Module | None = None,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.dim = patch_embed.norm.normalized_shape[0]
        self.patch_embed = patch_embed
        if pos_grid is None:
            self.register_parameter('pos_embed', None)
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, *pos_grid, self.dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks: Any = nn.ModuleList(blocks)  # Any: items are typed as bare Module
        self.norm = norm
        self.with_cp = with_cp

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a whole-model pickle of 0.1.0 too, which has a dropout rate in place of a module."""
        super().__setstate__(state)
        if 'drop_rate' in state:
            self.pos_drop = nn.Dropout(self.__dict__.pop('drop_rate')).train(self.training)

    @property
    def min_side(self) -> int:
        """Smallest side of the token grid that the attentions can reduce."""
        return max(block.attn.min_side for block in self.blocks)

    def init_position(self) -> None:
        """Initialise the position embedding by a truncated normal of std 0.02."""
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def add_position(self, x: Tensor) -> Tensor:
        """Add the position embedding, resized to the grid of ``x`` where that differs.

        Shape:
            x: (B, H, W, dim) -> (B, H, W, dim).
        """
        if self.pos_embed is None:
            return x
        height, width = x.shape[1:3]
        pos_embed: Tensor = self.pos_embed
        # While tracing, a comparison would pin the sizes; resizing to one's own size is no change.
        if is_tracing() or (height, width) != tuple(pos_embed.shape[1:3]):
            pos_embed = resize_grid(pos_embed, height, width)
        return self.pos_drop(add_position(x, pos_embed, self.patch_embed))

    def forward(self, x: Tensor) -> Tensor:
        """Make the tokens and run the blocks."""
        x = self.add_position(self.patch_embed(x))  # (B, H', W', dim)
        for block in self.blocks:
            if self.with_cp and torch.is_grad_enabled():
                x = recompute(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x if self.norm is None else self.norm(x)


class PyramidBackbone(BaseModule):
    """Four stages, each at half the resolution of the one before, at strides 4, 8, 16 and 32.

    Subclasses build the stages. Loading converts published checkpoints, see
    ``pvt_mm.checkpoint``.

    Args:
        stages: The stages that are needed, from the first on.
        in_channels: Channels of the input image.
        out_indices: Stages to return, in ascending order.
        frozen_stages: Freeze the first so many stages whole: no gradient, evaluation mode kept.
            0 and -1 freeze none.
        allow_partial: Take weights that fit in part; the rest keeps its own values.
        adapt_in_channels: Take weights for other image channels, ``'sum'`` or ``'repeat'``.
        weights_prefix: Where weights hold several PVTs, what stands before the one to take.
        compute_dtype: ``'bfloat16'``: run products in it while weights, residuals and features
            stay in fp32; None keeps the weights' dtype, or autocast's where that is on.
        init_cfg: mmengine's initialisation, such as
            ``dict(type='Pretrained', checkpoint=PATH_OR_URL)``.

    Attributes:
        out_channels: Channels of each returned stage.
        min_size: Smallest input side, in pixels, that works.

    Shape:
        x: (B, in_channels, H, W) -> tuple of (B, C_i, H_i, W_i), contiguous, for i in out_indices.
    """

    #: Whether convolutions are initialised by their fan-out.
    FAN_OUT_INIT: ClassVar[bool] = False
    #: Also the value of backbones that were pickled before it was an argument.
    weights_prefix: str | None = None

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        in_channels: int,
        out_indices: Sequence[int],
        frozen_stages: int = -1,
        allow_partial: bool = False,
        adapt_in_channels: str | None = None,
        weights_prefix: str | None = None,
        compute_dtype: str | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        check_init_cfg(init_cfg)
        super().__init__(init_cfg)
        if compute_dtype not in (None, *COMPUTE_DTYPES):
            raise ArchError(
                f'There is no compute_dtype={compute_dtype!r}; choose one of {COMPUTE_DTYPES}, or '
                'None to compute as the weights are.'
            )
        if adapt_in_channels not in (None, *CHANNEL_MODES):
            raise ArchError(
                f'There is no adapt_in_channels={adapt_in_channels!r}; choose one of '
                f'{CHANNEL_MODES}, or None to refuse weights for other image channels.'
            )
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= len(stages):
            raise ArchError(
                f'frozen_stages={frozen_stages} does not fit: {len(stages)} stages are built, '
                f'so give -1 (freeze none) to {len(stages)} (freeze all).'
            )
        self.stages: Any = nn.ModuleList(stages)
        self.in_channels = in_channels
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.allow_partial = allow_partial
        self.adapt_in_channels = adapt_in_channels
        self.weights_prefix = weights_prefix
        self.compute_dtype = compute_dtype
        self.out_channels = tuple(stages[i].dim for i in self.out_indices)
        self.min_size = next(side for side in itertools.count(1) if self._fits(side))
        self.loaded = ''  # what the last load of weights said
        self._init_parameters()
        for stage in self._frozen():
            stage.requires_grad_(False)
        self.train()

    def _fits(self, side: int) -> bool:
        for stage in self.stages:
            side = stage.patch_embed.grid_side(side)
            if side < stage.min_side:
                return False
        return True

    def _frozen(self) -> Sequence[nn.Module]:
        return list(self.stages)[: max(self.frozen_stages, 0)]

    def _init_parameters(self) -> None:
        self.apply(partial(init_parameters, fan_out=self.FAN_OUT_INIT))
        for stage in self.stages:
            stage.init_position()

    def init_weights(self) -> None:
        """Initialise all parameters as the reference does, then apply ``init_cfg``."""
        if not self.is_init:
            self._init_parameters()
        super().init_weights()

    def train(self, mode: bool = True) -> PyramidBackbone:
        """Switch to training or evaluation; frozen stages stay in evaluation."""
        super().train(mode)
        for stage in self._frozen():
            stage.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return the layer of a parameter, and how many layers there are, for layer-wise decay.

        Layer 0 holds the first embeddings, then each block is one, and the last is what comes after
        the stages. A later stage's embeddings and class token, and any stage's norm, count with the
        block before them. The signature is mmpretrain's.

        Args:
            param_name: Name of the parameter in the whole model.
            prefix: The backbone's place in the model, such as ``'backbone.'``.
        """
        depths = [len(stage.blocks) for stage in self.stages]
        last = sum(depths) + 1
        start = f'{prefix}stages.'
        number, part, *rest = f'{param_name.removeprefix(start)}.'.split('.')
        if not param_name.startswith(start) or part == 'final_norm':
            return last, last + 1
        depth = sum(depths[: int(number)])
        if part == 'blocks':
            depth += int(rest[0]) + 1
        elif part == 'norm':
            depth += depths[int(number)]
        return depth, last + 1

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Overridden rather than hooked: a registered hook would not survive pickling everywhere.
        given = any(key.startswith(prefix) for key in state_dict)
        message = load_into_backbone(
            state_dict,
            prefix,
            self.state_dict(),
            type(self).__name__,
            self.allow_partial,
            self.adapt_in_channels,
            self.weights_prefix,
        )
        print_log(message, logger='current')
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if given:
            self.loaded = message

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature pyramid of a batch of images.

        Raises:
            TypeError: Where the image is not of floating point, or not of the weights' dtype
                outside of autocast.
            ValueError: Where the rank or the channels are wrong, or a side is below ``min_size``.
        """
        self._check_image(x)
        if self.compute_dtype is None:
            return self._pyramid(x)
        with torch.autocast(x.device.type, getattr(torch, self.compute_dtype)):
            features = self._pyramid(x)
        return tuple(feature.float() for feature in features)

    def _pyramid(self, x: Tensor) -> tuple[Tensor, ...]:
        outs = []
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C), and so from stage to stage
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                # mmcv's RoIAlign and deformable convolutions read memory as plain NCHW.
                outs.append(x.permute(0, 3, 1, 2).contiguous())
        return tuple(outs)

    def _check_image(self, x: Tensor) -> None:
        name = type(self).__name__
        if isinstance(x, fx.Proxy):
            raise TypeError(
                f'torch.fx.symbolic_trace cannot follow {name}: its operations depend on the size '
                'of the image; use torch.export.export(model, (image,)), or make_fx(model)(image) '
                'from torch.fx.experimental.proxy_tensor.'
            )
        if x.ndim != 4:
            raise ValueError(
                f'{name} takes images of shape (B, {self.in_channels}, H, W), '
                f'but got a tensor of shape {tuple(x.shape)}.'
            )
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f'{name} was built for {self.in_channels} input channels, but the image has '
                f'{x.shape[1]}; set in_channels={x.shape[1]} or convert the image.'
            )
        parameters = self.stages[0].patch_embed.parameters()
        dtype = next((p.dtype for p in parameters if p.is_floating_point()), x.dtype)
        if not x.is_floating_point() or (x.dtype != dtype and not is_autocast(x.device.type)):
            raise TypeError(
                f'{name} has weights of {dtype}, but the image is {x.dtype}; '
                f'convert it with .to({dtype}).'
            )
        if not is_tracing() and min(x.shape[2:]) < self.min_size:
            raise ValueError(
                f'{name} needs images of at least {self.min_size} x {self.min_size} pixels, '
                f'but got {x.shape[2]} x {x.shape[3]}: a stage would have no keys left.'
            )


def check_out_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    """Return the stages asked for as a tuple.

    Raises:
        ArchError: Where there is none, one does not exist, or they do not ascend.
    """
    if isinstance(out_indices, (int, str)) or not isinstance(out_indices, Iterable):
        raise ArchError(f'out_indices={out_indices!r} must be a tuple of stages, such as (0, 3).')
    indices = tuple(out_indices)
    whole = all(isinstance(index, int) and not isinstance(index, bool) for index in indices)
    if not indices or not whole or not set(indices) <= set(range(len(STRIDES))):
        raise ArchError(f'out_indices={indices} must name stages 0 to {len(STRIDES) - 1}.')
    if list(indices) != sorted(set(indices)):
        raise ArchError(f'out_indices={indices} must ascend, each stage once.')
    return indices


def stage_specs(
    arch: Mapping[str, Any], in_channels: int, drop_path_rate: float, num_stages: int
) -> Iterator[StageSpec]:
    """Yield what each stage is built from.

    Drop path rises linearly from 0 to ``drop_path_rate`` over the blocks of all four stages,
    whether they are built or not, so that leaving out a stage changes no other.
    """
    depths = arch['depths']
    last = max(sum(depths) - 1, 1)
    rates = [drop_path_rate * i / last for i in range(sum(depths))]
    for i in range(num_stages):
        start = sum(depths[:i])
        yield StageSpec(
            stride=STRIDES[i],
            in_channels=in_channels if i == 0 else arch['dims'][i - 1],
            dim=arch['dims'][i],
            num_heads=arch['num_heads'][i],
            mlp_ratio=arch['mlp_ratios'][i],
            sr_ratio=arch['sr_ratios'][i],
            drop_path_rates=tuple(rates[start : start + depths[i]]),
        )
