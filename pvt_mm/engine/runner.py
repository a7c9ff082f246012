"""From a config to a Runner that is ready to train or to test."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from mmengine.config import Config
from mmengine.hooks import LoggerHook
from mmengine.runner import Runner

from pvt_mm.config import CODEBASES, task_of
from pvt_mm.datasets.consistency import check_classes, check_data
from pvt_mm.datasets.guard import guard_loading
from pvt_mm.engine import resume, runtime
from pvt_mm.engine.options import (
    add_checkpoint_hook,
    add_hook,
    check_checkpoint,
    check_pretrained,
    without_pretrained,
)
from pvt_mm.engine.training_summary import TrainingSummaryHook
from pvt_mm.errors import naming_file

#: Log lines that a run should have at least.
LINES = 10


def build_runner(cfg: Config, *, config: str, train: bool, skip_bad_images: bool = False) -> Runner:
    """Build the Runner of a training or a test, after all checks that need no iteration.

    A training gets exact resume, a stop at non-finite losses and gradients, and a summary. A test
    needs the weights of the whole model in ``cfg.load_from``.

    Args:
        cfg: A config of mmdet, mmseg or mmpretrain; it is changed in place. ``cfg.resume`` may be
            ``'auto'``: go on from the newest checkpoint in the work dir, if there is one.
        config: Its path, for messages.
        train: Build it for ``train()``, else for ``test()``.
        skip_bad_images: In training, warn about an image that cannot be loaded and take another
            one, where else the training stops and names it.

    Raises:
        UserError: Where data, classes or weights are missing or do not fit the config.
    """
    runtime.setup()  # the checks read files
    task_of(cfg, CODEBASES)
    loaders = ('train_dataloader', 'val_dataloader') if train else ('test_dataloader',)
    check_data(cfg, loaders)
    check_classes(cfg, config, loaders)
    check_checkpoint(cfg.get('load_from'))
    if train:
        check_pretrained(cfg)
    elif cfg.get('load_from'):  # published weights need not be fetched
        without_pretrained(cfg)
    add_checkpoint_hook(cfg, whole=not train)
    if train:
        add_hook(cfg, 'NonFiniteHook')
        runtime.setup(cfg)
        resume.setup(cfg)
    else:
        cfg.resume = False
        runtime.setup(cfg)
    with resume.clear_errors(cfg.work_dir) if train else contextlib.nullcontext():
        runner = Runner.from_cfg(cfg)
        if train:
            resume.check_same(cfg)
        name_loaded_file(runner)
        guard_loading(runner, config, skip_bad_images)
        if train:
            runner.register_hook(TrainingSummaryHook())
        fit_log_interval(runner, runner.max_iters if train else len(runner.test_dataloader))
    return runner


def name_loaded_file(runner: Any) -> None:
    """Have a Runner name the file of ``load_from`` or ``resume`` where its weights do not fit."""
    load = runner.load_checkpoint

    @functools.wraps(load)
    def named(filename: str, *args: Any, **kwargs: Any) -> Any:
        with naming_file(filename):
            return load(filename, *args, **kwargs)

    runner.load_checkpoint = named


def fit_log_interval(runner: Any, iterations: int) -> None:
    """Have a short run log about ten times: the config's interval may be longer than the run.

    Args:
        runner: A Runner of mmengine.
        iterations: Of the whole run.
    """
    for hook in runner.hooks:
        if isinstance(hook, LoggerHook):
            hook.interval = min(hook.interval, max(iterations // LINES, 1))
