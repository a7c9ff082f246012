"""The state of the global random generators."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of the global random generators, of types that load with weights_only."""
    state: Any = np.random.get_state()
    kind, key, *rest = state
    return {
        'python': random.getstate(),
        'numpy': (kind, torch.from_numpy(key.astype(np.int64)), *rest),
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the state that ``random_state`` returned."""
    random.setstate(state['python'])
    kind, key, *rest = state['numpy']
    np.random.set_state((kind, key.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'].cpu())
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the global generators of the CPU by some numbers; restore their state at the end."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64).tolist()
    random.seed(seed)
    np.random.seed([seed >> 32, seed % 2**32])
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA as well
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
