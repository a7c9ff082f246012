"""Batches that go on from any iteration, with the same random numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.dist import get_rank
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import BatchSampler, Sampler

from pvt_mm.engine.random_state import seeded


class SeededBatch:
    """The indices of a batch, each with random numbers of its own.

    A DataLoader takes the indices one by one and fetches a sample before it takes the next. What
    augments that sample draws from generators seeded by the batch's key and the sample's place in
    it, in whatever worker and after whatever else.
    """

    def __init__(self, indices: list[int], key: tuple[int, ...]) -> None:
        self.indices = indices
        self.key = key

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        for place, index in enumerate(self.indices):
            with seeded(*self.key, place):
                yield index


@DATA_SAMPLERS.register_module()
class ResumableBatchSampler(BatchSampler):
    """Batches of a sampler that can go on from any iteration, without loading what came before.

    Args:
        sampler: Yields indices; ``set_epoch`` is called where it has one.
        batch_size: Samples a batch.
        drop_last: Leave out a last batch that is smaller.
        batch_sampler: Config of another batch sampler, that groups the indices in its own way.
        endless: Go through the sampler again and again, as a loop by iterations does.
        epoch: Finished epochs of the training.
        iteration: Finished iterations of the training.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        drop_last: bool = False,
        batch_sampler: dict[str, Any] | None = None,
        endless: bool = False,
        epoch: int = 0,
        iteration: int = 0,
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.batches: Any = BatchSampler(sampler, batch_size, drop_last)
        if batch_sampler:
            self.batches = DATA_SAMPLERS.build(
                batch_sampler, default_args=dict(sampler=sampler, batch_size=batch_size)
            )
        self.endless = endless
        self.seed = torch.initial_seed()  # the Runner's, where it built this sampler
        self.iteration = self.skipped = iteration
        if not endless:  # saved within an epoch, or at its end but before the epoch was counted
            rest = iteration - epoch * len(self)
            self.skipped = rest if 0 <= rest <= len(self) else 0
        self._to_skip = self.skipped

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        skip, self._to_skip = self._to_skip, 0
        for indices in itertools.islice(self._passes(), skip, None):
            key = (self.seed, get_rank(), self.iteration)
            self.iteration += 1
            yield SeededBatch(indices, key)

    def _passes(self) -> Iterator[list[int]]:
        for number in itertools.count() if self.endless else (0,):
            if number and hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(number)
            found = False
            for indices in self.batches:
                found = True
                yield indices
            if not found:  # fewer samples than a batch
                return


class _FreeSkips:
    """The batches of a loop by iterations, for which skipping the first ones costs nothing.

    The loop takes and drops what was trained before; the sampler has left that out already.
    """

    def __init__(self, batches: Iterator[Any], skips: int) -> None:
        self.batches = batches
        self.skips = skips

    def __next__(self) -> Any:
        if self.skips:
            self.skips -= 1
            return None
        return next(self.batches)

    def skip_iter(self, number: int) -> None:
        """Skip batches, as newer versions of mmengine do."""
        for _ in range(number):
            next(self)
