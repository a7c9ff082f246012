"""Stop a training whose loss or gradients are not finite."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS

from pvt_mm.errors import UserError


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Stop a training whose loss or gradients are not finite, before its weights are spoilt.

    An infinite or NaN loss stops it at once. Non-finite gradients are not applied; they stop it
    after ``patience`` updates in a row. Loss scaling in mixed precision needs this: it lowers its
    scale until the gradients are finite.

    Args:
        patience: Updates in a row with non-finite gradients that stop the training. The default
            allows a loss scale to fall from 65,536 to below 1.
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
        """Check the gradients right before each update, when they are unscaled and clipped."""
        if self._handle is not None:
            self._handle.remove()
        if not isinstance(
            runner.optim_wrapper, OptimWrapperDict
        ):  # there, only the loss is checked
            optimizer = runner.optim_wrapper.optimizer
            self._handle = optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        self._finite = finite_gradients(parameters)
        if not self._finite:
            for parameter in parameters:
                parameter.grad = None  # optimisers skip it

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Stop where the loss, or too many updates in a row, were not finite.

        Raises:
            UserError: Naming the iteration, its images and how to go on.
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
    gradients = [p.grad.detach() for p in parameters if p.grad is not None and p.grad.numel()]
    # Minimum and maximum are NaN where one value is. On a CPU they take a tenth of isfinite's time.
    extremes = [value.float() for gradient in gradients for value in torch.aminmax(gradient)]
    if not extremes:
        return True
    stacked = torch.stack([value.to(extremes[0].device) for value in extremes])
    return bool(stacked.isfinite().all())


def _stopped(runner: Any, data_batch: Any, what: str) -> str:
    """Say where a training stopped and how to go on."""
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
        ways.append(f'start again from its weights with --load-from {checkpoint} {rate}')
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
