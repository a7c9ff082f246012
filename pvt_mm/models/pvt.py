"""PVT and PVTv2: each builds its own stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mmengine.registry import MODELS
from torch import Tensor, nn

from pvt_mm.archs import PVT_ARCHS, PVT_V2_ARCHS, resolve_arch
from pvt_mm.errors import ArchError
from pvt_mm.models.arguments import argument_names, check_numbers, refuse_arguments
from pvt_mm.models.classification import ClassTokenStage
from pvt_mm.models.layers import BLOCK_NORM_EPS, Block, Mlp, PatchEmbed, SpatialReductionAttention
from pvt_mm.models.pyramid import PyramidBackbone, Stage, StageSpec, check_out_indices, stage_specs

SR_MODES = ('conv', 'avg', 'max')


@MODELS.register_module()
class PVT(PyramidBackbone):
    """Pyramid Vision Transformer.

    Paper: [Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without
    Convolutions](https://arxiv.org/abs/2102.12122), Sec. 3 and Table 1.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'medium'``, ``'large'``, or a dict with ``dims``,
            ``depths``, ``num_heads``, ``mlp_ratios`` and ``sr_ratios``, one value per stage.
        in_channels: Channels of the input image.
        pretrain_img_size: Side, or height and width, in pixels, of the images that the position
            embeddings are learned at. They are resized to any other input.
        out_indices: Stages to return, in ascending order; later ones are not built.
        drop_rate: Dropout rate of position embeddings, attention outputs and MLPs.
        attn_drop_rate: Dropout rate of the attention weights.
        drop_path_rate: Drop path rate of the last block; it rises linearly from 0.
        frozen_stages: Freeze the first so many stages whole; 0 and -1 freeze none.
        with_cp: Recompute blocks in the backward pass: less memory, more time, same numbers.
        sr_mode: How keys and values shrink: ``'conv'`` as published, or ``'avg'`` or ``'max'``
            pooling followed by a linear projection.
        allow_partial: Take weights that fit in part, however they are loaded; the rest keeps its
            values.
        adapt_in_channels: Take weights for another number of image channels: ``'sum'`` spreads the
            summed weights over the channels, ``'repeat'`` repeats them; None refuses.
        weights_prefix: Where weights hold several PVTs, what stands before the keys of the one to
            take, such as ``'rgb_encoder.'``; see docs/weights.md.
        compute_dtype: ``'bfloat16'`` runs this backbone's matmuls in bf16, in training too, and
            returns fp32 for a neck and heads that stay in fp32.
        with_cls_token: For classification: the last stage has a class token, and returns its final
            state, normalised, in place of a map. Needs ``out_indices`` to hold 3.
        init_cfg: mmengine's initialisation, such as
            ``dict(type='Pretrained', checkpoint=PATH_OR_URL)``.
        others: Arguments of other PVTs; they are refused with what to write instead.

    Raises:
        ArchError: Where a value does not fit.
        ArgumentError: Where there is no such argument.

    Shape:
        x: (B, in_channels, H, W) -> tuple of (B, C_i, H_i, W_i), contiguous; H_i and W_i halve from
        stage to stage, rounded down, from H // 4 on. H and W are at least ``min_size`` (32). With a
        class token the last is (B, C_3).

    Examples:
        >>> features = PVT('tiny')(torch.zeros(1, 3, 64, 96))
        >>> [tuple(f.shape) for f in features]
        [(1, 64, 16, 24), (1, 128, 8, 12), (1, 320, 4, 6), (1, 512, 2, 3)]
    """

    ARCHS: ClassVar[dict[str, dict[str, Any]]] = PVT_ARCHS

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'small',
        in_channels: int = 3,
        pretrain_img_size: int | tuple[int, int] = 224,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        sr_mode: str = 'conv',
        allow_partial: bool = False,
        adapt_in_channels: str | None = None,
        weights_prefix: str | None = None,
        compute_dtype: str | None = None,
        with_cls_token: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **others: Any,
    ) -> None:
        if others:
            refuse_arguments('PVT', others, argument_names(PVT))
        settings = resolve_arch(arch, self.ARCHS)
        check_numbers(
            in_channels,
            pretrain_img_size,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
        )
        if sr_mode not in SR_MODES:
            raise ArchError(f'There is no sr_mode {sr_mode!r}; choose one of {SR_MODES}.')
        out_indices = check_out_indices(out_indices)
        if with_cls_token:
            _check_cls_token(settings, out_indices)

        def block(spec: StageSpec, drop_path: float) -> Block:
            attn = SpatialReductionAttention(
                spec.dim, spec.num_heads, spec.sr_ratio, sr_mode, attn_drop_rate, drop_rate
            )
            mlp = Mlp(spec.dim, int(spec.dim * spec.mlp_ratio), drop_rate=drop_rate)
            return Block(spec.dim, attn, mlp, drop_path)

        sides = (
            (pretrain_img_size,) * 2 if isinstance(pretrain_img_size, int) else pretrain_img_size
        )
        stages: list[Stage] = []
        for spec in stage_specs(settings, in_channels, drop_path_rate, max(out_indices) + 1):
            patch_embed = PatchEmbed(spec.in_channels, spec.dim, spec.stride)
            sides = (patch_embed.grid_side(sides[0]), patch_embed.grid_side(sides[1]))
            if not all(sides):
                raise ArchError(
                    f'pretrain_img_size={pretrain_img_size} leaves a stage without positions; '
                    'give at least 32 pixels a side.'
                )
            blocks = [block(spec, rate) for rate in spec.drop_path_rates]
            kind = ClassTokenStage if with_cls_token and len(stages) == 3 else Stage
            stages.append(kind(patch_embed, blocks, sides, drop_rate, with_cp=with_cp))
        super().__init__(
            stages,
            in_channels=in_channels,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            allow_partial=allow_partial,
            adapt_in_channels=adapt_in_channels,
            weights_prefix=weights_prefix,
            compute_dtype=compute_dtype,
            init_cfg=init_cfg,
        )
        self.with_cls_token = with_cls_token

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature pyramid, and the class token's state where there is one."""
        outs = super().forward(x)
        return (*outs[:-1], outs[-1].flatten(1)) if self.with_cls_token else outs


@MODELS.register_module()
class PVTv2(PyramidBackbone):
    """Pyramid Vision Transformer, second version.

    Paper: [PVT v2: Improved Baselines with Pyramid Vision
    Transformer](https://arxiv.org/abs/2106.13797), Sec. 3 and Table 1.

    Args:
        arch: ``'b0'`` to ``'b5'``, ``'b2_li'`` (linear attention), or a dict with ``dims``,
            ``depths``, ``num_heads``, ``mlp_ratios`` and ``sr_ratios``, one value per stage, and
            ``linear=True`` for linear attention.
        in_channels: Channels of the input image.
        pretrain_img_size: Taken for the sake of configs shared with ``PVT``; v2 has no
            position embeddings, so it changes nothing.
        out_indices: Stages to return, in ascending order; later ones are not built.
        drop_rate: Dropout rate of attention outputs and MLPs.
        attn_drop_rate: Dropout rate of the attention weights.
        drop_path_rate: Drop path rate of the last block; it rises linearly from 0.
        frozen_stages: Freeze the first so many stages whole; 0 and -1 freeze none.
        with_cp: Recompute blocks in the backward pass: less memory, more time, same numbers.
        sr_mode: Only ``'conv'``; the pooled forms are ``PVT``'s.
        allow_partial: Take weights that fit in part, however they are loaded; the rest keeps its
            values.
        adapt_in_channels: Take weights for another number of image channels: ``'sum'`` spreads the
            summed weights over the channels, ``'repeat'`` repeats them; None refuses.
        weights_prefix: Where weights hold several PVTs, what stands before the keys of the one to
            take, such as ``'rgb_encoder.'``; see docs/weights.md.
        compute_dtype: ``'bfloat16'`` runs this backbone's matmuls in bf16, in training too, and
            returns fp32 for a neck and heads that stay in fp32.
        init_cfg: mmengine's initialisation, such as
            ``dict(type='Pretrained', checkpoint=PATH_OR_URL)``.
        others: Arguments of other PVTs; they are refused with what to write instead.

    Raises:
        ArchError: Where a value does not fit.
        ArgumentError: Where there is no such argument.

    Shape:
        x: (B, in_channels, H, W) -> tuple of (B, C_i, H_i, W_i), contiguous; H_i and W_i halve from
        stage to stage, rounded up, from ceil(H / 4) on. H and W are at least ``min_size``: 29, or 1
        with linear attention.

    Examples:
        >>> features = PVTv2('b0')(torch.zeros(1, 3, 64, 96))
        >>> [tuple(f.shape) for f in features]
        [(1, 32, 16, 24), (1, 64, 8, 12), (1, 160, 4, 6), (1, 256, 2, 3)]
    """

    ARCHS: ClassVar[dict[str, dict[str, Any]]] = PVT_V2_ARCHS
    FAN_OUT_INIT: ClassVar[bool] = True

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'b2',
        in_channels: int = 3,
        pretrain_img_size: int | tuple[int, int] = 224,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        sr_mode: str = 'conv',
        allow_partial: bool = False,
        adapt_in_channels: str | None = None,
        weights_prefix: str | None = None,
        compute_dtype: str | None = None,
        init_cfg: dict | list[dict] | None = None,
        **others: Any,
    ) -> None:
        if others:
            refuse_arguments('PVTv2', others, argument_names(PVTv2))
        settings = resolve_arch(arch, self.ARCHS)
        check_numbers(
            in_channels,
            pretrain_img_size,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
        )
        if sr_mode != 'conv':
            raise ArchError(
                f"PVTv2 knows only sr_mode='conv', not {sr_mode!r}: pooled reduction is PVT's, and "
                "v2's own pooled form is linear attention (arch='b2_li', or linear=True)."
            )
        linear = bool(settings.get('linear', False))
        out_indices = check_out_indices(out_indices)

        def block(spec: StageSpec, drop_path: float) -> Block:
            attn = SpatialReductionAttention(
                spec.dim,
                spec.num_heads,
                spec.sr_ratio,
                'linear' if linear else 'conv',
                attn_drop_rate,
                drop_rate,
            )
            hidden = int(spec.dim * spec.mlp_ratio)
            mlp = Mlp(spec.dim, hidden, dwconv=True, relu=linear, drop_rate=drop_rate)
            return Block(spec.dim, attn, mlp, drop_path)

        stages = []
        for spec in stage_specs(settings, in_channels, drop_path_rate, max(out_indices) + 1):
            patch_embed = PatchEmbed(spec.in_channels, spec.dim, spec.stride, overlap=True)
            blocks = [block(spec, rate) for rate in spec.drop_path_rates]
            norm = nn.LayerNorm(spec.dim, eps=BLOCK_NORM_EPS)
            stages.append(Stage(patch_embed, blocks, norm=norm, with_cp=with_cp))
        super().__init__(
            stages,
            in_channels=in_channels,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            allow_partial=allow_partial,
            adapt_in_channels=adapt_in_channels,
            weights_prefix=weights_prefix,
            compute_dtype=compute_dtype,
            init_cfg=init_cfg,
        )


def _check_cls_token(arch: Mapping[str, Any], out_indices: tuple[int, ...]) -> None:
    if out_indices[-1] != 3:
        raise ArchError(f'with_cls_token needs the last stage, but out_indices={out_indices}.')
    if arch['sr_ratios'][3] != 1:
        raise ArchError(
            f'with_cls_token needs a last sr_ratio of 1, not {arch["sr_ratios"][3]}: a class token '
            'has no place in a grid that shrinks.'
        )
