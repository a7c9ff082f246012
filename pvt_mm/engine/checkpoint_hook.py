"""Let a Runner load backbone weights, and refuse what does not fit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from mmengine.dist import all_reduce_params
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn
from torch.utils.hooks import RemovableHandle

from pvt_mm.checkpoint.convert import head_tensors, unwrap
from pvt_mm.checkpoint.key_maps import detect_format
from pvt_mm.checkpoint.safe_load import drop_config
from pvt_mm.errors import CheckpointMismatchError
from pvt_mm.models.classification import PVTHead
from pvt_mm.models.pyramid import PyramidBackbone


@HOOKS.register_module()
class PVTCheckpointHook(Hook):
    """Let ``load_from`` take backbone weights as well as a whole model's.

    A whole model's loader passes to the backbone only what stands under the backbone's prefix, so
    published ImageNet weights, which have none, would be dropped in silence. This hook unwraps
    ``model`` or ``state_dict`` and puts bare backbone weights under the prefix of every PVT in the
    model. Weights of which nothing fits the model, which mmengine would pass over, are refused, and
    so is resuming from what is no training checkpoint or not of this training.

    Args:
        whole: Refuse weights of a backbone alone too, as testing should.
    """

    priority = 'VERY_HIGH'

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole
        self._check: RemovableHandle | None = None

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Unwrap and prefix ``checkpoint`` in place, before it is handed to the model."""
        state_dict = unwrap(checkpoint)
        prefixes = _prefixes(runner.model, PyramidBackbone)
        bare = prefixes and not any(key.startswith(tuple(prefixes)) for key in state_dict)
        if bare and detect_format(list(state_dict)):
            state_dict = _prefixed(state_dict, prefixes, _prefixes(runner.model, PVTHead))
        checkpoint['state_dict'] = state_dict
        drop_config(checkpoint)
        if getattr(runner, '_resume', False):
            _check_training_state(runner, checkpoint)
            _check_shapes(_inner(runner.model), state_dict)
            _forget_other_files(runner, checkpoint['message_hub']['runtime_info'])
        self._end_check()
        self._check = require_fit(runner.model, state_dict, self.whole)

    def before_train(self, runner: Any) -> None:
        """End the check of what is loaded: a hook is no part of a model."""
        self._end_check()

    before_val = before_test = before_train

    def _end_check(self) -> None:
        if self._check is not None:
            self._check.remove()
            self._check = None


def require_fit(model: nn.Module, weights: dict[str, Any], whole: bool) -> RemovableHandle:
    """Have a load refuse weights that fit nothing, which mmengine would pass over.

    Args:
        model: A detector or segmentor, wrapped or not.
        weights: The state dict that will be loaded.
        whole: Refuse weights that leave all but the backbones as it was, too.

    Returns:
        The handle to remove after the load.
    """
    check = partial(_check_loaded, list(weights), whole)
    return _inner(model).register_load_state_dict_post_hook(check)


def _inner(model: Any) -> nn.Module:
    """Return a model without what wraps it, as mmengine loads into it."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _check_loaded(given: list[str], whole: bool, model: nn.Module, incompatible: Any) -> None:
    """Refuse a load by the keys that it left out."""
    keys = [key for key in model.state_dict() if not key.endswith('num_batches_tracked')]
    backbones = _prefixes(model, PyramidBackbone)
    # With allow_partial, a backbone that is given nothing misses nothing.
    idle = tuple(name for name in backbones if not any(key.startswith(name) for key in given))
    missing = set(incompatible.missing_keys)
    loaded = {key for key in keys if key not in missing and not key.startswith(idle)}
    others = [key for key in keys if not key.startswith(tuple(backbones))]
    if keys and not loaded:
        raise CheckpointMismatchError(
            f'These weights are of another model, for none of them fits: they are named such as '
            f'{", ".join(given[:2])}, and those of this model {", ".join(keys[:2])}.'
        )
    if whole and others and loaded.isdisjoint(others):
        raise CheckpointMismatchError(
            f'These weights are of a backbone alone, without {others[0].split(".")[0]} and the '
            'rest of the model; train from them first (--load-from).'
        )


def _check_training_state(runner: Any, checkpoint: dict[str, Any]) -> None:
    """Check that a training can go on from a checkpoint, as mmengine takes for granted."""
    meta, hub = checkpoint.get('meta'), checkpoint.get('message_hub')
    whole = (
        isinstance(meta, dict)
        and all(isinstance(meta.get(name), int) for name in ('epoch', 'iter'))
        and isinstance(hub, dict)
        and all(
            isinstance(hub.get(name), dict)
            for name in ('log_scalars', 'runtime_info', 'resumed_keys')
        )
    )
    if not whole:
        raise CheckpointMismatchError(
            'These are weights without the state of a training, so that none can go on from them; '
            'start one with --load-from.'
        )
    optimizer = checkpoint.get('optimizer')
    if isinstance(optimizer, dict) and 'param_groups' in optimizer:
        found = [len(group['params']) for group in optimizer['param_groups']]
        own = [len(group['params']) for group in runner.optim_wrapper.param_groups]
        if found != own:
            raise CheckpointMismatchError(
                f'The optimizer of this training has {sum(found)} parameters in {len(found)} '
                f'groups, that of the config {sum(own)} in {len(own)}; resume with the config that '
                'it was started with, or start a new one with --load-from.'
            )


def _check_shapes(model: nn.Module, weights: dict[str, Any]) -> None:
    """Check that what has a model's name has its shape too, as its optimizer's state must."""
    for key, own in model.state_dict().items():
        shape = getattr(weights.get(key, own), 'shape', None)
        if shape != own.shape:
            raise CheckpointMismatchError(
                f'{key} of this training is {tuple(shape or ())}, that of the config '
                f'{tuple(own.shape)}; resume with the config that it was started with, or start a '
                'new one with --load-from.'
            )


def _forget_other_files(runner: Any, runtime_info: dict[str, Any]) -> None:
    """Remove a checkpoint's word on older files, unless they are the work dir's own.

    mmengine deletes these files when newer ones come.
    """
    work_dir = Path(runner.work_dir).resolve()
    for key in [key for key in runtime_info if str(key).startswith('best_ckpt')]:
        best = Path(str(runtime_info[key])).resolve()
        if best.parent != work_dir or not best.name.startswith('best_'):
            del runtime_info[key]
    steps = runtime_info.get('keep_ckpt_ids', [])
    if not (isinstance(steps, list) and all(isinstance(step, int) for step in steps)):
        del runtime_info['keep_ckpt_ids']


@HOOKS.register_module()
class SharedStatisticsHook(Hook):
    """Average BatchNorm's statistics over the ranks after every iteration of a training.

    SyncBN needs CUDA. With plain BN each rank would validate with statistics of its own, and a
    checkpoint would hold the first rank's.
    """

    priority = 'VERY_HIGH'

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Average all buffers of the model, which differ in nothing else."""
        all_reduce_params(runner.model.buffers(), op='mean')


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
