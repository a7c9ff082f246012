"""One side of a benchmark, in a process of its own: its model, run and measured when asked.

``benchmark_peers.Side`` starts it and talks to it through stdin and stdout, in pickles. A peer's
process loads nothing of pvt_mm, so that the peer runs as it does for those who have no pvt_mm: what
one side frees, keeps or sets for its process would else change the time of the others.
"""

import functools
import logging
import os
import pickle
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import benchmark_machine as machine
import numpy as np
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn


class Subject:
    """A model and its work.

    Args:
        package: Whose model, a key of ``BUILDERS``.
        settings: What the package's class takes.
        weights: What it loads.
        compiled: Run it through torch.compile.
        shape: Of the images, (B, C, H, W).
        dtype: ``'float32'``, or another's name for autocast.
        mode: ``'forward'``, or ``'train'`` for the backward pass too.
        device: Where to run.
    """

    def __init__(
        self,
        package: str,
        settings: dict[str, Any],
        weights: dict[str, Tensor],
        compiled: bool,
        shape: tuple[int, int, int, int],
        dtype: str,
        mode: str,
        device: str,
    ) -> None:
        self.shape, self.dtype, self.mode, self.device = shape, dtype, mode, device
        self.build = functools.partial(build, package, settings, weights, compiled)

    @functools.cached_property
    def work(self) -> Callable[[], tuple[Tensor, ...]]:
        """What does the work once."""
        return self.prepare(self.shape)

    def prepare(self, shape: tuple[int, int, int, int]) -> Callable[[], tuple[Tensor, ...]]:
        """Build the model and images, and return what runs the one on the other."""
        model = self.build().to(self.device).train(self.mode == 'train')
        generator = torch.Generator().manual_seed(1)
        image = torch.randn(shape, generator=generator).to(self.device)
        return functools.partial(self.run, model, image)

    def run(self, model: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
        """Run forward, and backward where asked; gradients of the run before are dropped."""
        model.zero_grad(set_to_none=True)
        autocast: AbstractContextManager = nullcontext()
        if self.dtype != 'float32':
            autocast = torch.autocast(self.device, getattr(torch, self.dtype))
        with torch.set_grad_enabled(self.mode == 'train'):
            with autocast:
                outs = model(image)
            if self.mode == 'train':
                sum(out.float().square().mean() for out in outs).backward()
        return outs

    def outputs(self) -> list[np.ndarray]:
        """Return the features of one run."""
        return [out.detach().float().cpu().numpy() for out in self.work()]

    def seconds(self) -> float:
        """Return how long one run takes."""
        return machine.seconds(self.work, self.device)

    def peak_mib(self) -> float:
        """Return the peak of two runs over the loaded model; ask this of a new process.

        Another model runs first, so that libraries which load on first use are not counted; what a
        model saves for itself, such as weights in another layout, is.
        """
        self.prepare((*self.shape[:2], 64, 64))()
        work = self.work

        def twice() -> None:
            for _ in range(2):
                work()

        return machine.peak_mib(twice, self.device)


def build(
    package: str, settings: dict[str, Any], weights: dict[str, Tensor], compiled: bool
) -> nn.Module:
    """Build a package's model with weights in its own names."""
    model = BUILDERS[package](settings)
    model.load_state_dict(weights)
    return _compile(model) if compiled else model


def _ours(settings: dict[str, Any]) -> nn.Module:
    import pvt_mm  # noqa: F401  # registers the backbones

    return MODELS.build(settings)


def _huggingface(settings: dict[str, Any]) -> nn.Module:
    from transformers import PvtV2Backbone, PvtV2Config

    class FeatureMaps(PvtV2Backbone):
        """Hugging Face's backbone, returning its features alone."""

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            return super().forward(x).feature_maps

    return FeatureMaps(PvtV2Config(**settings))


def _timm(settings: dict[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(**settings)


BUILDERS = {
    'pvt_mm': _ours,
    'mmdet': MODELS.build,
    'huggingface': _huggingface,
    'timm': _timm,
}


def _compile(model: nn.Module) -> Any:
    """Compile for one size; without gradients the weights become constants of the program."""
    from torch._inductor import config

    config.freezing = True
    torch._dynamo.config.cache_size_limit = 256  # mmdet's blocks are compiled one by one
    return torch.compile(model, dynamic=False)


def serve() -> None:
    """Answer requests, each the name of a Subject's method, until there are no more."""
    replies = os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)  # what libraries print is no reply
    logging.disable(logging.INFO)
    subject = Subject(**pickle.load(sys.stdin.buffer))
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(getattr(subject, request)(), replies)
        replies.flush()


if __name__ == '__main__':
    serve()
