"""One set of BatchNorm statistics for all ranks."""

from __future__ import annotations

from typing import Any

from mmengine.dist import all_reduce_params
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class SharedStatisticsHook(Hook):
    """Average BatchNorm's statistics over the ranks after every iteration of a training.

    SyncBN needs CUDA, and with plain BN each rank has its own statistics. mmengine's
    SyncBuffersHook averages at epochs and validations only: a checkpoint saved by iteration would
    hold the first rank's.
    """

    priority = 'VERY_HIGH'

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Average all buffers of the model, which differ in nothing else."""
        all_reduce_params(runner.model.buffers(), op='mean')
