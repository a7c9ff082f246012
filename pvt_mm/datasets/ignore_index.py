"""The label that a segmentor ignores: the same for heads, evaluators, padding and data sets."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from mmengine.config import Config
from mmengine.logging import print_log

from pvt_mm.config import datasets, evaluators, type_name
from pvt_mm.errors import UserError

#: mmseg's label of a pixel that belongs to no class, where the config does not say another.
IGNORED = 255
_EVALUATORS = ('IoUMetric', 'CityscapesMetric')


def ignored_label(cfg: Config) -> int | None:
    """Return the label that the heads of a config ignore; None where they ignore none."""
    for _, head in segmentor_heads(cfg):
        return head.get('ignore_index', IGNORED)
    return IGNORED


def segmentor_heads(cfg: Config) -> Iterator[tuple[str, dict]]:
    """Yield the heads of a segmentor, by their keys in the config."""
    model = cfg.model.get('module', cfg.model)  # out of the wrapper of test-time augmentation
    for name in ('decode_head', 'auxiliary_head'):
        node = model.get(name)
        if isinstance(node, dict):
            yield f'model.{name}', node
        elif isinstance(node, (list, tuple)):
            yield from ((f'model.{name}.{i}', head) for i, head in enumerate(node))


def match_ignored(cfg: Config, config: str, loaders: Sequence[str]) -> None:
    """Have padding ignored as the heads ignore labels, and compare heads, evaluators and data sets.

    mmseg pads label maps with 255, whatever the heads ignore.

    Args:
        cfg: A config; that of a segmentor gets another ``seg_pad_val``.
        config: Its path, for messages.
        loaders: Those that are used.

    Raises:
        UserError: Where they disagree, with what to set.
    """
    heads = list(segmentor_heads(cfg))
    if cfg.get('default_scope') != 'mmseg' or not heads:
        return
    label = ignored_label(cfg)
    for key, head in heads[1:]:
        if head.get('ignore_index', IGNORED) != label:
            _refuse(config, f'{heads[0][0]}.ignore_index={label}', f'{key}.ignore_index', label)
    for loader in loaders:
        _compare_evaluators(cfg, config, loader, label, heads[0][1].get('num_classes') or 0)
        for data in datasets(cfg, [loader]):
            if label != IGNORED and data.get('reduce_zero_label'):
                what = f'reduce_zero_label=True in {loader}, which turns 0 into {IGNORED}'
                _refuse(config, what, f'{heads[0][0]}.ignore_index', IGNORED)
    padding = cfg.model.get('module', cfg.model).get('data_preprocessor')
    if label is not None and padding and padding.get('seg_pad_val', IGNORED) == IGNORED:
        padding['seg_pad_val'] = label


def _compare_evaluators(
    cfg: Config, config: str, loader: str, label: int | None, num_classes: int
) -> None:
    if label is None or label < num_classes:  # a class is learnt or scored, as the user likes
        return
    name = loader.replace('dataloader', 'evaluator')
    for evaluator in evaluators(cfg, loader):
        value = evaluator.get('ignore_index', IGNORED)
        if type_name(evaluator) not in _EVALUATORS or value == label:
            continue
        if value >= num_classes:
            _refuse(config, f'ignore_index={label} in the heads', f'{name}.ignore_index', label)
        print_log(
            f'{config} has {name}.ignore_index={value}, a class, and the heads ignore {label}: '
            f'pixels of {label} count as errors in the score.',
            logger='current',
            level=logging.WARNING,
        )


def _refuse(config: str, what: str, key: str, value: int | None) -> None:
    raise UserError(
        f'{config} has {what}; set {key}={value} too, in the config or by --cfg-options.'
    )
