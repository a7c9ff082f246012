"""What a Runner gets: its set-up, hooks, exact resume, samplers and optimiser wrapper."""

from pvt_mm.engine.checkpoint_hook import PVTCheckpointHook
from pvt_mm.engine.non_finite_hook import NonFiniteHook
from pvt_mm.engine.optim_wrapper import PVTOptimWrapperConstructor
from pvt_mm.engine.resumable_checkpoint_hook import ResumableCheckpointHook
from pvt_mm.engine.samplers import ResumableBatchSampler

__all__ = [
    'NonFiniteHook',
    'PVTCheckpointHook',
    'PVTOptimWrapperConstructor',
    'ResumableBatchSampler',
    'ResumableCheckpointHook',
]
