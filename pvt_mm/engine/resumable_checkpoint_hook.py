"""mmengine's checkpoint hook, with random states and whole files only."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop

from pvt_mm.engine.random_state import random_state, set_random_state
from pvt_mm.engine.samplers import FreeSkips, ResumableBatchSampler
from pvt_mm.files import PARTIAL, atomic_write


@register_backend('atomic')
class AtomicBackend(LocalBackend):
    """Local files that are never half written."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes."""
        atomic_write(obj, filepath)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write text."""
        atomic_write(obj.encode(encoding), filepath)


@HOOKS.register_module()
class ResumableCheckpointHook(CheckpointHook):
    """mmengine's hook, with the random state of every rank, and always a whole checkpoint on disk.

    The iteration after a save or a validation starts from the random state that was taken before
    it. So the random numbers of a resumed training are those of one that ran through.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._states: list[dict[str, Any]] | None = None

    def before_train(self, runner: Any) -> None:
        """Remove the partial files of a killed process; skip batches without loading them."""
        super().before_train(runner)
        if is_main_process():
            for folder in {Path(self.out_dir), Path(runner.work_dir)}:
                for file in folder.glob(f'.*{PARTIAL}'):
                    file.unlink()
        loop = runner.train_loop
        batches = loop.dataloader.batch_sampler
        if isinstance(loop, IterBasedTrainLoop) and isinstance(batches, ResumableBatchSampler):
            # Newer versions of mmengine have an option not to skip.
            skips = 0 if getattr(loop, 'fast_forward_on_resume', False) else batches.skipped
            loop.dataloader_iterator = FreeSkips(loop.dataloader_iterator, skips)

    def before_val(self, runner: Any) -> None:
        """Take the random states for the next iteration."""
        self._take_states()

    def _take_states(self) -> None:
        """Take them once after an iteration: what runs in between may differ from run to run."""
        self._states = self._states or all_gather_object(random_state())

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Restore the random state that was taken after the last iteration, if any."""
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
                'The checkpoint has no random states for this number of processes: the training '
                'goes on, but its random numbers differ from those of one that ran through.'
            )

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        """Save, write the name into ``last_checkpoint``, and only then delete older files."""
        self._take_states()
        limit = self.max_keep_ckpts
        kept: list[int] = []
        if limit > 0:
            kept = list(dict.fromkeys([*self.keep_ckpt_ids, step]))
            # One more than the limit, as on disk; a resumed process deletes the oldest.
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
            atomic_write(str(self.last_ckpt).encode(), Path(runner.work_dir) / 'last_checkpoint')
        if limit > 0:
            self.keep_ckpt_ids: deque[int] = deque(kept[-limit:])
            for old in kept[:-limit]:
                if is_main_process() and self.file_backend.isfile(self._path(old)):
                    self.file_backend.remove(self._path(old))

    def _path(self, step: int) -> str:
        return str(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step)))

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, Any]) -> None:
        """Save the better checkpoint before the old one is deleted."""
        replaced: list[str] = []
        self.file_backend.remove = replaced.append
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            del self.file_backend.remove
        for file in replaced:
            self.file_backend.remove(file)
