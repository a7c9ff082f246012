"""The leaf configs, read once, and what the reference publishes of them."""

import functools
import re
from unittest import mock

import mmengine.config.utils
from mmengine.config import Config
from reference import REPO, load_json

CONFIGS = REPO / 'configs'
LEAVES = sorted(path.name for path in CONFIGS.glob('*.py') if not path.name.startswith('demo_'))
CLASSIFIERS = [name for name in LEAVES if name.endswith('_in1k.py')]  # see test_classification.py
PUBLISHED = load_json('published.json')

V1 = dict(t='tiny', s='small', m='medium', l='large')
V2 = ('b0', 'b1', 'b2', 'b2_li', 'b3', 'b4', 'b5')

# For each `mmdet::` base mmengine parses every metafile of mmdet: most of a config's loading time.
read_metafile = functools.cache(mmengine.config.utils.load)


@functools.cache
def load(name):
    """A config, read once for the whole file."""
    with mock.patch('mmengine.config.utils.load', read_metafile):
        return Config.fromfile(CONFIGS / name)


def parts_of(name):
    """`('mask_rcnn', 'PVTv2', 'b2_li')` of a leaf's file name; a classifier has no head's."""
    pattern = r'(?:(\w+?)_)?(pvt|pvt_v2|pvtv2)_([tsml]|b\d(?:_li)?)_'
    head, kind, arch = re.match(pattern, name).groups()
    return head, 'PVT' if kind == 'pvt' else 'PVTv2', V1.get(arch, arch)


def published_figures(name):
    """The scores that the reference publishes for a leaf, if any."""
    head, _, arch = parts_of(name)
    if name in CLASSIFIERS:
        figures = PUBLISHED['imagenet_top1'][arch]
    elif '_3x_' in name:
        figures = PUBLISHED['three_x_box_ap'].get(f'{head}_{arch}', [])
    elif '_40k' in name and head == 'fpn':
        figures = PUBLISHED['semantic_fpn_40k_miou'].get(arch, [])
    else:
        table = dict(
            retinanet='retinanet_1x_box_ap',
            mask_rcnn='mask_rcnn_1x_box_mask_ap',
            detr='detr_50ep_box_ap',
        ).get(head)
        figures = PUBLISHED.get(table, {}).get(arch + '_640' * name.endswith('_640.py'), [])
    if isinstance(figures, dict):
        figures = figures['code']
    return figures if isinstance(figures, list) else [figures]
