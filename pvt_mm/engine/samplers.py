"""Batches that resume at any iteration, with the same random numbers."""

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
    """The indices of a batch, which seed the random generators for each sample.

    A DataLoader takes the indices one by one and loads a sample before it takes the next index. The
    seed is the batch's key and the sample's place in it: neither the worker nor earlier samples
    change the random numbers of a sample.
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
    """Batches of a sampler that can resume at any iteration, without loading the earlier ones.

    Args:
        sampler: Yields indices; ``set_epoch`` is called where it has one.
        batch_size: Samples per batch.
        drop_last: Leave out a last batch that is smaller.
        batch_sampler: Config of another batch sampler, which groups the indices in its own way.
        endless: Repeat the sampler without end, for a loop by iterations.
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


class FreeSkips:
    """An iterator over batches whose first ones are skipped at no cost.

    A resumed loop by iterations takes and drops the batches that were trained before. The sampler
    has left them out already, so that None stands for each.
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
