"""Checks that config, model and annotation files agree."""

from __future__ import annotations

import difflib
import json
import logging
import mmap
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS, init_default_scope

from pvt_mm.config import datasets, iter_dicts, type_name
from pvt_mm.datasets.ignore_index import segmentor_heads
from pvt_mm.errors import UserError

_UNREADABLE = (LookupError, TypeError, ValueError, OSError, RecursionError)


def check_data(cfg: Config, loaders: Sequence[str]) -> None:
    """Check that the annotations and image folders of a config's data sets exist.

    Raises:
        UserError: Naming what is missing, where it is expected and how to give another place.
    """
    for data in datasets(cfg, loaders):
        root = Path(data.get('data_root') or '')
        prefix = data.get('data_prefix') or {}
        folders = [prefix] if isinstance(prefix, str) else prefix.values()
        places = [data.get('ann_file'), data.get('split'), *folders]
        for place in places:
            # URLs and other storage are not checked.
            if (
                not isinstance(place, str)
                or not place
                or '://' in f'{data.get("data_root")}{place}'
            ):
                continue
            if not (root / place).exists():
                raise UserError(
                    f'The data set is expected at {root}, but {root / place} is missing; put the '
                    'data (or a link to it) there, or give its place with --data-root DIR.'
                )


# Classes


def check_classes(cfg: Config, config: str, loaders: Sequence[str]) -> None:
    """Check that model, data set and annotations have the same classes.

    Args:
        cfg: Config of a detector or segmentor.
        config: Its path, for messages.
        loaders: Those whose data sets are checked.

    Raises:
        UserError: Naming what to write instead.
    """
    init_default_scope(cfg.default_scope)
    model = cfg.model.get('module', cfg.model)  # out of the wrapper of test-time augmentation
    heads = dict(_num_classes(model, 'model'))
    _check_one_class(cfg, config)
    for loader in loaders:
        for data in datasets(cfg, [loader]):
            _check_metainfo(data.get('metainfo'), config, loader)
            try:
                dataset = DATASETS.build(dict(data, lazy_init=True, pipeline=[]))
            except ValueError as error:
                reason = str(error)
                if 'palette does not match' in reason:  # and then the whole metainfo
                    reason = 'palette and classes differ in length; write metainfo=dict(palette=[])'
                raise UserError(f'The data set of {loader} in {config}: {reason}.') from error
            except Exception:  # the Runner will raise it again
                continue
            if not _is_of(dataset, 'BaseDetDataset', 'BaseSegDataset'):  # videos, for one
                continue
            classes = dataset.metainfo.get('classes')
            if isinstance(classes, str):
                raise UserError(
                    f'The classes of {loader} in {config} are one text; write '
                    f"metainfo=dict(classes=('{classes}',)), with a comma."
                )
            if not classes and _is_of(dataset, 'BaseSegDataset'):
                raise UserError(
                    f'The data set of {loader} in {config} has no classes; write '
                    'metainfo=dict(classes=(...)), in the order of the labels.'
                )
            _check_reduced(data.get('pipeline'), dataset, config, loader)
            # Panoptic heads have classes of their own for things and for stuff.
            if classes and 'thing_classes' not in dataset.metainfo:
                _check_heads(heads, classes, config, loader)
            _check_given_once(classes or (), config, loader)
            if is_coco(dataset) and os.path.isfile(dataset.ann_file):
                found = categories(dataset.ann_file)
                _check_twice(classes, found, dataset.ann_file)
                names = [category['name'] for category in found]
                _check_names(classes, names, dataset.ann_file, config, loader)


def with_inner(dataset: Any) -> Iterator[Any]:
    """Yield a data set and those inside it."""
    for inner in [getattr(dataset, 'dataset', None), *getattr(dataset, 'datasets', [])]:
        if inner is not None:
            yield from with_inner(inner)
    yield dataset


def is_coco(dataset: Any) -> bool:
    """Tell whether a data set reads COCO's format as mmdet's CocoDataset does."""
    methods = ('load_data_list', 'parse_data_info')
    return any(
        kind.__name__ == 'CocoDataset'
        and all(getattr(type(dataset), name) is getattr(kind, name) for name in methods)
        for kind in type(dataset).__mro__
    )


def _check_one_class(cfg: Config, config: str) -> None:
    """Refuse a softmax over one class: its loss is 0 whatever the model says."""
    for key, head in segmentor_heads(cfg):
        losses = head.get('loss_decode') or []
        for loss in losses if isinstance(losses, (list, tuple)) else [losses]:
            softmax = type_name(loss) == 'CrossEntropyLoss' and not loss.get('use_sigmoid')
            if head.get('num_classes') == 1 and softmax:
                raise UserError(
                    f'{config} has {key}.num_classes=1, and a softmax over one class learns '
                    'nothing; give the rest of the image a class too, such as '
                    "classes=('background', ...) with num_classes=2."
                )


def _check_reduced(pipeline: Any, dataset: Any, config: str, loader: str) -> None:
    """Compare ``reduce_zero_label`` of a data set of mmseg and of its loading transforms.

    Raises:
        UserError: Where they differ.
    """
    reduced = getattr(dataset, 'reduce_zero_label', None)
    for step in iter_dicts(pipeline):
        value = step.get('reduce_zero_label')
        if None not in (reduced, value) and value != reduced:
            raise UserError(
                f'The data set of {loader} in {config} has reduce_zero_label={reduced}, and its '
                f'{type_name(step)} has {value}; set both the same.'
            )


def _check_metainfo(metainfo: Any, config: str, loader: str) -> None:
    """Refuse a key that stands for another: a data set ignores keys that it does not know.

    Raises:
        UserError: Naming both.
    """
    known = ('classes', 'palette')
    for key in metainfo if isinstance(metainfo, dict) else ():
        meant = difflib.get_close_matches(str(key).lower(), known, n=1, cutoff=0.75)
        if meant and str(key).endswith('_classes'):  # things and stuff, of panoptic data sets
            continue
        if meant and key not in known and meant[0] not in metainfo:
            raise UserError(
                f'The metainfo of {loader} in {config} has {key}, which nothing reads; write '
                f'{meant[0]}.'
            )


def _is_of(dataset: Any, *names: str) -> bool:
    """Tell whether a data set has one of these classes, without importing their codebase."""
    return any(kind.__name__ in names for kind in type(dataset).__mro__)


def _num_classes(node: Any, path: str) -> Iterator[tuple[str, int]]:
    """Yield the keys, as in ``--cfg-options``, and values of the heads' numbers of classes."""
    if isinstance(node, dict) and node.get('type') != 'STDCHead':  # it learns edges
        for key, value in node.items():
            # The classes of these are others: objectness, stuff, ImageNet.
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


def _check_given_once(classes: Sequence[str], config: str, loader: str) -> None:
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        raise UserError(
            f'The classes of {loader} in {config} name {_listed(twice)} more than once; each is '
            'named once.'
        )


def _check_twice(classes: Sequence[str], found: list[dict], file: str) -> None:
    """Refuse two categories of one name, or with one id: mmdet gives each a label of its own."""
    for key, what in (('id', 'with the id'), ('name', 'of the name')):
        for value, count in Counter(category[key] for category in found).items():
            twins = [category for category in found if category[key] == value]
            if count < 2 or not any(category['name'] in classes for category in twins):
                continue
            objects = _objects(file)
            each = ', '.join(
                f'id {category["id"]} {category["name"]!r} ({objects[category["id"]]} objects)'
                for category in twins
            )
            raise UserError(
                f'{file} has {count} categories {what} {value!r}: {each}; {_way_out(key, twins)}'
            )


def _way_out(key: str, twins: list[dict]) -> str:
    if twins[0]['id'] == twins[1]['id'] and twins[0]['name'] == twins[1]['name']:
        return 'remove one of the two entries.'
    if key == 'id':
        return 'give each an id of its own, also in the category_id of its objects.'
    keep, *others = [category['id'] for category in twins]
    gone = ', '.join(map(str, others))
    return f'write category_id {keep} in all their objects, and remove category {gone}.'


def _objects(file: str) -> Counter:
    """Count the objects of each category id in a file; none in a file that is not COCO's."""
    try:
        with open(file, encoding='utf-8') as stream:
            return Counter(entry['category_id'] for entry in json.load(stream)['annotations'])
    except _UNREADABLE:
        return Counter()


def order_problem(classes: Sequence[str], names: Sequence[str]) -> str:
    """Return how a file's categories differ from the classes; '' where labels get their names."""
    # mmdet numbers labels in the order of the file, and skips classes that it does not find.
    if [name for name in names if name in classes] == list(classes):
        return ''
    missing = [name for name in classes if name not in names]
    return f'no category {_listed(missing)}' if missing else 'its categories in another order'


def _check_names(
    classes: Sequence[str], names: list[str], file: str, config: str, loader: str
) -> None:
    problem = order_problem(classes, names)
    if problem:
        raise UserError(
            f'{file} has {problem}, against the classes of {loader} in {config}, so that labels '
            f'would get wrong names; write metainfo=dict(classes={tuple(names)!r}) in that data '
            f'set and num_classes={len(names)} in the heads.'
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
    return ', '.join(map(str, names[:5])) + (', ...' if len(names) > 5 else '')


def category_names(file: str) -> list[str]:
    """Return the names of the categories in a COCO annotation file, in its order.

    Raises:
        UserError: Where it holds none.
    """
    return [category['name'] for category in categories(file)]


def categories(file: str) -> list[dict]:
    """Return the categories in a COCO annotation file, each with a name and an id.

    Raises:
        UserError: Where it holds none.
    """
    try:
        return _valid(_categories_alone(file))
    except _UNREADABLE:
        pass  # they are elsewhere in the file, or missing
    try:
        with open(file, encoding='utf-8') as stream:
            return _valid(json.load(stream)['categories'])
    except _UNREADABLE as error:
        raise UserError(
            f'{file} is no annotation file of COCO with categories ({type(error).__name__}: '
            f'{error}).'
        ) from error


def _valid(found: Any) -> list[dict]:
    """Return categories of which each has a name that is text and an id."""
    for category in found:
        if not isinstance(category['name'], str) or not isinstance(category['id'], (int, str)):
            raise TypeError(f'a category has the name {category["name"]} and id {category["id"]}')
    return list(found)


def _categories_alone(file: str) -> Any:
    """Read only the list of categories: COCO's whole file takes 10 seconds and 3 GB."""
    with open(file, 'rb') as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = re.search(rb'"categories"\s*:\s*(?=\[)', data)
        window = data[found.end() : found.end() + 2**20] if found else b''
    return json.JSONDecoder().raw_decode(window.decode('utf-8', 'ignore'))[0]
