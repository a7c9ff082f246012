"""Exact resume: a killed and resumed training ends with the weights of one that ran through.

``build_runner`` calls ``setup``; see docs/resume.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader

from pvt_mm.checkpoint.safe_load import read_checkpoint
from pvt_mm.datasets.guard import worker_fault
from pvt_mm.engine.distributed import check_agreement, clear_losses
from pvt_mm.errors import DataError, UserError


def setup(cfg: Config) -> None:
    """Make a training resumable, in place: data order, random numbers, whole checkpoint files.

    With ``cfg.resume``, it also chooses the checkpoint: ``cfg.load_from``, or the newest whole one
    in the work dir if ``resume`` is ``'auto'`` or there is no ``load_from``. With ``'auto'`` and no
    checkpoint yet, the training starts from ``load_from``.

    Args:
        cfg: The config that a Runner will be built from.

    Raises:
        UserError: Where there is nothing whole to resume from.
    """
    meta = _resumed_meta(cfg)
    if meta.get('seed') is not None:
        _keep_seed(cfg, meta['seed'])
    loader = cfg.train_dataloader
    own = loader.get('batch_sampler') or {}
    if own.get('type') != 'ResumableBatchSampler':  # as it is in a config that a Runner has dumped
        loader.batch_sampler = dict(
            type='ResumableBatchSampler',
            batch_sampler=own or None,
            drop_last=loader.pop('drop_last', False),
            endless='max_iters' in cfg.train_cfg,
        )
    loader.batch_sampler.update(epoch=meta.get('epoch', 0), iteration=meta.get('iter', 0))
    _use_resumable_hook(cfg)


def _resumed_meta(cfg: Config) -> dict[str, Any]:
    """Choose the checkpoint to resume from, and return its ``meta``."""
    if not cfg.get('resume'):
        return {}
    if cfg.resume != 'auto' and cfg.get('load_from'):
        return read_training(cfg.load_from)['meta']
    found = latest_valid(cfg.work_dir)
    cfg.resume = found is not None
    if found is None:
        print_log(f'{cfg.work_dir} holds no checkpoint yet: the training starts.', 'current')
        return {}
    cfg.load_from, checkpoint = found
    return checkpoint['meta']


def check_same(cfg: Config) -> None:
    """Check that all processes would resume from the same checkpoint.

    Machines without shared storage have work dirs of their own.

    Raises:
        UserError: On all of them, where they would not.
    """
    found = 'no checkpoint'
    if cfg.get('resume'):
        start = cfg.train_dataloader.batch_sampler
        found = f'{Path(cfg.load_from).name} of epoch {start.epoch}, iteration {start.iteration},'
    check_agreement(
        found,
        'The processes would not resume from the same checkpoint',
        'copy it into the work dir of every machine',
    )


def _keep_seed(cfg: Config, seed: int) -> None:
    """Use a checkpoint's seed from the start; mmengine sets it only after the data are shuffled."""
    randomness = dict(cfg.get('randomness') or {})
    if randomness.get('seed') not in (None, seed):
        print_log(
            f'The seed stays {seed}, that of the resumed training.', 'current', logging.WARNING
        )
    cfg.randomness = dict(randomness, seed=seed)


def _use_resumable_hook(cfg: Config) -> None:
    """Replace mmengine's CheckpointHook, named in the config or mmengine's default."""
    hooks = dict(cfg.get('default_hooks') or {})
    hook = hooks.get('checkpoint', dict(type='CheckpointHook', interval=1))
    own = ('CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook)
    if hook is None or hook.get('type') not in own:
        return
    hook['type'] = 'ResumableCheckpointHook'
    if '://' not in str(hook.get('out_dir')) and not hook.get('file_client_args'):
        hook.setdefault('backend_args', dict(backend='atomic'))
    cfg.default_hooks = dict(hooks, checkpoint=hook)


# Which checkpoint


def latest_valid(work_dir: str | Path) -> tuple[str, dict[str, Any]] | None:
    """Return the newest whole checkpoint of a work dir and its content; None where there is none.

    It is the one that ``last_checkpoint`` names, also after the work dir was moved, or else the one
    written last. Damaged ones are logged and left out.

    Raises:
        UserError: Where all are damaged.
    """
    files = _checkpoints(Path(work_dir))
    for file in files:
        try:
            return str(file), read_training(file)
        except UserError as error:
            print_log(f'An older checkpoint is used: {error}', 'current', logging.WARNING)
    if files:
        raise UserError(
            f'None of the {len(files)} checkpoints in {work_dir} is whole; start again without '
            '--resume.'
        )
    return None


def _checkpoints(work_dir: Path) -> list[Path]:
    """Return the checkpoints of a work dir: the one it names, then the others, newest first."""
    note = work_dir / 'last_checkpoint'
    last = Path(note.read_text().strip()) if note.is_file() else Path()
    named = [file for file in (work_dir / last.name, last) if file.is_file()][:1]
    folder = named[0].parent if named else work_dir
    others = (file for file in folder.glob('*.pth') if not file.name.startswith('best_'))
    return list(dict.fromkeys([*named, *sorted(others, key=os.path.getmtime, reverse=True)]))


def read_training(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that a training can resume from; all of its bytes are checked.

    Raises:
        UserError: Where it is damaged, or holds weights alone.
    """
    if '://' in str(path):
        checkpoint = CheckpointLoader.load_checkpoint(str(path), 'cpu')
    else:
        checkpoint = read_checkpoint(path)
        _check_sums(Path(path).expanduser())
    meta = checkpoint.get('meta')
    if not isinstance(meta, dict) or not {'epoch', 'iter'} <= set(meta):
        raise UserError(
            f'The checkpoint {path} holds weights without the state of a training; start one with '
            f'--load-from {path}.'
        )
    return checkpoint


def _check_sums(file: Path) -> None:
    """Compare a file's content with its checksums, which PyTorch writes but does not read.

    Raises:
        UserError: Where it differs.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as content:
            damaged = content.testzip()
        if damaged:
            raise UserError(
                f'The checkpoint {file} is damaged ({damaged} differs from its checksum).'
            )


# Errors


@contextlib.contextmanager
def clear_errors(work_dir: str | Path) -> Iterator[None]:
    """Turn errors of files in a training into one sentence that says how to go on.

    Args:
        work_dir: The training's own.

    Raises:
        UserError: Where a file could not be read or written, or another process is gone.
    """
    try:
        with clear_losses(f'The training in {work_dir}', 'go on with --resume on every machine'):
            yield
    except DataError as error:
        raise UserError(f'{error} Mend that, {_next_step(work_dir)}.') from error
    except (OSError, EOFError, RuntimeError) as error:
        fault = worker_fault(error, ('train_dataloader', 'val_dataloader'))
        if fault:
            raise UserError(
                f'The training in {work_dir} stopped: {fault}, {_next_step(work_dir)}.'
            ) from error
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f'The training in {work_dir} stopped ({_reason(error)}); '
            f'mend that, {_next_step(work_dir)}.'
        ) from error


def _next_step(work_dir: str | Path) -> str:
    note = Path(work_dir) / 'last_checkpoint'
    if not note.is_file():
        return 'then start it again'
    return f'then go on with --resume: {note.read_text().strip()} is whole'


def _reason(error: OSError) -> str:
    """Say what went wrong with which file; a worker's error is the last line of its traceback."""
    if error.strerror:
        return f'{error.strerror}: {error.filename}' if error.filename else error.strerror
    return str(error).strip().splitlines()[-1]
