"""Runners: how one is built, its hooks, exact resume, samplers and optimiser wrapper."""

from pvt_mm.engine.checkpoint_hook import PVTCheckpointHook
from pvt_mm.engine.non_finite_hook import NonFiniteHook
from pvt_mm.engine.optim_wrapper import PVTOptimWrapperConstructor
from pvt_mm.engine.resumable_checkpoint_hook import ResumableCheckpointHook
from pvt_mm.engine.runner import build_runner
from pvt_mm.engine.samplers import ResumableBatchSampler
from pvt_mm.engine.shared_statistics_hook import SharedStatisticsHook

__all__ = [
    'NonFiniteHook',
    'PVTCheckpointHook',
    'PVTOptimWrapperConstructor',
    'ResumableBatchSampler',
    'ResumableCheckpointHook',
    'SharedStatisticsHook',
    'build_runner',
]
