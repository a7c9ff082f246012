"""The readers of COCO's annotation files: data sets and evaluators, each through the check.

mmdet reads a file once for a data set, and once more for the evaluator that scores it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import operator
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine import fileio
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS, METRICS, init_default_scope

from pvt_mm.config import datasets, iter_dicts, type_name
from pvt_mm.datasets.coco_file import TOLD, Census, Entries, Use
from pvt_mm.datasets.coco_values import is_scored_id
from pvt_mm.datasets.consistency import is_coco, order_problem, with_inner
from pvt_mm.errors import DataError, UserError, is_unknown_name

#: The evaluator of each loader.
EVALUATORS = {'val_dataloader': 'val_evaluator', 'test_dataloader': 'test_evaluator'}


# Data sets


def use_of(dataset: Any, metrics: Sequence[dict]) -> Use:
    """Return what the objects of a data set are used for.

    Args:
        dataset: A CocoDataset, whose pipeline is built.
        metrics: The configs of its evaluators; none for a training.
    """
    steps = [getattr(step, 'loader', step) for step in dataset.pipeline.transforms]
    masks = [step for step in steps if getattr(step, 'with_mask', False)]
    filters = {} if dataset.test_mode else dataset.filter_cfg or {}
    read = [
        use_of_metric(metric)
        for metric in metrics
        if needs_labels(metric) and is_coco_metric(metric) and metric.get('ann_file')
    ]
    return Use(
        labelled=not metrics or any(map(needs_labels, metrics)),
        scored=bool(read),
        masks=bool(masks),
        decoded=all(getattr(step, 'poly2mask', True) for step in masks),
        scored_masks=any(use.scored_masks for use in read),
        min_size=filters.get('min_size', 0),
        with_empty=not filters.get('filter_empty_gt', False),
    )


def use_of_metric(metric: dict) -> Use:
    """Return what a CocoMetric uses the objects of its file for."""
    scored = needs_labels(metric)
    return Use(scored, scored, scored_masks=scored and 'segm' in metric.get('metric', ()))


def needs_labels(metric: dict) -> bool:
    """Tell whether an evaluator compares predictions with labels."""
    return not metric.get('format_only') and not type_name(metric).startswith('Dump')


def is_coco_metric(metric: dict) -> bool:
    """Tell whether an evaluator is mmdet's CocoMetric or ours."""
    return type_name(metric) in ('CocoMetric', 'FastCocoMetric')


def read_entries(dataset: Any, metrics: Sequence[dict], path: str | None = None) -> Entries:
    """Read and check the annotation file of a CocoDataset.

    Args:
        dataset: The data set, not initialised.
        metrics: The configs of its evaluators; none for a training.
        path: A local copy of the file; by default it is fetched.

    Raises:
        DataError: Where the file cannot be read.
    """
    file = str(dataset.ann_file)
    folder = dataset.data_prefix.get('img')
    if not isinstance(folder, str):
        raise _does_not_load(file, "data_prefix has no img; write data_prefix=dict(img='DIR/')")
    content = _content(path or file, None if path else dataset.backend_args, file)
    classes = dataset.metainfo.get('classes') or ()
    entries = Entries(content, file, folder, classes, use_of(dataset, metrics))
    if entries.content is None or entries.stopping():
        return entries
    if not dataset.test_mode and not entries.images_left():
        reason = f'no image is left to train on: {entries.census}'
        entries.add(file, 'data set that does not load', reason)
        entries.content = None
    elif dataset.test_mode:
        entries.check_scored()
    return entries


def _content(path: str, backend_args: dict | None, file: str) -> Any:
    try:
        return json.loads(fileio.get_text(path, backend_args=backend_args))
    except (OSError, RecursionError, ValueError) as error:
        raise _does_not_load(file, f'{type(error).__name__}: {error}') from error


def _does_not_load(file: str, detail: str) -> DataError:
    kind = 'data set that does not load'
    return DataError(f'{file}: {kind} ({detail}).', file, kind, detail)


def indexed(api: type, content: dict[str, Any]) -> Any:
    """Return mmdet's index of a file's content.

    Args:
        api: mmdet's class COCO.
        content: The file's content.
    """
    coco = api()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        coco.createIndex()
    coco.img_ann_map, coco.cat_img_map = coco.imgToAnns, coco.catToImgs
    return coco


def load_checked(dataset: Any, entries: Entries) -> None:
    """Initialise a CocoDataset with the entries that it can load."""
    dataset.census = entries.census
    plain = type(dataset).COCOAPI
    dataset.COCOAPI = lambda path: indexed(plain, entries.content or {})
    dataset.full_init()
    del dataset.COCOAPI  # another process could not be given it


@contextlib.contextmanager
def checked_files(metrics: Sequence[dict]) -> Iterator[None]:
    """Have mmdet's data sets in COCO's format, built meanwhile, read their files through the check.

    Each gets the attribute ``census``.

    Args:
        metrics: The configs of their evaluators; none for a training.
    """
    module = sys.modules.get('mmdet.datasets.coco')
    if module is None:  # no data set of mmdet
        yield
        return
    kind: Any = module.CocoDataset
    plain = kind.COCOAPI

    def read(dataset: Any, path: str) -> Any:
        """Read a file in the place of ``COCO(path)``: as a method, it gets the data set too."""
        if not is_coco(dataset):
            return plain(path)
        entries = read_entries(dataset, metrics, path)
        raise_first(entries, str(dataset.ann_file))
        for finding in entries.found:
            if finding.kind in TOLD:
                detail = f' ({finding.detail})' * bool(finding.detail)
                text = f'{finding.file}: {finding.kind}{detail}: pvt_mm {TOLD[finding.kind]}.'
                print_log(text, logger='current', level=logging.WARNING)
        dataset.census = entries.census
        return indexed(plain, entries.content or {})

    kind.COCOAPI = read
    try:
        yield
    finally:
        kind.COCOAPI = plain


def raise_first(entries: Entries, file: str) -> None:
    """Raise the first finding with which a file cannot be used.

    Raises:
        DataError: Naming file and entry.
    """
    stopping = entries.stopping()
    if stopping:
        kind, detail = stopping[0].kind, stopping[0].detail
        more = f', and {len(stopping) - 1} more' if len(stopping) > 1 else ''
        raise DataError(f'{file}: {kind} ({detail}){more}', file, kind, detail)


def census_of(dataset: Any) -> Census | None:
    """Return the objects of a data set and of those inside it; None where they are not counted."""
    found = [getattr(each, 'census', None) for each in with_inner(dataset)]
    counted = [census for census in found if census is not None]
    return functools.reduce(operator.add, counted) if counted else None


def check_learnt(found: Sequence[Census | None]) -> None:
    """Check that a training has an object to learn.

    Args:
        found: The objects of its data sets; None where they are not counted.

    Raises:
        DataError: Where all are left out.
    """
    counted = [census for census in found if census is not None]
    if counted and not any(census.used.total() for census in counted):
        total = functools.reduce(operator.add, counted)
        raise DataError(
            f'no object to learn: {total}', kind='no object to learn', detail=str(total)
        )


# Evaluators


def metrics_of(cfg: Config, loader: str) -> list[dict]:
    """Return the configs of the metrics that score what a loader gives."""
    return [metric for _, metric in _placed_metrics(cfg, loader)]


def _placed_metrics(cfg: Config, loader: str) -> Iterator[tuple[str, dict]]:
    """Yield each metric with its key in the config."""
    key = EVALUATORS.get(loader, '')
    evaluator = cfg.get(key) if key else None
    if isinstance(evaluator, dict) and 'metrics' in evaluator:
        key, evaluator = f'{key}.metrics', evaluator['metrics']
    if isinstance(evaluator, dict):
        yield key, evaluator
    elif isinstance(evaluator, (list, tuple)):
        for index, metric in enumerate(evaluator):
            if isinstance(metric, dict):
                yield f'{key}.{index}', metric


def check_evaluators(cfg: Config, config: str, loaders: Sequence[str]) -> None:
    """Check that evaluators read the annotations of the images that they are given.

    Args:
        cfg: Config of a detector or segmentor.
        config: Its path, for messages.
        loaders: Those whose evaluators are checked.

    Raises:
        UserError: Naming the files, and what to write instead.
    """
    init_default_scope(cfg.default_scope)
    learnt = {os.path.realpath(each.ann_file) for each in _built(cfg, 'train_dataloader')}
    for loader in loaders:
        for key, metric in _placed_metrics(cfg, loader):
            if is_coco_metric(metric):
                _check_arguments(key, metric, config)
            sets = _built(cfg, loader)
            if sets and metric.get('ann_file'):
                _check_evaluator(key, metric, loader, sets, learnt, config)
            elif sets and is_coco_metric(metric) and not _gives_instances(cfg, loader):
                fix = f"write {key}.ann_file='{sets[0].ann_file}'"
                raise UserError(f'{key} of {config} has no ann_file; {fix}.')


def _check_arguments(key: str, metric: dict, config: str) -> None:
    """Build a CocoMetric without its file, for its other arguments may be wrong too."""
    try:
        METRICS.build(dict(metric, ann_file=None))
    except Exception as error:
        if is_unknown_name(error):
            raise
        raise UserError(
            f'{key} of {config} cannot be built ({type(error).__name__}: {error}).'
        ) from error


def _built(cfg: Config, loader: str) -> list[Any]:
    """Build a loader's data sets that have an annotation file, without reading it."""
    found = []
    for data in datasets(cfg, [loader]):
        try:
            dataset = DATASETS.build(dict(data, lazy_init=True, pipeline=[]))
        except Exception:  # check_classes or the Runner says why
            continue
        if isinstance(getattr(dataset, 'ann_file', None), str) and dataset.ann_file:
            found.append(dataset)
    return found


def _check_evaluator(
    key: str, metric: dict, loader: str, sets: list[Any], learnt: set[str], config: str
) -> None:
    file, own = metric['ann_file'], sets[0].ann_file
    fix = f"; write {key}.ann_file='{own}'."
    if not isinstance(file, str) or '://' in file:
        return
    reads = f'{key} of {config} reads {file}'
    if not os.path.isfile(file):
        raise UserError(f'{reads}, which is missing{fix}')
    if all(os.path.realpath(each.ann_file) == os.path.realpath(file) for each in sets):
        if any(getattr(each, '_indices', None) is not None for each in sets):
            _warn(f'{reads} with all its images, and {loader} gives only those of its indices.')
        return
    if os.path.realpath(file) in learnt:
        raise UserError(f'{reads}, the file of train_dataloader, but {loader} reads {own}{fix}')
    if is_coco_metric(metric) and all(map(is_coco, sets)):
        problem = _difference(file, metric, sets)
        if problem:
            raise UserError(f'{reads}, but {loader} reads {own}: {problem}{fix}')


def _gives_instances(cfg: Config, loader: str) -> bool:
    """Tell whether a loader's samples hold what a CocoMetric without a file compares with."""
    steps = iter_dicts([data.get('pipeline') for data in datasets(cfg, [loader])])
    return any('instances' in step.get('meta_keys', ()) for step in steps)


def _warn(text: str) -> None:
    print_log(text, logger='current', level=logging.WARNING)


def _difference(file: str, metric: dict, sets: list[Any]) -> str:
    """Return how an evaluator's file differs from those of the data sets; '' where it fits."""
    classes = sets[0].metainfo.get('classes') or ()
    scored = metric_entries(_content(file, metric.get('backend_args'), file), file, metric, classes)
    content = scored.content or {}
    known = {image['id']: image for image in content['images']}
    names = [category['name'] for category in content['categories']]
    given = [
        image
        for each in sets
        for image in _images(_content(each.ann_file, each.backend_args, each.ann_file))
    ]
    absent = [image for image in given if image.get('id') not in known]
    if absent:
        return f'{len(absent)} of {len(given)} images are not in it, as id {absent[0].get("id")}'
    for image in given:
        for name in ('file_name', 'width', 'height'):
            here, there = image.get(name), known[image['id']].get(name)
            if os.path.basename(str(here)) != os.path.basename(str(there)):
                return f'image {image["id"]} has the {name} {there} in the one, {here} in the other'
    problem = order_problem(classes, names)
    if problem:
        return f'it has {problem}'
    if len(known) > len(given):
        _warn(f'{file} has {len(known)} images, {len(known) - len(given)} more than are scored.')
    return ''


def _images(content: Any) -> list[dict]:
    images = content.get('images') if isinstance(content, dict) else None
    return [image for image in images or [] if isinstance(image, dict)]


def metric_entries(content: Any, file: str, metric: dict, classes: Sequence[str]) -> Entries:
    """Check what a CocoMetric reads.

    Raises:
        DataError: Where pycocotools cannot score it.
    """
    entries = Entries(content, file, '', classes, use_of_metric(metric))
    raise_first(entries, file)
    return entries


def supply(metric: Any, classes: Sequence[str]) -> None:
    """Check what a built CocoMetric has read, and add what pycocotools needs.

    Args:
        metric: Of any kind; others are left alone.
        classes: Names of the classes that are scored.

    Raises:
        DataError: Where pycocotools cannot score it.
    """
    coco: Any = getattr(metric, '_coco_api', None)
    if type(coco).__name__ != 'COCO' or metric.format_only:
        return
    use = Use(scored=True, scored_masks='segm' in metric.metrics)
    entries = Entries(coco.dataset, "the evaluator's ann_file", '', classes, use)
    raise_first(entries, "the evaluator's ann_file")
    content = entries.content or {}
    annotations = content['annotations']
    if not all(is_scored_id(entry['id']) for entry in annotations):
        for number, entry in enumerate(annotations, 1):
            entry['id'] = number
    metric._coco_api = indexed(type(coco), content)
