"""Bad data in a run: an error that names the file, or a warning and another sample.

``build_runner`` puts the guard around a Runner's data loaders.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import multiprocessing.queues
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine import fileio
from mmengine.logging import print_log
from mmengine.runner import Runner

from pvt_mm.config import LOADERS
from pvt_mm.datasets.coco_readers import (
    census_of,
    check_learnt,
    checked_files,
    metrics_of,
    supply,
)
from pvt_mm.datasets.consistency import with_inner
from pvt_mm.datasets.ignore_index import IGNORED, ignored_label
from pvt_mm.errors import DataError, UserError, is_unknown_name

# Loading


class GuardedLoader:
    """A loading transform whose errors name the file, and which checks what it has loaded.

    Without the checks, mmdet trains on boxes that do not fit the image until the loss is infinite;
    mmseg trains on label maps of another size, or the loss raises an error without a file.

    Args:
        loader: A transform of mmcv, mmdet or mmseg.
        num_classes: Labels from this number on, except the ignored one, are unknown; None allows
            all labels.
        skipped: A counter shared by all workers. With it, bad data gives a warning and None, and
            the data set takes another sample.
        ignored: The label that the model ignores; None if there is none.
    """

    def __init__(
        self,
        loader: Callable[[dict], dict],
        num_classes: int | None = None,
        skipped: Any = None,
        ignored: int | None = IGNORED,
    ) -> None:
        self.loader = loader
        self.num_classes = num_classes
        self.skipped = skipped
        self.ignored = ignored

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Load a sample's image or annotation.

        Raises:
            DataError: Where it cannot be loaded or is not consistent, unless it is skipped.
        """
        try:
            return self._load(results)
        except DataError as error:
            if self.skipped is None:
                raise
            with self.skipped.get_lock():
                self.skipped.value += 1
                count = self.skipped.value
            print_log(
                f'Skipped bad data, {count} times so far: {error}',
                logger='current',
                level=logging.WARNING,
            )
            return None

    def _load(self, results: dict[str, Any]) -> dict[str, Any]:
        before = set(results)
        try:
            loaded = self.loader(results)
        except Exception as error:  # a decoder or a mask may raise anything
            raise self._named(error, results) from error
        if 'img' in loaded and 'img' not in before:
            _check_image(loaded)
        if 'gt_seg_map' in loaded and 'gt_seg_map' not in before:
            _check_map(loaded, self.num_classes, self.ignored)
        return loaded

    def _named(self, error: Exception, results: dict[str, Any]) -> DataError:
        """Return an error with the file at fault and what is wrong with it."""
        # Where the image is loaded already, the annotation is at fault.
        path = results.get('seg_map_path' if 'img' in results else 'img_path')
        if isinstance(path, str):
            problem = file_problem if 'img' in results else image_problem
            if found := problem(path, getattr(self.loader, 'backend_args', None)):
                return data_error(*found, path)
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        if 'img' not in results:
            return data_error('unreadable image', reason, str(path))
        if isinstance(error, KeyError) and error.args == ('mask',):
            reason = 'an object has no mask'
        return data_error('broken annotation', reason, str(path or results.get('img_path')))


def data_error(kind: str, detail: str, file: str) -> DataError:
    """Return an error that says what is wrong with a file."""
    return DataError(f'{file}: {kind} ({detail}).', file, kind, detail)


def file_problem(path: str, backend_args: dict | None = None) -> tuple[str, str] | None:
    """Return why an image file cannot be read, as kind and detail, or None."""
    from PIL import Image, UnidentifiedImageError  # a requirement of mmcv, not of pvt_mm

    try:
        content = fileio.get(path, backend_args=backend_args)
    except FileNotFoundError:
        return 'missing file', _why_missing(path)
    except OSError as error:
        kind = 'path too long' if error.errno == errno.ENAMETOOLONG else 'unreadable file'
        return kind, os.strerror(error.errno) if error.errno else str(error)
    if not content:
        return 'unreadable image', 'the file is empty'
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except UnidentifiedImageError:
        return 'unreadable image', _content(content)
    except (OSError, SyntaxError) as error:  # what Pillow raises on cut files
        return 'truncated image', str(error)
    except Exception as error:
        return 'unreadable image', str(error)
    return None


def image_problem(path: str, backend_args: dict | None = None) -> tuple[str, str] | None:
    """Return why an image cannot be read as three channels of 8 bits, as ``file_problem`` does."""
    if found := file_problem(path, backend_args):
        return found
    wide = _wide_pixels(fileio.get(path, backend_args=backend_args))
    return ('unreadable image', wide) if wide else None


#: Kinds of files, by what they begin with.
_SIGNATURES = {
    b'II*\0': 'a TIFF of a kind that is not read; convert it to PNG',
    b'MM\0*': 'a TIFF of a kind that is not read; convert it to PNG',
    b'II+\0': 'a BigTIFF, which is not read; convert it to PNG',
    b'\x89PNG': 'a damaged PNG',
    b'\xff\xd8\xff': 'a damaged JPEG',
    b'\x93NUMPY': 'an array of NumPy',
    b'\x89HDF': 'an HDF5 file',
    b'%PDF': 'a PDF',
    b'<!doctype html': 'a web page',
    b'<html': 'a web page',
    b'version https://git-lfs': 'a pointer of Git LFS; fetch the file with git lfs pull',
}


def _content(content: bytes) -> str:
    """Say what a file is that Pillow does not take for an image."""
    if wide := _wide_pixels(content):
        return wide
    start = content[:64].lstrip().lower()
    for signature, kind in _SIGNATURES.items():
        if start.startswith(signature.lower()):
            return f'it is {kind}'
    if content[4:12] in (b'ftypheic', b'ftypmif1', b'ftypavif'):
        return 'it is HEIC or AVIF; convert it to JPEG or PNG'
    if content[128:132] == b'DICM':
        return 'it is DICOM; convert it to PNG'
    return 'its content is no image'


def _wide_pixels(content: bytes) -> str:
    """Describe pixels that are not of 8 bits, as those of many TIFFs; '' for others."""
    import cv2  # a requirement of mmcv, not of pvt_mm

    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # more pixels than it allows, for one
        return ''
    if pixels is None or pixels.dtype == np.uint8:
        return ''
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    return f'{channels} channel(s) of {pixels.dtype}; convert it to 3 channels of 8 bits'


def _why_missing(path: str) -> str:
    if '\\' in path and os.path.isfile(path.replace('\\', '/')):
        return r'its name has \; write / instead, and it is found'
    return 'there is no such file'


def _check_image(results: dict[str, Any]) -> None:
    height, width = results['img'].shape[:2]
    stated = results.get('height'), results.get('width')
    if None not in stated and stated != (height, width):
        raise data_error(
            'image of another size',
            f'{width}x{height}, and {stated[1]}x{stated[0]} by its annotation',
            results['img_path'],
        )


def _check_map(results: dict[str, Any], num_classes: int | None, ignored: int | None) -> None:
    labels, file = results['gt_seg_map'], str(results['seg_map_path'])
    if labels.ndim != 2:
        equal = bool((labels == labels[..., :1]).all())
        way = 'all equal: save one of them' if equal else 'save one, with the number of the class'
        raise data_error('label map in colour', f'{labels.shape[2]} channels; {way}', file)
    shape = tuple(results.get('ori_shape', labels.shape))
    if labels.shape != shape:
        raise data_error(
            'label map of another size',
            f'{labels.shape[1]}x{labels.shape[0]}, its image {shape[1]}x{shape[0]}',
            file,
        )
    if num_classes is None:
        return
    wide = _cut_id(file)
    if wide is not None:
        what = f'{wide:g}, which mmseg cuts to a whole number of 8 bits'
        raise data_error('unknown id in a label map', what, file)
    known = (labels < num_classes) | (labels == ignored)
    if not known.all():
        unknown = np.unique(labels[~known]) + bool(results.get('reduce_zero_label'))
        why = '; JPEG changes labels, so save PNG' if is_jpeg(file) else ''
        raise data_error(
            'unknown id in a label map',
            f'{", ".join(map(str, unknown[:5].tolist()))}; {num_classes} class(es), and '
            f'{"no label" if ignored is None else ignored} is ignored{why}',
            file,
        )


def _cut_id(file: str) -> float | None:
    """Return an id of a label map that mmseg's 8 bits do not hold; -1 becomes 255."""
    from PIL import Image  # a requirement of mmcv, not of pvt_mm

    if not os.path.isfile(file):  # in other storage
        return None
    with Image.open(file) as image:
        if not image.mode.startswith(('I', 'F')):
            return None
        ids = np.asarray(image)
    fits = (ids >= -1) & (ids <= 255) & (ids == np.floor(ids))
    return None if fits.all() else float(ids[~fits][0])


def is_jpeg(file: str) -> bool:
    """Tell whether a file on this machine is a JPEG."""
    if not os.path.isfile(file):
        return False
    with open(file, 'rb') as stream:
        return stream.read(3) == b'\xff\xd8\xff'


def guard_pipeline(dataset: Any, skipped: Any = None, ignored: int | None = IGNORED) -> None:
    """Put a guard around the loading transforms of a data set and of those inside it.

    Args:
        dataset: Changed in place.
        skipped: A counter of bad data; see ``GuardedLoader``.
        ignored: The label that the model ignores; label maps are padded with it.
    """
    for inner in with_inner(dataset):
        pipeline: Any = getattr(inner, 'pipeline', None)
        if hasattr(pipeline, 'transforms'):
            is_mmseg = hasattr(inner, 'reduce_zero_label')
            classes = inner.metainfo.get('classes') if is_mmseg else None
            _guard(pipeline.transforms, len(classes) if classes else None, skipped, ignored)


def _guard(transforms: Any, num_classes: int | None, skipped: Any, ignored: int | None) -> None:
    """Replace the loaders in a list of transforms, and in transforms that contain others."""
    for index, transform in enumerate(transforms):
        if type(transform).__name__.startswith('Load'):
            transforms[index] = GuardedLoader(transform, num_classes, skipped, ignored)
        elif ignored is not None:
            _pad_with(transform, ignored)
        for name in ('transforms', 'subroutines'):
            inner = getattr(transform, name, [])
            _guard(getattr(inner, 'transforms', inner), num_classes, skipped, ignored)


def _pad_with(transform: Any, ignored: int) -> None:
    """Have a transform pad label maps with the ignored label, where it pads with 255."""
    if getattr(transform, 'seg_pad_val', None) == IGNORED:
        transform.seg_pad_val = ignored
    values = getattr(transform, 'pad_val', None)  # of mmcv's Pad
    if isinstance(values, dict) and values.get('seg') == IGNORED:
        transform.pad_val = {**values, 'seg': ignored}


def guard_loading(
    runner: Runner, config: str, skip: bool = False, loaders: Sequence[str] = LOADERS
) -> None:
    """Have the data loaders of a Runner name the files that they cannot load.

    Annotation files in COCO's format are checked as they are read, for data sets and evaluators.

    Args:
        runner: A Runner whose loaders are not built yet: a loader starts its workers then.
        config: The config's path, for messages.
        skip: Replace bad samples by others in training. Evaluation always stops: a score without
            some images cannot be compared.
        loaders: Those that the Runner builds.
    """
    build, build_evaluator = runner.build_dataloader, runner.build_evaluator
    cfg = runner.cfg
    train = cfg.get('train_dataloader')
    skipped = multiprocessing.Value('q', 0) if skip else None
    ignored = ignored_label(runner.cfg)

    classes: list[str] = []  # of the loader that is built before its evaluator

    @functools.wraps(build)
    def guarded(dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        name = next((name for name in loaders if cfg.get(name) == dataloader), '')
        try:
            with checked_files(metrics_of(cfg, name)):
                loader = build(dataloader, *args, **kwargs)
            if dataloader == train:
                check_learnt([census_of(loader.dataset)])
        except Exception as error:  # unexpected content raises anything
            if is_unknown_name(error):
                raise
            raise UserError(
                f'A data set of {config} cannot be loaded ({reason_of(error)}); '
                f'python tools/analysis_tools/check_dataset.py {config} says what is wrong with it.'
            ) from error
        guard_pipeline(loader.dataset, skipped if dataloader == train else None, ignored)
        guard_workers(loader)
        classes[:] = getattr(loader.dataset, 'metainfo', {}).get('classes') or ()
        return loader

    @functools.wraps(build_evaluator)
    def checked(evaluator: Any) -> Any:
        try:
            built = build_evaluator(evaluator)
            for metric in built.metrics:
                supply(metric, classes)
        except Exception as error:
            if is_unknown_name(error):
                raise
            raise UserError(
                f'An evaluator of {config} cannot be built ({reason_of(error)}).'
            ) from error
        return built

    runner.build_dataloader = guarded
    runner.build_evaluator = checked


def reason_of(error: Exception) -> str:
    """Return why a data set or evaluator cannot be built."""
    if 'need at least one array' in str(error):
        return 'no image is left to train on'
    if isinstance(error, UserError):
        return str(error).rstrip('.')
    return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0]}'


# Workers

#: Below this size of /dev/shm, a batch of a few large images may not fit.
SMALL_SHARED_MEMORY = 2**30
_SHARED_MEMORY = Path('/dev/shm')


def guard_workers(loader: Any) -> None:
    """Have the workers of a DataLoader end where they cannot hand a batch over.

    Python drops such a batch with a traceback, and PyTorch would wait for it for ever.
    """
    if loader.num_workers:
        loader.worker_init_fn = functools.partial(_init_worker, loader.worker_init_fn)


def _init_worker(init: Callable[[int], None] | None, worker: int) -> None:
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore
    if init is not None:
        init(worker)


def _end_worker(error: Exception, batch: Any) -> None:
    print(
        f'A process that loads data cannot hand over a batch ({type(error).__name__}: {error}).',
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def worker_fault(error: BaseException, loaders: Sequence[str]) -> str | None:
    """Say what to do where a process that loads data has ended; None where another error is.

    Args:
        error: What the training or test ended with.
        loaders: The dataloaders of the config whose processes it may be.
    """
    full = getattr(error, 'errno', None) == errno.ENOSPC and _shared_memory(free=True) == 0
    lost = isinstance(error, (EOFError, ConnectionError))  # the pipe of a worker
    if not (full or lost or 'DataLoader worker' in str(error)):
        return None
    fewer = ' '.join(f'{loader}.num_workers=0' for loader in loaders)
    what = 'a process that loads data exited unexpectedly, '
    size = _shared_memory()
    if size is not None and size < SMALL_SHARED_MEMORY:
        return (
            f'{what}and /dev/shm, by which it hands batches over, has only {size / 2**20:.3g} MiB; '
            f'give it more (docker run --shm-size=8g), or --cfg-options {fewer}'
        )
    return f'{what}perhaps for lack of memory; take fewer of them: --cfg-options {fewer}'


@contextlib.contextmanager
def clear_worker_errors(loaders: Sequence[str]) -> Iterator[None]:
    """Turn the error of a process that loads data into one sentence.

    Raises:
        UserError: Where one ended unexpectedly.
    """
    try:
        yield
    except (OSError, EOFError, RuntimeError) as error:
        fault = worker_fault(error, loaders)
        if fault is None:
            raise
        raise UserError(f'{fault[0].upper()}{fault[1:]}.') from error


def _shared_memory(free: bool = False) -> int | None:
    """Return the bytes of /dev/shm, or those that are free; None where there is none."""
    if not _SHARED_MEMORY.is_dir():
        return None
    usage = shutil.disk_usage(_SHARED_MEMORY)
    return usage.free if free else usage.total
