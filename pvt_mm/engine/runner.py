"""From a config to a Runner that is ready to train or to test."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

from mmengine.config import Config
from mmengine.hooks import LoggerHook
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from pvt_mm.config import CODEBASES, LOADERS, old_keys, task_of
from pvt_mm.datasets.coco_readers import check_evaluators
from pvt_mm.datasets.consistency import check_classes, check_data
from pvt_mm.datasets.guard import guard_loading
from pvt_mm.datasets.ignore_index import ignored_label, match_ignored
from pvt_mm.datasets.label_maps import check_files, check_labels, drop_unread_maps
from pvt_mm.engine import resume, runtime
from pvt_mm.engine.distributed import check_launcher
from pvt_mm.engine.options import (
    add_checkpoint_hook,
    add_hook,
    check_checkpoint,
    check_pretrained,
    without_pretrained,
)
from pvt_mm.engine.training_summary import TrainingSummaryHook
from pvt_mm.errors import UserError, naming_file

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
    check_launcher(cfg.get('launcher', 'none'))
    task_of(cfg, CODEBASES)
    runner_type = runner_class(cfg)
    loaders = ('train_dataloader', 'val_dataloader') if train else ('test_dataloader',)
    drop_unread_maps(cfg, loaders)
    check_data(cfg, loaders)
    check_classes(cfg, config, loaders)
    check_files(cfg, loaders)
    match_ignored(cfg, config, loaders)
    check_evaluators(cfg, config, loaders)
    check_checkpoint(cfg.get('load_from'))
    if train:
        warn_of_old_keys(cfg)
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
    fit_workers(cfg)
    with resume.clear_errors(cfg.work_dir) if train else contextlib.nullcontext():
        runner = runner_type.from_cfg(cfg)
        if train:
            resume.check_same(cfg)
        name_loaded_file(runner)
        guard_loading(runner, config, skip_bad_images, loaders)
        if train:
            runner.register_hook(TrainingSummaryHook())
        else:
            _, warnings = check_labels(runner.test_dataloader.dataset, ignored_label(cfg))
            for warning in warnings:
                print_log(warning, logger='current', level=logging.WARNING)
        fit_log_interval(runner, runner.max_iters if train else len(runner.test_dataloader))
    return runner


def warn_of_old_keys(cfg: Config) -> None:
    """Warn of keys that an older generation read: here they change nothing."""
    for key, new in old_keys(cfg).items():
        print_log(
            f'The config has {key}, which mmdet 2.x and mmseg 0.x read: it changes nothing here. '
            f'Set {new}.',
            logger='current',
            level=logging.WARNING,
        )


def runner_class(cfg: Config) -> type[Runner]:
    """Return the Runner that ``runner_type`` of a config names: mmengine's, or one made from it.

    Raises:
        UserError: Where it is another kind of Runner, which lacks what exact resume builds on.
    """
    name = cfg.get('runner_type') or 'Runner'
    found = RUNNERS.get(name) if isinstance(name, str) else name
    if isinstance(found, type) and issubclass(found, Runner) and not cfg.get('strategy'):
        return found
    given = [f'{key}={_short(cfg[key])}' for key in ('runner_type', 'strategy') if cfg.get(key)]
    raise UserError(
        f'The config has {" and ".join(given)}, which this tool does not run: resume, checks and '
        "summary need mmengine's Runner. Leave it out (several GPUs: tools/dist_train.sh), or take "
        f"{cfg.default_scope}'s own tools (mim train {cfg.default_scope} CONFIG)."
    )


def _short(value: Any) -> str:
    return repr(value.get('type', value) if isinstance(value, dict) else value)


def fit_workers(cfg: Config) -> None:
    """Let ``num_workers=0`` alone turn workers off: PyTorch refuses what goes with them."""
    for name in LOADERS:
        loader = cfg.get(name)
        if loader and not loader.get('num_workers'):
            loader['persistent_workers'] = False
            loader.pop('prefetch_factor', None)


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
