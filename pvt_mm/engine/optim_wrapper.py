"""The learning rate and weight decay of each parameter of a PVT."""

from __future__ import annotations

from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from pvt_mm.engine.model_parts import find_backbones
from pvt_mm.errors import UserError

#: Position embeddings and class tokens: no weight decay under ``no_decay``.
POSITIONS = ('pos_embed', 'cls_token', 'cls_position')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PVTOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor with two more keys in ``paramwise_cfg``.

    ``layer_decay_rate``: in (0, 1]. A parameter n layers below the head gets rate ** n times its
    learning rate, which other keys may have changed. ``PyramidBackbone.get_layer_depth`` counts the
    layers; parameters outside of a PVT keep their rate. Paper:
    [BEiT](https://arxiv.org/abs/2106.08254).

    ``no_decay``: if true, norms, biases and other vectors, position embeddings and class tokens
    have no weight decay, whatever ``custom_keys`` say about their part of the model.

    It is in mmengine's own registry: every codebase finds it. Parameters with the same settings
    share a group, which optimisers update faster than one group each.
    """

    def add_params(
        self,
        params: list[dict[str, Any]],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: int | float | None = None,
    ) -> None:
        """Collect the parameters as mmengine does, then apply the two keys to the whole model."""
        super().add_params(params, module, prefix, is_dcn_module)
        if not prefix:
            params[:] = self._refined(params, module)

    def _refined(self, params: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
        if self.base_lr is None:
            raise UserError('Give the learning rate that the layers share: set optimizer.lr.')
        names = {parameter: name for name, parameter in model.named_parameters()}
        scales = layer_scales(model, self.paramwise_cfg.get('layer_decay_rate', 1.0))
        groups: dict[str, dict[str, Any]] = {}
        for group in params:
            (parameter,) = group.pop('params')
            name = names[parameter]
            group.setdefault('lr', self.base_lr)
            group['lr'] *= scales.get(name, 1.0)
            is_position = name.rpartition('.')[2] in POSITIONS
            if self.paramwise_cfg.get('no_decay') and (parameter.ndim < 2 or is_position):
                group['weight_decay'] = 0.0
            same = groups.setdefault(repr(sorted(group.items())), {'params': [], **group})
            same['params'].append(parameter)
        rates = [group['lr'] for group in groups.values()]
        print_log(
            f'{len(params)} parameters in {len(groups)} groups; '
            f'learning rates from {min(rates):.3g} to {max(rates):.3g}.',
            logger='current',
        )
        return list(groups.values())


def layer_scales(model: nn.Module, rate: float) -> dict[str, float]:
    """Return the factor of the learning rate of every parameter of the PVTs in a model.

    Args:
        model: A detector, segmentor, classifier or bare backbone.
        rate: The factor from one layer to the one below.

    Raises:
        UserError: Where the rate is out of range, or the model has no PVT.
    """
    if not 0.0 < rate <= 1.0:
        raise UserError(f'layer_decay_rate={rate} must be above 0 and at most 1; 0.9 is usual.')
    scales = {}
    for name, backbone in find_backbones(model).items():
        for parameter, _ in backbone.named_parameters(prefix=name):
            depth, count = backbone.get_layer_depth(parameter, f'{name}.' if name else '')
            scales[parameter] = rate ** (count - 1 - depth)
    if rate < 1.0 and not scales:
        raise UserError(
            'layer_decay_rate needs the layers of a PVT or PVTv2, and the model has none; take the '
            "constructor of the model's own codebase."
        )
    return scales
