"""The parts of a built model that pvt_mm looks for."""

from __future__ import annotations

from typing import Any, TypeVar

from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn

from pvt_mm.models import PyramidBackbone

M = TypeVar('M', bound=nn.Module)


def unwrap_model(model: Any) -> nn.Module:
    """Return a model without its wrappers: it is what mmengine loads weights into."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def find_modules(model: nn.Module, kind: type[M]) -> dict[str, M]:
    """Return the modules of a kind by their names in the unwrapped model; its own name is ''."""
    modules = unwrap_model(model).named_modules()
    return {name: module for name, module in modules if isinstance(module, kind)}


def find_backbones(model: nn.Module) -> dict[str, PyramidBackbone]:
    """Return every PVT and PVTv2 of a model, by name."""
    return find_modules(model, PyramidBackbone)
