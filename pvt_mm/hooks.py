"""Hooks for mmengine's Runner."""

from __future__ import annotations

from typing import Any

from mmengine.dist import all_reduce_params
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from .checkpoint import unwrap
from .formats import detect_format
from .pyramid import PyramidBackbone


@HOOKS.register_module()
class PVTCheckpointHook(Hook):
    """Let ``load_from`` take backbone weights as well as a whole model's.

    A whole model's loader passes to the backbone only what stands under the backbone's prefix, so
    published ImageNet weights, which have none, would be dropped in silence. This hook unwraps
    ``model`` or ``state_dict`` and puts bare backbone weights under the prefix of every PVT in the
    model.
    """

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Unwrap and prefix ``checkpoint`` in place, before it is handed to the model."""
        state_dict = unwrap(checkpoint)
        prefixes = [
            f'{name}.'.removeprefix('module.')
            for name, module in runner.model.named_modules()
            if isinstance(module, PyramidBackbone) and name
        ]
        bare = prefixes and not any(key.startswith(tuple(prefixes)) for key in state_dict)
        if bare and detect_format(list(state_dict)):
            state_dict = {
                prefix + key: value for prefix in prefixes for key, value in state_dict.items()
            }
        checkpoint['state_dict'] = state_dict
        # On resuming, mmengine would run this text as Python to look for an old key.
        if isinstance(checkpoint.get('meta'), dict):
            checkpoint['meta'].pop('config', None)


@HOOKS.register_module()
class SharedStatisticsHook(Hook):
    """Average BatchNorm's statistics over the ranks after every iteration of a training.

    SyncBN needs CUDA. With plain BN each rank would validate with statistics of its own, and a
    checkpoint would hold the first rank's.
    """

    priority = 'VERY_HIGH'

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Average all buffers of the model, which differ in nothing else."""
        all_reduce_params(runner.model.buffers(), op='mean')
