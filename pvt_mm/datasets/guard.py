"""Bad data in a run: an error that names the file, or a warning and another sample.

``build_runner`` puts the guard around a Runner's data loaders.
"""

from __future__ import annotations

import errno
import functools
import io
import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
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
from pvt_mm.errors import DataError, UserError

#: mmseg's label of a pixel that belongs to no class.
IGNORED = 255


# Loading


class GuardedLoader:
    """A loading transform whose errors name the file, and which checks what it has loaded.

    Without the checks, mmdet trains on boxes that do not fit the image until the loss is infinite;
    mmseg trains on label maps of another size, or the loss raises an error without a file.

    Args:
        loader: A transform of mmcv, mmdet or mmseg.
        num_classes: Labels from this number on, except 255, are unknown; None allows all labels.
        skipped: A counter shared by all workers. With it, bad data gives a warning and None, and
            the data set takes another sample.
    """

    def __init__(
        self, loader: Callable[[dict], dict], num_classes: int | None = None, skipped: Any = None
    ) -> None:
        self.loader = loader
        self.num_classes = num_classes
        self.skipped = skipped

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
            _check_map(loaded, self.num_classes)
        return loaded

    def _named(self, error: Exception, results: dict[str, Any]) -> DataError:
        """Return an error with the file at fault and what is wrong with it."""
        # Where the image is loaded already, the annotation is at fault.
        path = results.get('seg_map_path' if 'img' in results else 'img_path')
        if isinstance(path, str):
            found = file_problem(path, getattr(self.loader, 'backend_args', None))
            if found:
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
        return 'unreadable image', 'its content is no image'
    except (OSError, SyntaxError) as error:  # what Pillow raises on cut files
        return 'truncated image', str(error)
    except Exception as error:
        return 'unreadable image', str(error)
    return None


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


def _check_map(results: dict[str, Any], num_classes: int | None) -> None:
    labels, file = results['gt_seg_map'], str(results['seg_map_path'])
    if labels.ndim != 2:
        raise data_error('label map in colour', f'{labels.shape[2]} channels', file)
    shape = tuple(results.get('ori_shape', labels.shape))
    if labels.shape != shape:
        raise data_error(
            'label map of another size',
            f'{labels.shape[1]}x{labels.shape[0]}, its image {shape[1]}x{shape[0]}',
            file,
        )
    if num_classes is None:
        return
    known = (labels < num_classes) | (labels == IGNORED)
    if not known.all():
        unknown = np.unique(labels[~known]) + bool(results.get('reduce_zero_label'))
        raise data_error(
            'unknown id in a label map',
            f'{", ".join(map(str, unknown[:5].tolist()))}; there are {num_classes} classes',
            file,
        )
    largest = _largest_wide_id(file)
    if largest > IGNORED:
        raise data_error(
            'unknown id in a label map', f'{largest}, which mmseg cuts to 8 bits', file
        )


def _largest_wide_id(file: str) -> int:
    """Return the largest id of a label map with more than 8 bits, else 0."""
    from PIL import Image  # a requirement of mmcv, not of pvt_mm

    if not os.path.isfile(file):  # in other storage
        return 0
    with Image.open(file) as image:
        return int(np.asarray(image).max()) if image.mode.startswith(('I', 'F')) else 0


def guard_pipeline(dataset: Any, skipped: Any = None) -> None:
    """Put a guard around the loading transforms of a data set and of those inside it."""
    for inner in [getattr(dataset, 'dataset', None), *getattr(dataset, 'datasets', [])]:
        if inner is not None:
            guard_pipeline(inner, skipped)
    pipeline: Any = getattr(dataset, 'pipeline', None)
    if hasattr(pipeline, 'transforms'):
        classes = dataset.metainfo.get('classes')
        num_classes = len(classes) if classes and hasattr(dataset, 'reduce_zero_label') else None
        _guard(pipeline.transforms, num_classes, skipped)


def _guard(transforms: Any, num_classes: int | None, skipped: Any) -> None:
    """Replace the loaders in a list of transforms, and in transforms that contain others."""
    for index, transform in enumerate(transforms):
        if type(transform).__name__.startswith('Load'):
            transforms[index] = GuardedLoader(transform, num_classes, skipped)
        for name in ('transforms', 'subroutines'):
            inner = getattr(transform, name, [])
            _guard(getattr(inner, 'transforms', inner), num_classes, skipped)


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
            if 'is not in the' in str(error):  # a registry: a name in the config is wrong
                raise
            raise UserError(
                f'A data set of {config} cannot be loaded ({reason_of(error)}); '
                f'python tools/analysis_tools/check_dataset.py {config} says what is wrong with it.'
            ) from error
        guard_pipeline(loader.dataset, skipped if dataloader == train else None)
        classes[:] = getattr(loader.dataset, 'metainfo', {}).get('classes') or ()
        return loader

    @functools.wraps(build_evaluator)
    def checked(evaluator: Any) -> Any:
        try:
            built = build_evaluator(evaluator)
            for metric in built.metrics:
                supply(metric, classes)
        except Exception as error:
            if 'is not in the' in str(error):
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
