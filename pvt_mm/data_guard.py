"""Bad data in a run: stopped with the file named, or skipped with a counted warning.

The tools put two checks around a Runner; a script of one's own does the same::

    data_guard.check_classes(cfg, 'my_config.py')
    runner = Runner.from_cfg(cfg)
    data_guard.guard_loading(runner, 'my_config.py')
    runner.train()
"""

from __future__ import annotations

import errno
import functools
import io
import json
import logging
import mmap
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from mmengine import fileio
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner

from .cli import datasets
from .reading import DataError, UserError

#: mmseg's label of a pixel that belongs to no class.
IGNORED = 255


# Loading


class GuardedLoader:
    """A loading transform whose errors name the file, and which checks what it has loaded.

    mmdet would train on boxes that do not fit the picture, until the loss is infinite; mmseg on
    label maps of another size, or it stops in a nameless error of the loss.

    Args:
        loader: A transform of mmcv, mmdet or mmseg.
        num_classes: Labels from this on, but for 255, are unknown; None allows every label.
        skipped: A counter that all workers share. With it, bad data gives a warning and None, for
            which a data set draws another sample.
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
            DataError: Where it cannot be loaded or contradicts itself, unless it is skipped.
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
        """Find the file that an error is about and say what is wrong with it."""
        # An image that is loaded already is not to blame.
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
    """Return an error whose sentence says what is wrong with a file."""
    return DataError(f'{file}: {kind} ({detail}).', file, kind, detail)


def file_problem(path: str, backend_args: dict | None = None) -> tuple[str, str] | None:
    """Return the kind of what keeps an image file from being read, with a detail, or None."""
    from PIL import Image, UnidentifiedImageError  # a requirement of mmcv, not of pvt_mm

    try:
        content = fileio.get(path, backend_args=backend_args)
    except FileNotFoundError:
        return 'missing file', 'there is no such file'
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
    """Put a guard around the loading transforms of a data set, or of those that it wraps."""
    for inner in [getattr(dataset, 'dataset', None), *getattr(dataset, 'datasets', [])]:
        if inner is not None:
            guard_pipeline(inner, skipped)
    pipeline: Any = getattr(dataset, 'pipeline', None)
    if hasattr(pipeline, 'transforms'):
        classes = dataset.metainfo.get('classes')
        num_classes = len(classes) if classes and hasattr(dataset, 'reduce_zero_label') else None
        _guard(pipeline.transforms, num_classes, skipped)


def _guard(transforms: Any, num_classes: int | None, skipped: Any) -> None:
    """Replace the loaders in a list of transforms, and in those that hold others."""
    for index, transform in enumerate(transforms):
        if type(transform).__name__.startswith('Load'):
            transforms[index] = GuardedLoader(transform, num_classes, skipped)
        for name in ('transforms', 'subroutines'):
            inner = getattr(transform, name, [])
            _guard(getattr(inner, 'transforms', inner), num_classes, skipped)


def guard_loading(runner: Runner, config: str, skip: bool = False) -> None:
    """Have the data loaders of a Runner name what they cannot load.

    Call it before ``train`` or ``test``, since a loader starts its workers when it is built.

    Args:
        runner: A Runner whose loaders are not built yet.
        config: The config's path, for messages.
        skip: Replace bad samples by others in training. Evaluation always stops: without an image
            its score would be another one's.
    """
    build = runner.build_dataloader
    train = runner.cfg.get('train_dataloader')
    skipped = multiprocessing.Value('q', 0) if skip else None

    @functools.wraps(build)
    def guarded(dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            loader = build(dataloader, *args, **kwargs)
        except (AssertionError, LookupError, OSError, TypeError, ValueError) as error:
            if 'is not in the' in str(error):  # of a registry: a name in the config is wrong
                raise
            raise UserError(
                f'A data set of {config} cannot be loaded ({type(error).__name__}: {error}); '
                f'python tools/check_dataset.py {config} says what is wrong with it.'
            ) from error
        guard_pipeline(loader.dataset, skipped if dataloader == train else None)
        return loader

    runner.build_dataloader = guarded


# Classes


def check_classes(cfg: Config, config: str, loaders: Sequence[str]) -> None:
    """Check that model, data set and annotations mean the same classes.

    Args:
        cfg: Config of a detector or segmentor.
        config: Its path, for messages.
        loaders: Those whose data sets are looked at.

    Raises:
        UserError: Naming what to write instead.
    """
    init_default_scope(cfg.default_scope)
    heads = dict(_num_classes(cfg.model, 'model'))
    for loader in loaders:
        for data in datasets(cfg, [loader]):
            try:
                dataset = DATASETS.build(dict(data, lazy_init=True, pipeline=[]))
            except ValueError as error:
                raise UserError(f'The data set of {loader} in {config}: {error}.') from error
            except Exception:  # what it misses, the Runner will name
                continue
            if not _is_of(dataset, 'BaseDetDataset', 'BaseSegDataset'):  # videos, for one
                continue
            classes = dataset.metainfo.get('classes')
            if isinstance(classes, str):
                raise UserError(
                    f'The classes of {loader} in {config} are one text; write '
                    f"metainfo=dict(classes=('{classes}',)), with a comma."
                )
            # Panoptic heads have classes of their own for things and for stuff.
            if classes and 'thing_classes' not in dataset.metainfo:
                _check_heads(heads, classes, config, loader)
            if is_coco(dataset) and os.path.isfile(dataset.ann_file):
                names = category_names(dataset.ann_file)
                _check_names(classes, names, dataset.ann_file, config, loader)


def is_coco(dataset: Any) -> bool:
    """Tell whether a data set reads COCO's format as mmdet's CocoDataset does."""
    methods = ('load_data_list', 'parse_data_info')
    return any(
        kind.__name__ == 'CocoDataset'
        and all(getattr(type(dataset), name) is getattr(kind, name) for name in methods)
        for kind in type(dataset).__mro__
    )


def _is_of(dataset: Any, *names: str) -> bool:
    """Tell whether a data set is of one of some classes, without importing their codebase."""
    return any(kind.__name__ in names for kind in type(dataset).__mro__)


def _num_classes(node: Any, path: str) -> Iterator[tuple[str, int]]:
    """Yield where heads state the number of classes, as in ``--cfg-options``."""
    if isinstance(node, dict) and node.get('type') != 'STDCHead':  # it learns edges
        for key, value in node.items():
            # These have classes of their own: objectness, stuff, ImageNet.
            if key == 'num_classes' and isinstance(value, int):
                yield f'{path}.{key}', value
            elif key not in ('rpn_head', 'semantic_head', 'backbone'):
                yield from _num_classes(value, f'{path}.{key}')
    elif isinstance(node, (list, tuple)):
        for index, child in enumerate(node):
            yield from _num_classes(child, f'{path}.{index}')


def _check_heads(heads: dict[str, int], classes: Sequence[str], config: str, loader: str) -> None:
    wrong = {key: value for key, value in heads.items() if value != len(classes)}
    if wrong:
        now = ', '.join(f'{key}={value}' for key, value in wrong.items())
        new = ' '.join(f'{key}={len(classes)}' for key in wrong)
        raise UserError(
            f'{config} has {now}, but the data set of {loader} has {len(classes)} classes '
            f'({_listed(classes)}); set {new} in the config or by --cfg-options, or else '
            'metainfo=dict(classes=(...)) of the data set.'
        )


def _check_names(
    classes: Sequence[str], names: list[str], file: str, config: str, loader: str
) -> None:
    # mmdet numbers the labels in the order of the file and leaves out what it does not find.
    if [name for name in names if name in classes] != list(classes):
        missing = [name for name in classes if name not in names]
        what = f'no category {_listed(missing)}' if missing else 'its categories in another order'
        raise UserError(
            f'{file} has {what}, against the classes of {loader} in {config}, so that labels would '
            f'get wrong names; write metainfo=dict(classes={tuple(names)!r}) in that data set and '
            f'num_classes={len(names)} in the heads.'
        )
    others = [name for name in names if name not in classes]
    if others:
        print_log(
            f'{file} has {len(names)} categories, and the data set of {loader} in {config} '
            f'{len(classes)} classes: objects of {_listed(others)} are left out. To learn them, '
            f'write metainfo=dict(classes={tuple(names)!r}) there and num_classes={len(names)} in '
            'the heads.',
            logger='current',
            level=logging.WARNING,
        )


def _listed(names: Sequence[str]) -> str:
    return ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')


def category_names(file: str) -> list[str]:
    """Return the names of the categories in a COCO annotation file, in its order.

    Raises:
        UserError: Where it holds none.
    """
    try:
        return _names(_categories_alone(file))
    except (LookupError, TypeError, ValueError):
        pass  # they stand elsewhere, or nowhere
    try:
        with open(file, encoding='utf-8') as stream:
            return _names(json.load(stream)['categories'])
    except (LookupError, TypeError, ValueError, OSError) as error:
        raise UserError(
            f'{file} is no annotation file of COCO with categories ({type(error).__name__}: '
            f'{error}).'
        ) from error


def _names(categories: Any) -> list[str]:
    return [category['name'] for category in categories]


def _categories_alone(file: str) -> Any:
    """Read the first list named categories: COCO's files take 10 seconds and 3 GB as a whole."""
    with open(file, 'rb') as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = re.search(rb'"categories"\s*:\s*(?=\[)', data)
        window = data[found.end() : found.end() + 2**20] if found else b''
    return json.JSONDecoder().raw_decode(window.decode('utf-8', 'ignore'))[0]
