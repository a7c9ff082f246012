"""A training that is killed and resumed ends with the weights of one that never was.

In a script of one's own, two lines before the Runner is built do what tools/train.py does::

    pvt_mm.runtime.setup(cfg)
    pvt_mm.resume.setup(cfg)
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import random
import zipfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.registry import DATA_SAMPLERS, HOOKS
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner.checkpoint import CheckpointLoader
from torch.utils.data import BatchSampler, Sampler

from .reading import DataError, UserError, read_checkpoint

#: What a file is called while it is written: a dot, its name, and this.
PARTIAL = '.partial'


def setup(cfg: Config) -> None:
    """Make a training resumable, in place: data order, random numbers, whole checkpoint files.

    Call it after ``pvt_mm.runtime.setup``. Where ``cfg.resume`` is set, it also chooses the
    checkpoint: ``cfg.load_from``, or with ``'auto'`` or without ``load_from`` the newest whole one
    in the work dir. With ``'auto'``, where there is none yet, the training starts from
    ``load_from``.

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
    """Choose the checkpoint to resume from, and return what it says about itself."""
    if not cfg.get('resume'):
        return {}
    if cfg.resume != 'auto' and cfg.get('load_from'):
        return read_training(cfg.load_from)['meta']
    found = newest_whole(cfg.work_dir)
    cfg.resume = found is not None
    if found is None:
        print_log(f'{cfg.work_dir} holds no checkpoint yet: the training starts.', 'current')
        return {}
    cfg.load_from, checkpoint = found
    return checkpoint['meta']


def _keep_seed(cfg: Config, seed: int) -> None:
    """Use a checkpoint's seed from the start; mmengine does so only after it shuffled the data."""
    randomness = dict(cfg.get('randomness') or {})
    if randomness.get('seed') not in (None, seed):
        print_log(
            f'The seed stays {seed}, that of the resumed training.', 'current', logging.WARNING
        )
    cfg.randomness = dict(randomness, seed=seed)


def _use_resumable_hook(cfg: Config) -> None:
    """Put the hook below in the place of mmengine's own, named in the config or its default."""
    hooks = dict(cfg.get('default_hooks') or {})
    hook = hooks.get('checkpoint', dict(type='CheckpointHook', interval=1))
    own = ('CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook)
    if hook is None or hook.get('type') not in own:
        return
    hook['type'] = 'ResumableCheckpointHook'
    if '://' not in str(hook.get('out_dir')) and not hook.get('file_client_args'):
        hook.setdefault('backend_args', dict(backend='atomic'))
    cfg.default_hooks = dict(hooks, checkpoint=hook)


# Random numbers


def random_state() -> dict[str, Any]:
    """Return the state of the global random generators, of types that load with weights_only."""
    state: Any = np.random.get_state()
    kind, key, *rest = state
    return {
        'python': random.getstate(),
        'numpy': (kind, torch.from_numpy(key.astype(np.int64)), *rest),
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the global random generators in the state that ``random_state`` returned."""
    random.setstate(state['python'])
    kind, key, *rest = state['numpy']
    np.random.set_state((kind, key.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'].cpu())
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the global generators of the CPU by some numbers, and put them back afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64).tolist()
    random.seed(seed)
    np.random.seed([seed >> 32, seed % 2**32])
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA as well
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class SeededBatch:
    """The indices of a batch, each with random numbers of its own.

    A DataLoader takes the indices one by one and fetches a sample before it takes the next. What
    augments that sample draws from generators seeded by the batch's key and the sample's place in
    it, in whatever worker and after whatever else.
    """

    def __init__(self, indices: list[int], key: tuple[int, ...]) -> None:
        self.indices = indices
        self.key = key

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        for place, index in enumerate(self.indices):
            with seeded(*self.key, place):
                yield index


@DATA_SAMPLERS.register_module()
class ResumableBatchSampler(BatchSampler):
    """Batches of a sampler that can go on from any iteration, without loading what came before.

    Args:
        sampler: Yields indices; ``set_epoch`` is called where it has one.
        batch_size: Samples a batch.
        drop_last: Leave out a last batch that is smaller.
        batch_sampler: Config of another batch sampler, that groups the indices in its own way.
        endless: Go through the sampler again and again, as a loop by iterations does.
        epoch: Finished epochs of the training.
        iteration: Finished iterations of the training.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        drop_last: bool = False,
        batch_sampler: dict[str, Any] | None = None,
        endless: bool = False,
        epoch: int = 0,
        iteration: int = 0,
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.batches: Any = BatchSampler(sampler, batch_size, drop_last)
        if batch_sampler:
            self.batches = DATA_SAMPLERS.build(
                batch_sampler, default_args=dict(sampler=sampler, batch_size=batch_size)
            )
        self.endless = endless
        self.seed = torch.initial_seed()  # the Runner's, where it built this sampler
        self.iteration = self.skipped = iteration
        if not endless:  # saved within an epoch, or at its end but before the epoch was counted
            rest = iteration - epoch * len(self)
            self.skipped = rest if 0 <= rest <= len(self) else 0
        self._to_skip = self.skipped

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        skip, self._to_skip = self._to_skip, 0
        for indices in itertools.islice(self._passes(), skip, None):
            key = (self.seed, get_rank(), self.iteration)
            self.iteration += 1
            yield SeededBatch(indices, key)

    def _passes(self) -> Iterator[list[int]]:
        for number in itertools.count() if self.endless else (0,):
            if number and hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(number)
            found = False
            for indices in self.batches:
                found = True
                yield indices
            if not found:  # fewer samples than a batch
                return


class _FreeSkips:
    """The batches of a loop by iterations, for which skipping the first ones costs nothing.

    The loop takes and drops what was trained before; the sampler has left that out already.
    """

    def __init__(self, batches: Iterator[Any], skips: int) -> None:
        self.batches = batches
        self.skips = skips

    def __next__(self) -> Any:
        if self.skips:
            self.skips -= 1
            return None
        return next(self.batches)

    def skip_iter(self, number: int) -> None:
        """Skip batches, as newer versions of mmengine do."""
        for _ in range(number):
            next(self)


# Checkpoint files


def write_whole(content: bytes, path: str | Path) -> None:
    """Write a file aside, flush it and rename it: others find the old one or the new one, whole.

    Raises:
        OSError: Where that fails; the old file is as it was then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f'.{path.name}{PARTIAL}')
    try:
        with open(aside, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        # write() itself does not say which file it was.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _flush_folder(folder: Path) -> None:
    """Flush a folder's names, without which a rename may not outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems know no such thing
            raise
    finally:
        os.close(descriptor)


@register_backend('atomic')
class AtomicBackend(LocalBackend):
    """Local files that are never half written."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes."""
        write_whole(obj, filepath)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write text."""
        write_whole(obj.encode(encoding), filepath)


@HOOKS.register_module()
class ResumableCheckpointHook(CheckpointHook):
    """mmengine's hook, with the random state of every rank and always a whole checkpoint on disk.

    The iteration after a save draws its random numbers from the state before it, whether the
    process is the same one or a resumed one. A validation leaves no trace in them either.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._states: list[dict[str, Any]] | None = None

    def before_train(self, runner: Any) -> None:
        """Remove what a killed process left half written, and skip batches without loading them."""
        super().before_train(runner)
        if is_main_process():
            for folder in {Path(self.out_dir), Path(runner.work_dir)}:
                for file in folder.glob(f'.*{PARTIAL}'):
                    file.unlink()
        loop = runner.train_loop
        batches = loop.dataloader.batch_sampler
        if isinstance(loop, IterBasedTrainLoop) and isinstance(batches, ResumableBatchSampler):
            # Newer versions of mmengine may be told not to skip.
            skips = 0 if getattr(loop, 'fast_forward_on_resume', False) else batches.skipped
            loop.dataloader_iterator = _FreeSkips(loop.dataloader_iterator, skips)

    def before_val(self, runner: Any) -> None:
        """Take the random states that the next iteration will go on from."""
        self._take_states()

    def _take_states(self) -> None:
        """Take them once after an iteration: what follows draws a different number in each run."""
        self._states = self._states or all_gather_object(random_state())

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Go on from the random state that was taken after the iteration before, if any."""
        if self._states:
            set_random_state(self._states[get_rank()])
            self._states = None

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Put the random states in the checkpoint."""
        if self._states:
            checkpoint['random_states'] = self._states

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Take the random states of a training that is resumed."""
        states = checkpoint.get('random_states')
        if runner._resume and states and len(states) == get_world_size():
            self._states = states
        elif runner._resume:
            runner.logger.warning(
                'The checkpoint has no random state for this number of processes: the training '
                'goes on, but not with the numbers that it would have drawn.'
            )

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        """Save, name the file in ``last_checkpoint``, and only then delete older ones."""
        self._take_states()
        limit = self.max_keep_ckpts
        kept: list[int] = []
        if limit > 0:
            kept = list(dict.fromkeys([*self.keep_ckpt_ids, step]))
            # One too many, as it is on disk; a process that resumes here deletes the first.
            runner.message_hub.update_info('keep_ckpt_ids', kept)
        self.last_ckpt = self._path(step)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            self.filename_tmpl.format(step),
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            write_whole(str(self.last_ckpt).encode(), Path(runner.work_dir) / 'last_checkpoint')
        if limit > 0:
            self.keep_ckpt_ids: deque[int] = deque(kept[-limit:])
            for old in kept[:-limit]:
                if is_main_process() and self.file_backend.isfile(self._path(old)):
                    self.file_backend.remove(self._path(old))

    def _path(self, step: int) -> str:
        return str(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step)))

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, Any]) -> None:
        """Save a better checkpoint before the one that it replaces is deleted."""
        replaced: list[str] = []
        self.file_backend.remove = replaced.append
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            del self.file_backend.remove
        for file in replaced:
            self.file_backend.remove(file)


# Which checkpoint


def newest_whole(work_dir: str | Path) -> tuple[str, dict[str, Any]] | None:
    """Return the newest whole checkpoint of a work dir and its content; None where there is none.

    It is the one that ``last_checkpoint`` names, here or where the work dir was before, or else the
    one written last. Damaged ones are reported and passed over.

    Raises:
        UserError: Where all of them are damaged.
    """
    files = _checkpoints(Path(work_dir))
    for file in files:
        try:
            return str(file), read_training(file)
        except UserError as error:
            print_log(f'Passed over for an older one: {error}', 'current', logging.WARNING)
    if files:
        raise UserError(
            f'None of the {len(files)} checkpoints in {work_dir} is whole; start anew without '
            '--resume.'
        )
    return None


def _checkpoints(work_dir: Path) -> list[Path]:
    """Return the checkpoints of a work dir: the one named in it, then the others by age."""
    note = work_dir / 'last_checkpoint'
    last = Path(note.read_text().strip()) if note.is_file() else Path()
    named = [file for file in (work_dir / last.name, last) if file.is_file()][:1]
    folder = named[0].parent if named else work_dir
    others = (file for file in folder.glob('*.pth') if not file.name.startswith('best_'))
    return list(dict.fromkeys([*named, *sorted(others, key=os.path.getmtime, reverse=True)]))


def read_training(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that a training can go on from, checked to the last byte.

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
    """Turn what a file system may do to a training into one sentence with the way on.

    Args:
        work_dir: The training's own.

    Raises:
        UserError: Where a file could not be read or written.
    """
    try:
        yield
    except (EOFError, ConnectionError) as error:  # the pipe of a worker that died sending a batch
        raise UserError(
            f'The training in {work_dir} stopped: a process that loads data exited unexpectedly, '
            'as the system ends one for want of memory; go on with --resume and, by '
            '--cfg-options, a smaller train_dataloader.num_workers.'
        ) from error
    except DataError as error:
        raise UserError(f'{error} Mend that, {_way_on(work_dir)}.') from error
    except OSError as error:
        raise UserError(
            f'The training in {work_dir} stopped ({_reason(error)}); '
            f'mend that, {_way_on(work_dir)}.'
        ) from error


def _way_on(work_dir: str | Path) -> str:
    note = Path(work_dir) / 'last_checkpoint'
    if not note.is_file():
        return 'then start it again'
    return f'then go on with --resume: {note.read_text().strip()} is whole'


def _reason(error: OSError) -> str:
    """Say what went wrong with which file; a worker's error is the last line of its traceback."""
    if error.strerror:
        return f'{error.strerror}: {error.filename}' if error.filename else error.strerror
    return str(error).strip().splitlines()[-1]
