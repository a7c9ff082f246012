"""Hooks for mmengine's Runner."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import nn

from .checkpoint import head_tensors, unwrap
from .classification import PVTHead
from .formats import detect_format
from .pyramid import PyramidBackbone


@HOOKS.register_module()
class PVTCheckpointHook(Hook):
    """Let ``load_from`` take backbone weights as well as a whole model's.

    A whole model's loader passes to the backbone only what stands under the backbone's prefix, so
    published ImageNet weights, which have none, would be dropped in silence. This hook unwraps
    ``model`` or ``state_dict`` and puts bare backbone weights under the prefix of every PVT in the
    model, and their classifier under that of every :class:`PVTHead`.
    """

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Unwrap and prefix ``checkpoint`` in place, before it is handed to the model."""
        state_dict = unwrap(checkpoint)
        prefixes = _prefixes(runner.model, PyramidBackbone)
        bare = prefixes and not any(key.startswith(tuple(prefixes)) for key in state_dict)
        if bare and detect_format(list(state_dict)):
            state_dict = _prefixed(state_dict, prefixes, _prefixes(runner.model, PVTHead))
        checkpoint['state_dict'] = state_dict
        # On resuming, mmengine would run this text as Python to look for an old key.
        if isinstance(checkpoint.get('meta'), dict):
            checkpoint['meta'].pop('config', None)


def _prefixed(weights: dict[str, Any], backbones: list[str], heads: list[str]) -> dict[str, Any]:
    """Put bare weights in their places: the classifier in the heads, where there are any."""
    classifier = head_tensors(weights) if heads else {}
    taken = {id(tensor) for tensor in classifier.values()}
    rest = {key: value for key, value in weights.items() if id(value) not in taken}
    placed = {prefix + key: value for prefix in backbones for key, value in rest.items()}
    return placed | {prefix + leaf: t for prefix in heads for leaf, t in classifier.items()}


def _prefixes(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Return the places, such as ``'backbone.'``, of every module of a kind below a model."""
    return [
        f'{name}.'.removeprefix('module.')
        for name, module in model.named_modules()
        if isinstance(module, kind) and name
    ]
