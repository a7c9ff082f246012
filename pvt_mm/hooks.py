"""Hooks for mmengine's Runner."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce_params
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from torch import nn
from torch.utils.hooks import RemovableHandle

from .checkpoint import CheckpointMismatchError, head_tensors, unwrap
from .classification import PVTHead
from .formats import detect_format
from .pyramid import PyramidBackbone
from .reading import UserError, drop_config


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


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Stop a training whose loss or gradients are not finite, with its weights still sound.

    A loss that is infinite or NaN stops it at once. Non-finite gradients alone are not applied, and
    stop it when they come in so many updates in a row: the loss scaling of mixed precision meets
    some while it looks for its scale, and goes without those updates too.

    Args:
        patience: Updates in a row with non-finite gradients that stop the training. The default
            lets loss scaling come down from its 65,536 to 1 and below.
    """

    priority = 'HIGH'  # before checkpoints, averages and logs

    def __init__(self, patience: int = 20) -> None:
        if patience < 1:
            raise UserError(f'NonFiniteHook: patience={patience} must be 1 or more.')
        self.patience = patience
        self._finite: bool | None = None
        self._in_a_row = 0
        self._handle: Any = None

    def before_train(self, runner: Any) -> None:
        """Look at the gradients right before each update, when they are unscaled and clipped."""
        if self._handle is not None:
            self._handle.remove()
        if not isinstance(runner.optim_wrapper, OptimWrapperDict):  # with one, the loss must do
            optimizer = runner.optim_wrapper.optimizer
            self._handle = optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        self._finite = finite_gradients(parameters)
        if not self._finite:
            for parameter in parameters:
                parameter.grad = None  # which optimisers pass over

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Stop where the loss, or too many updates in a row, were not finite.

        Raises:
            UserError: Naming the iteration, its images and the ways on.
        """
        finite, self._finite = self._finite, None
        losses = {name: value.item() for name, value in (outputs or {}).items() if 'loss' in name}
        bad = {name: value for name, value in losses.items() if not math.isfinite(value)}
        if bad:
            listed = ', '.join(f'{name} {value}' for name, value in bad.items())
            raise UserError(_stopped(runner, data_batch, f'the loss is not finite ({listed})'))
        scaler = hasattr(runner.optim_wrapper, 'loss_scaler')
        if finite is None and not (scaler and runner.optim_wrapper.should_update()):
            return  # gradients are still accumulated
        if finite:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if self._in_a_row >= self.patience:
            what = f'the gradients are not finite, in {self._in_a_row} update(s) in a row'
            raise UserError(_stopped(runner, data_batch, what))
        if not scaler:
            print_log(
                f'Iteration {runner.iter + 1}: no update, for the gradients are not finite; '
                f'images: {_images(data_batch)}.',
                logger='current',
                level=logging.WARNING,
            )


def finite_gradients(parameters: list[torch.nn.Parameter]) -> bool:
    """Tell whether all gradients are finite, with one synchronisation of a GPU."""
    gradients = [p.grad.detach() for p in parameters if p.grad is not None]
    # The largest absolute value, for a sum of squares may overflow.
    largest = [torch.linalg.vector_norm(g.float(), math.inf) for g in gradients if g.numel()]
    if not largest:
        return True
    return bool(torch.stack([norm.to(largest[0].device) for norm in largest]).isfinite().all())


def _stopped(runner: Any, data_batch: Any, what: str) -> str:
    """Say where a training stopped, and how to go on."""
    wrapper = runner.optim_wrapper
    amp = ' without --amp' if 'Amp' in type(wrapper).__name__ else ''
    clip = ''
    if not wrapper.clip_grad_kwargs:
        clip = ' with gradient clipping (--cfg-options optim_wrapper.clip_grad.max_norm=1)'
    rate = f'--cfg-options optim_wrapper.optimizer.lr={wrapper.optimizer.defaults["lr"] / 10:.3g}'
    file = Path(runner.work_dir) / 'last_checkpoint'
    if file.is_file():
        checkpoint = file.read_text().strip()
        ways = [f'go on from it by --resume{amp}{clip}'] if amp or clip else []
        ways.append(f'start anew from its weights with --load-from {checkpoint} {rate}')
        place = f'The last checkpoint is {checkpoint}'
    else:
        ways = [f'start again{amp}{clip}'] if amp or clip else []
        ways.append(f'start again with {rate}')
        place = 'There is no checkpoint yet'
    return (
        f'Training stopped at iteration {runner.iter + 1}: {what}; images of the batch: '
        f'{_images(data_batch)}. {place}: {", or ".join(ways)}.'
    )


def _images(node: Any) -> str:
    """List the images of a batch."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        return ', '.join(filter(None, map(_images, node)))
    return str(getattr(node, 'img_path', ''))


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
