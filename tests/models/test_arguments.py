"""Arguments and names of other PVTs: each is translated, and no value ends in a traceback."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import MODELS
from reference import SMALL

from pvt_mm.archs import PVT_ARCHS, PVT_V2_ARCHS
from pvt_mm.errors import ArchError, ArgumentError, UserError
from pvt_mm.models import PVT, PVTv2
from pvt_mm.models.arguments import ARCHS, argument_names, find_arch, find_type

KINDS = {'PVT': PVT, 'PVTv2': PVTv2}
EVERY_ARCH = [(kind, name) for kind, archs in ARCHS.items() for name in archs]
#: What each implementation calls the dims, depths, heads, mlp_ratios and sr_ratios.
DIALECTS = {
    'authors': ('embed_dims', 'depths', 'num_heads', 'mlp_ratios', 'sr_ratios'),
    'mmdet': ('embed_dims', 'num_layers', 'num_heads', 'mlp_ratios', 'sr_ratios'),
    'Hugging Face': (
        'hidden_sizes', 'depths', 'num_attention_heads', 'mlp_ratios', 'sequence_reduction_ratios',
    ),
}  # fmt: skip


def in_dialect(dialect, arch):
    """The arguments that describe an arch, as an implementation names them."""
    values = [list(arch[key]) for key in ('dims', 'depths', 'num_heads', 'mlp_ratios', 'sr_ratios')]
    if dialect == 'mmdet':
        values[0] = arch['dims'][0] // arch['num_heads'][0]  # the width of a head
    linear = {'linear': True} if arch.get('linear') else {}
    return dict(zip(DIALECTS[dialect], values, strict=True)) | linear


@pytest.mark.parametrize(('kind', 'name'), EVERY_ARCH)
@pytest.mark.parametrize('dialect', DIALECTS)
def test_every_arch_is_recognised_in_every_dialect(dialect, kind, name):
    """What another implementation is given for a published arch is its name here."""
    theirs = in_dialect(dialect, ARCHS[kind][name])
    assert find_arch(kind, theirs) == name
    with pytest.raises(ArgumentError, match=f'write arch={name!r} for '):
        KINDS[kind](**{key: v for key, v in theirs.items() if key not in argument_names(PVT)})


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    depths=st.tuples(*[st.integers(1, 9)] * 4),
    width=st.integers(1, 64),
    dialect=st.sampled_from(list(DIALECTS)),
)
def test_an_own_arch_is_translated_whole(kind, depths, width, dialect):
    """The dict that comes out describes the same stages, published or not."""
    base = PVT_ARCHS['small'] if kind == 'PVT' else PVT_V2_ARCHS['b2']
    heads = base['num_heads']
    arch = {**base, 'depths': depths, 'dims': tuple(width * number for number in heads)}
    found = find_arch(kind, in_dialect(dialect, arch))
    assert (ARCHS[kind][found] if isinstance(found, str) else found) == arch


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            dict(embed_dims=64, num_layers=[3, 4, 6, 3], in_chans=3, norm_cfg=dict(type='LN')),
            "PVTv2 has no embed_dims, num_layers, in_chans and norm_cfg: write arch='b2' for "
            'embed_dims and num_layers, in_channels=3 for in_chans; leave out norm_cfg, which need '
            'no setting here.',
        ),
        (dict(img_size=512), 'PVTv2 has no img_size: write pretrain_img_size=512 for img_size.'),
        (
            dict(pretrained='pvt.pth'),
            'PVTv2 has no pretrained: write '
            "init_cfg=dict(type='Pretrained', checkpoint='pvt.pth') for pretrained.",
        ),
        (dict(out_indicies=(1,)), 'write out_indices=(1,) for out_indicies.'),
        (dict(embed_dims=7, num_heads=3), 'write arch=dict(dims=..., depths=..., num_heads=..., '),
        (
            dict(depth=50, num_stages=4, norm_eval=True),
            'PVTv2 has no depth, num_stages and norm_eval: these are left from the ResNet of a '
            "base config; write backbone=dict(_delete_=True, type='PVTv2', ...), which removes "
            'them.',
        ),
        (dict(window_size=7), 'left from the Swin Transformer of a base config'),
        (dict(colour='red'), 'leave out colour; it has arch, in_channels,'),
    ],
)  # fmt: skip
def test_each_key_is_translated(arguments, message):
    """One sentence names every key, and what to write for it."""
    with pytest.raises(ArgumentError, match=re.escape(message)) as caught:
        PVTv2(**arguments)
    assert isinstance(caught.value, UserError) and isinstance(caught.value, TypeError)
    with pytest.raises(ArgumentError, match=re.escape(message)):  # as a config builds it
        MODELS.build(dict(type='PVTv2', **arguments))


@pytest.mark.parametrize(
    ('init_cfg', 'file'),
    [
        (dict(checkpoint='pvt.pth'), "'pvt.pth'"),
        ('pvt.pth', "'pvt.pth'"),
        (dict(type='Pretrained'), 'FILE'),
        (dict(type='Pretrained', checkpoint=None), 'FILE'),
        ([dict(type='Kaiming', layer='Conv2d'), dict(checkpoint='pvt.pth')], "'pvt.pth'"),
    ],
)
def test_what_initialises_is_named(init_cfg, file):
    """mmengine would end in a KeyError, or take nothing and say nothing."""
    with pytest.raises(ArchError, match=re.escape(f"(type='Pretrained', checkpoint={file})")):
        PVT(SMALL, init_cfg=init_cfg)


def test_initialisations_of_mmengine_are_taken():
    """Lists, and other types than Pretrained."""
    PVT(SMALL, init_cfg=[dict(type='Kaiming', layer='Conv2d'), dict(type='Constant', val=1)])


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-1, 4), max_size=4),
    st.dictionaries(st.sampled_from(('dims', 'depths', 'x')), st.integers(), max_size=2),
)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    key=st.sampled_from([*argument_names(PVT), 'colour']),
    value=JUNK,
)
def test_no_value_ends_in_a_traceback(kind, key, value):
    """An argument is taken, or refused by an error that the tools print as one sentence."""
    if key in ('with_cp', 'allow_partial', 'with_cls_token'):  # anything is true or false
        return
    try:
        KINDS[kind](**{'arch': SMALL, key: value})
    except (ArchError, ArgumentError) as error:
        assert str(error).endswith('.')


@settings(max_examples=50, deadline=None)
@given(key=st.sampled_from(list(SMALL)), value=JUNK | st.lists(JUNK, min_size=4, max_size=4))
def test_no_value_of_an_arch_ends_in_a_traceback(key, value):
    """The same inside of an own arch."""
    try:
        PVT({**SMALL, key: value})
    except ArchError as error:
        assert str(error).endswith('.')


@pytest.mark.parametrize(
    ('name', 'known'),
    [
        ('pvt_v2_b2', dict(type='PVTv2', arch='b2')),
        ('pvt_v2_b2_li', dict(type='PVTv2', arch='b2_li')),
        ('pvt_v2_b2_linear', dict(type='PVTv2', arch='b2_li')),
        ('pvt_tiny', dict(type='PVT', arch='tiny')),
        ('PvtV2Backbone', dict(type='PVTv2')),
        ('PvtModel', dict(type='PVT')),
        ('mmdet.PyramidVisionTransformerV2', dict(type='PVTv2')),
        ('PVTV2', dict(type='PVTv2')),
        ('pvt_b2', None),
        ('pvt_huge', None),
        ('ResNet', None),
    ],
)
def test_types_of_others(name, known):
    """timm's, the authors', Hugging Face's and mmdet's names are known; others are not guessed."""
    assert find_type(name) == known
