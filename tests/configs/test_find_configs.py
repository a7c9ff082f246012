"""Configs are found by path and by name, and what is not there brings the nearest names."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import REPO

import pvt_mm
from pvt_mm.config import config_folder, config_names, find_config, iter_dicts, nearest, read_config
from pvt_mm.errors import UserError

FASTER = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
LEAF = 'retinanet_pvt_s_fpn_1x_coco.py'
NESTS = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        (FASTER[:-3] + 'o.py', f'did you mean {FASTER}'),
        ('mmdet::faster_rcnn_r50_fpn_1x_coco.py', FASTER),
        ('mmdet::faster-rcnn_r50_fpn_1x', FASTER),
        (f'pvt_mm::{LEAF}', f'did you mean pvt_mm::pvt/{LEAF}'),
        ('mmseg::?', 'There is no config mmseg::?; see '),
        ('nowhere::a.py', 'choose mmdet or mmseg'),
        ('../a::a.py', 'No installed package ../a carries configs'),
        ('retinanet_pvt_s_1x', LEAF),
        ('???.py', 'There is no config ???.py; check the path.'),
    ],
)
def test_unknown_config(name, message):
    """Everything that takes a config asks for the nearest in place of one that is not there."""
    with pytest.raises(UserError, match=re.escape(message)):
        pvt_mm.swap_backbone(name, dict(type='PVT'))


@pytest.mark.parametrize('name', [FASTER, f'pvt_mm::pvt/{LEAF}', REPO / 'configs' / LEAF])
def test_known_config(name):
    assert read_config(name, import_custom_modules=False).model.backbone


def test_all_shipped_names_are_found():
    """Links are followed, bases left out, and each name leads to its file."""
    for package in ('mmdet', 'pvt_mm'):
        names = config_names(config_folder(package))
        assert len(names) > 50
        assert not [name for name in names if '_base_' in name]
        assert all(find_config(f'{package}::{name}').is_file() for name in names)


def test_nearest():
    """The likest comes first, of equals the shortest; the beginning of a name is enough."""
    names = ['fpn_pvt_s_ade20k_40k.py', 'fpn_pvt_s.py', 'detr_pvt_s.py', 'fpn_pvt_t.py']
    assert nearest('fpn_pvt_s', names) == (
        'did you mean fpn_pvt_s.py or fpn_pvt_s_ade20k_40k.py or fpn_pvt_t.py?'
    )
    assert nearest('zzz', names) == ''


@given(NESTS)
def test_dicts_of_a_nest(nest):
    """Every dict is given once, parents first, also where a part stands in two places."""

    def count(node):
        children = node.values() if isinstance(node, dict) else node
        below = sum(map(count, children)) if isinstance(node, (dict, list, tuple)) else 0
        return below + isinstance(node, dict)

    found = list(iter_dicts(nest))
    assert len(found) == count(nest)
    assert list(iter_dicts([nest, (nest,)])) == found
    assert list(iter_dicts(dict(part=nest)))[1:] == found
