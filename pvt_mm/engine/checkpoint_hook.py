"""Let a Runner load backbone weights, and refuse what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from torch import nn
from torch.utils.hooks import RemovableHandle

from pvt_mm.checkpoint.atoms import recognise_arch, to_atoms
from pvt_mm.checkpoint.find import place
from pvt_mm.checkpoint.key_maps import PVT_MM
from pvt_mm.checkpoint.safe_load import drop_config
from pvt_mm.engine.model_parts import find_backbones, find_modules, unwrap_model
from pvt_mm.errors import CheckpointMismatchError
from pvt_mm.models import PVTHead


@HOOKS.register_module()
class PVTCheckpointHook(Hook):
    """Let ``load_from`` take backbone weights as well as a whole model's.

    mmengine passes to a backbone only keys under its prefix. Published ImageNet weights have no
    prefix and would be dropped without a word. This hook finds the PVT in a checkpoint, whatever
    is wrapped around it, and gives it the name that it has in the model. It refuses weights of
    which nothing fits the model, and to resume from what is no checkpoint of this training.

    Args:
        whole: Also refuse weights of a backbone alone, as testing should.
    """

    priority = 'VERY_HIGH'

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole
        self._check: RemovableHandle | None = None

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Unwrap and prefix ``checkpoint`` in place, before the model loads it."""
        state_dict = named_for(runner.model, checkpoint)
        checkpoint['state_dict'] = state_dict
        drop_config(checkpoint)
        if getattr(runner, '_resume', False):
            _check_training_state(runner, checkpoint)
            _check_shapes(unwrap_model(runner.model), state_dict)
            _forget_other_files(runner, checkpoint['message_hub']['runtime_info'])
        self._end_check()
        self._check = require_fit(runner.model, state_dict, self.whole)

    def before_train(self, runner: Any) -> None:
        """Remove the check of what is loaded from the model."""
        self._end_check()

    before_val = before_test = before_train

    def _end_check(self) -> None:
        if self._check is not None:
            self._check.remove()
            self._check = None


def named_for(model: nn.Module, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the weights of a checkpoint under the names that they have in a model.

    What was taken from where is logged, if it needs saying.

    Raises:
        CheckpointMismatchError: Where a checkpoint holds several PVTs, and nothing chooses.
    """
    backbones = {
        f'{name}.': (recognise_arch(to_atoms(part.state_dict(), PVT_MM)), part.weights_prefix)
        for name, part in find_backbones(model).items()
        if name
    }
    state_dict, told = place(checkpoint, backbones, _prefixes(find_modules(model, PVTHead)))
    for line in told:
        print_log(line, logger='current')
    return state_dict


def require_fit(model: nn.Module, weights: dict[str, Any], whole: bool) -> RemovableHandle:
    """Have the next load refuse weights that fit nothing, which mmengine would only log.

    Args:
        model: A detector or segmentor, wrapped or not.
        weights: The state dict that will be loaded.
        whole: Also refuse weights that fill nothing but the backbones.

    Returns:
        A handle, to remove after the load.
    """
    given = list(weights)

    def check(model: nn.Module, incompatible: Any) -> None:
        _check_loaded(model, given, set(incompatible.missing_keys), whole)

    return unwrap_model(model).register_load_state_dict_post_hook(check)


def _check_loaded(model: nn.Module, given: list[str], missing: set[str], whole: bool) -> None:
    """Refuse a load by the keys that it did not fill."""
    keys = [key for key in model.state_dict() if not key.endswith('num_batches_tracked')]
    backbones = _prefixes(find_backbones(model))
    # With allow_partial, a backbone that is given nothing reports nothing as missing.
    idle = tuple(name for name in backbones if not any(key.startswith(name) for key in given))
    loaded = {key for key in keys if key not in missing and not key.startswith(idle)}
    others = [key for key in keys if not key.startswith(backbones)]
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
    """Check that a training can resume from a checkpoint; mmengine does not."""
    meta, hub = checkpoint.get('meta'), checkpoint.get('message_hub')
    has_state = (
        isinstance(meta, dict)
        and all(isinstance(meta.get(name), int) for name in ('epoch', 'iter'))
        and isinstance(hub, dict)
        and all(
            isinstance(hub.get(name), dict)
            for name in ('log_scalars', 'runtime_info', 'resumed_keys')
        )
    )
    if not has_state:
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
    """Check that tensors have the model's shapes: the state of its optimizer must fit them."""
    for key, own in model.state_dict().items():
        shape = getattr(weights.get(key, own), 'shape', None)
        if shape != own.shape:
            raise CheckpointMismatchError(
                f'{key} of this training is {tuple(shape or ())}, that of the config '
                f'{tuple(own.shape)}; resume with the config that it was started with, or start a '
                'new one with --load-from.'
            )


def _forget_other_files(runner: Any, runtime_info: dict[str, Any]) -> None:
    """Remove names of older files outside of the work dir: mmengine would delete those files."""
    work_dir = Path(runner.work_dir).resolve()
    for key in [key for key in runtime_info if str(key).startswith('best_ckpt')]:
        best = Path(str(runtime_info[key])).resolve()
        if best.parent != work_dir or not best.name.startswith('best_'):
            del runtime_info[key]
    steps = runtime_info.get('keep_ckpt_ids', [])
    if not (isinstance(steps, list) and all(isinstance(step, int) for step in steps)):
        del runtime_info['keep_ckpt_ids']


def _prefixes(modules: dict[str, Any]) -> tuple[str, ...]:
    """Return the beginnings, such as ``'backbone.'``, of the keys of modules inside a model."""
    return tuple(f'{name}.' for name in modules if name)
