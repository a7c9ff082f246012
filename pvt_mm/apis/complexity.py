"""Multiply-adds of a backbone, counted on PyTorch's meta device."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pvt_mm.models import PVT, PVTv2

Size = tuple[int, int]


def pvt_class(arch: str) -> type[PVT] | type[PVTv2]:
    """Return the class that has an arch."""
    return PVT if arch in PVT.ARCHS else PVTv2


def build_on_meta(arch: str) -> PVT | PVTv2:
    """Build the backbone of a published arch without memory for its weights."""
    with torch.device('meta'):
        return pvt_class(arch)(arch).eval()


def multiply_adds(model: nn.Module, size: Size) -> int:
    """Count the multiply-adds of one image through a backbone on the meta device.

    Every matmul and convolution is counted, also those of the attention; norms, activations and
    softmax are not, as in the papers, whose "FLOPs" are multiply-adds.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, 3, *size, device='meta'))
    return counter.get_total_flops() // 2
