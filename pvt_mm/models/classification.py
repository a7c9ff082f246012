"""What only classification needs: PVT's class token, and the head that computes logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from pvt_mm.checkpoint.convert import head_tensors
from pvt_mm.models.layers import BLOCK_NORM_EPS, Block, PatchEmbed
from pvt_mm.models.pyramid import Stage


class ClassTokenStage(Stage):
    """PVT's last stage with a class token, whose final state it returns in place of a map.

    Paper: [PVT](https://arxiv.org/abs/2102.12122), Sec. 4.1.

    Args:
        patch_embed: Makes the tokens.
        blocks: Transformer blocks that do not reduce their keys: a class token has no place in a
            grid.
        pos_grid: Height and width of the learned position embedding.
        drop_rate: Dropout rate after the position embedding.
        with_cp: Recompute each block's activations in the backward pass to save memory.

    Shape:
        x: (B, H, W, C) -> (B, 1, 1, dim).
    """

    def __init__(
        self,
        patch_embed: PatchEmbed,
        blocks: Sequence[Block],
        pos_grid: tuple[int, int],
        drop_rate: float = 0.0,
        with_cp: bool = False,
    ) -> None:
        super().__init__(patch_embed, blocks, pos_grid, drop_rate, with_cp=with_cp)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.dim))
        self.cls_position = nn.Parameter(torch.zeros(1, 1, self.dim))
        self.final_norm = nn.LayerNorm(self.dim, eps=BLOCK_NORM_EPS)

    def init_position(self) -> None:
        """Initialise the class token and its position as the other positions."""
        super().init_position()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.cls_position, std=0.02)

    def add_position(self, x: Tensor) -> Tensor:
        """Add the position embedding, and put the class token before the tokens.

        Blocks that reduce nothing see no grid, so the tokens may lie in one row.

        Shape:
            x: (B, H, W, dim) -> (B, 1, 1 + H*W, dim).
        """
        tokens = super().add_position(x).flatten(1, 2)  # (B, H*W, dim)
        first = (self.cls_token + self.cls_position).expand(x.shape[0], -1, -1)
        return torch.cat([self.pos_drop(first), tokens], 1).unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks and read the class token out."""
        return self.final_norm(super().forward(x)[:, :, :1])


@MODELS.register_module()
class PVTHead(BaseModule):
    """A linear classifier with the parameters of the published checkpoints: ``weight``, ``bias``.

    It stands in mmpretrain's ``ImageClassifier`` behind a backbone, without a neck: it takes PVT's
    class token as it comes and averages a map of PVTv2's. It needs no mmpretrain itself, but that
    nobody asks it to ``predict`` without data samples.

    Args:
        num_classes: Classes to tell apart.
        in_channels: Width of the backbone's last output.
        label_smoothing: Share of a label that is spread over all classes in training.
        init_cfg: mmengine's initialisation.

    Shape:
        features: the backbone's outputs, the last (B, in_channels) or (B, in_channels, H, W) ->
        (B, num_classes).

    Example:
        >>> backbone = PVT('tiny', out_indices=(3,), with_cls_token=True)
        >>> PVTHead(1000, 512)(backbone(torch.zeros(1, 3, 224, 224))).shape
        torch.Size([1, 1000])
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        label_smoothing: float = 0.0,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.label_smoothing = label_smoothing
        self.weight = nn.Parameter(torch.empty(num_classes, in_channels))
        self.bias = nn.Parameter(torch.empty(num_classes))
        self._init_parameters()

    def _init_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def init_weights(self) -> None:
        """Initialise as the reference does, then apply ``init_cfg``."""
        if not self.is_init:
            self._init_parameters()
        super().init_weights()

    def load_published(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the classifier out of a checkpoint in any of the published formats.

        Raises:
            RuntimeError: Where it holds none, or one of another shape.
        """
        self.load_state_dict(head_tensors(checkpoint))

    def pre_logits(self, features: tuple[Tensor, ...]) -> Tensor:
        """Return the vector that is classified: the class token, or the mean of the last map."""
        last = features[-1]
        return last.mean((2, 3)) if last.ndim == 4 else last  # (B, in_channels)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        """Compute the logits."""
        return F.linear(self.pre_logits(features), self.weight, self.bias)

    def loss(self, features: tuple[Tensor, ...], data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """Return the cross entropy with mmpretrain's labels, whole ones or mixed ones."""
        if 'gt_score' in data_samples[0]:  # mixup and CutMix give each class its share
            target = torch.stack([sample.gt_score for sample in data_samples])
        else:
            target = torch.cat([sample.gt_label for sample in data_samples])
        logits = self(features)
        return {'loss': F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)}

    def predict(
        self, features: tuple[Tensor, ...], data_samples: Sequence[Any] | None = None
    ) -> list[Any]:
        """Write scores and labels into mmpretrain's data samples, new ones where none are given."""
        scores = self(features).softmax(1)
        if data_samples is None:
            from mmpretrain.structures import DataSample

            data_samples = [DataSample() for _ in scores]
        for sample, score in zip(data_samples, scores):
            sample.set_pred_score(score).set_pred_label(score.argmax())
        return list(data_samples)
