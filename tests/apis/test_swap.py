"""swap_backbone maps what hangs on the backbone, refuses the rest, and writes what loads again."""

import copy
import functools
import importlib
import re

import mmdet.models.necks
import mmengine.dataset
import pytest
import torch
from conftest import load_tool
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import FUNCTIONS, DefaultScope
from reference import REPO

import pvt_mm
from pvt_mm import requirements
from pvt_mm.apis import swap
from pvt_mm.apis.swap import Refusal, SwapRefusedError
from pvt_mm.config import read_config
from pvt_mm.errors import UserError

SMALL = dict(type='PVT', arch='small')
B0 = dict(type='PVTv2', arch='b0')
FASTER = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
RETINA = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
DILATED = 'mmseg::deeplabv3/deeplabv3_r50-d8_4xb4-80k_ade20k-512x512.py'
ADAM_1E4 = dict(type='AdamW', lr=1e-4, weight_decay=1e-4)
WHOLE_PATCHES = dict(size_divisor=32)


@functools.cache
def original(name):
    """A config of mmdet or mmseg, read once."""
    return read_config(name, import_custom_modules=False)


def swapped(name, backbone=SMALL, **options):
    """The swapped config and the changes."""
    return swap.swap_with_changes(original(name), backbone, **options)


def value(cfg, path):
    """`cfg.model.neck.0.in_channels` of `model.neck.0.in_channels`; None where it is not there."""
    node = cfg.to_dict()
    for key in path.split('.'):
        if isinstance(node, (list, tuple)):
            node = node[int(key)]
        elif key in node:
            node = node[key]
        else:
            return None
    return node


# What is mapped: PVT-Small has 64, 128, 320 and 512 channels. None is a key that must be gone.
MAPPINGS = {
    FASTER: {
        'model.neck.in_channels': [64, 128, 320, 512],
        'model.backbone.out_indices': None,
        'model.backbone.norm_eval': None,
        'model.rpn_head.in_channels': 256,
        'optim_wrapper.optimizer': dict(type='AdamW', lr=2e-4, weight_decay=1e-4),
        'custom_imports.imports': ['pvt_mm'],
        'custom_hooks': [dict(type='PVTCheckpointHook')],
    },
    RETINA: {
        'model.neck.in_channels': [64, 128, 320, 512],
        'model.neck.start_level': 1,
        'optim_wrapper.optimizer': ADAM_1E4,
    },
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50-caffe_fpn_1x_coco.py': {
        'model.neck.in_channels': [64, 128, 320, 512],
        'model.data_preprocessor.mean': [123.675, 116.28, 103.53],
        'model.data_preprocessor.std': [58.395, 57.12, 57.375],
        'model.data_preprocessor.bgr_to_rgb': True,
    },
    'mmdet::detr/detr_r50_8xb2-150e_coco.py': {
        'model.backbone.out_indices': (3,),
        'model.neck.in_channels': [512],
        'model.data_preprocessor.pad_size_divisor': 32,
        'optim_wrapper.optimizer': dict(type='AdamW', lr=1e-4, weight_decay=1e-4),
        'optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult': 0.1,
    },
    'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py': {
        'model.backbone.out_indices': (1, 2, 3),
        'model.neck.in_channels': [128, 320, 512],
    },
    'mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py': {
        'model.backbone.embed_dims': None,
        'model.neck.in_channels': [64, 128, 320, 512],
        'model.num_feature_levels': 5,
    },
    'mmdet::pafpn/faster-rcnn_r50_pafpn_1x_coco.py': {
        'model.neck.in_channels': [64, 128, 320, 512],
    },
    'mmdet::nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py': {
        'model.neck.in_channels': [64, 128, 320, 512],
        'model.data_preprocessor.pad_size_divisor': 128,  # a multiple of 32 already
    },
    'mmdet::libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py': {
        'model.neck.0.in_channels': [64, 128, 320, 512],
        'model.neck.1.in_channels': 256,
    },
    'mmdet::yolof/yolof_r50-c5_8xb8-1x_coco.py': {
        'model.backbone.out_indices': (3,),
        'model.neck.in_channels': 512,
    },
    'mmdet::rpn/rpn_r50-caffe-c4_1x_coco.py': {
        'model.backbone.out_indices': (2,),
        'model.rpn_head.in_channels': 320,
        'model.rpn_head.anchor_generator.strides': [16],
    },
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py': {
        'model.panoptic_head.in_channels': [64, 128, 320, 512],
        'model.init_cfg': None,
    },
    'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py': {
        'model.detector.neck.in_channels': [64, 128, 320, 512],
        'model.detector.backbone.type': 'PVT',
        'model.data_preprocessor.data_preprocessor.bgr_to_rgb': True,
        'detector.backbone.type': 'PVT',  # the variable that the model was made from
    },
    'mmdet::deepsort/deepsort_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval.py': {
        'model.detector.neck.in_channels': [64, 128, 320, 512],
        'model.detector.init_cfg': None,
        'model.reid.backbone.out_indices': (3,),
        'model.reid.head.in_channels': 512,
    },
    'mmdet::ld/ld_r18-gflv1-r101_fpn_1x_coco.py': {
        'model.neck.in_channels': [64, 128, 320, 512],
        'model.teacher_config': 'configs/gfl/gfl_r101_fpn_ms-2x_coco.py',
    },
    'mmdet::lad/lad_r50-paa-r101_fpn_2xb8_coco_1x.py': {
        'model.neck.in_channels': [64, 128, 320, 512],
        'model.teacher_backbone.type': 'ResNet',
        'model.teacher_neck.in_channels': [256, 512, 1024, 2048],
    },
    'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py': {
        'model.pretrained': None,
        'model.neck.in_channels': [64, 128, 320, 512],
        'model.decode_head.in_channels': [256, 256, 256, 256],
        'model.data_preprocessor.test_cfg': WHOLE_PATCHES,
        'data_preprocessor.test_cfg': WHOLE_PATCHES,
        'optim_wrapper.optimizer': ADAM_1E4,
        'param_scheduler.0.eta_min': 1e-6,
    },
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py': {
        'model.decode_head.in_channels': [64, 128, 320, 512],
        'model.auxiliary_head.in_channels': 320,
        'optim_wrapper.optimizer.lr': 6e-5,
        'param_scheduler.0.type': 'LinearLR',
    },
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py': {
        'model.decode_head.in_channels': [64, 128, 320, 512],
        'model.backbone.num_heads': None,
    },
    'mmseg::hrnet/fcn_hr18_4xb2-40k_cityscapes-512x1024.py': {
        'model.decode_head.in_channels': [64, 128, 320, 512],
        'model.decode_head.channels': 1024,
    },
    'mmseg::fastfcn/fastfcn_r50-d32_jpu_enc_4xb4-80k_ade20k-512x512.py': {
        'model.backbone.out_indices': (1, 2, 3),
        'model.neck.in_channels': (128, 320, 512),
        'model.decode_head.in_channels': [128, 320, 2048],  # the last is what the neck makes
        'model.auxiliary_head.in_channels': 320,
    },
}


@pytest.mark.parametrize('name', MAPPINGS)
def test_mapping(name):
    """What stood on the old backbone's channels stands on PVT's; the rest stays."""
    cfg = swapped(name).cfg
    assert {path: value(cfg, path) for path in MAPPINGS[name]} == MAPPINGS[name]


@settings(max_examples=25, deadline=None)
@given(
    stages=st.sets(st.sampled_from(swap.ALL_STAGES), min_size=1).map(sorted),
    depth=st.sampled_from((18, 34, 50, 101)),
    base_channels=st.sampled_from((16, 64)),
    wrong=st.booleans(),
    data=st.data(),
)
def test_heads_follow_any_levels(stages, depth, base_channels, wrong, data):
    """Whatever stages a ResNet returns, PVT returns them, and heads take their channels."""
    widths = [base_channels * 2**i * (1 if depth < 50 else 4) for i in stages]
    index = data.draw(st.integers(-len(stages), len(stages) - 1))
    model = dict(
        type='EncoderDecoder',
        backbone=dict(type='ResNet', depth=depth, base_channels=base_channels, out_indices=stages),
        decode_head=dict(type='UPerHead', in_index=list(range(len(stages))), in_channels=widths),
        auxiliary_head=dict(type='FCNHead', in_index=index, in_channels=widths[index] + wrong),
    )
    if wrong:
        with pytest.raises(SwapRefusedError) as caught:
            swap.swap_with_changes(Config(dict(model=model)), B0)
        assert caught.value.reason is Refusal.CHANNELS
        return
    after = pvt_mm.swap_backbone(Config(dict(model=model)), B0).model
    dims = [(32, 64, 160, 256)[i] for i in stages]
    assert list(after.backbone.get('out_indices', swap.ALL_STAGES)) == stages
    assert after.decode_head.in_channels == dims
    assert after.auxiliary_head.in_channels == dims[index]


def test_backbone_is_the_published_one():
    """A named arch gets the drop path rate and the weights of the bundled configs."""
    file = REPO / 'configs' / '_base_' / 'backbones' / 'pvt_v2_b2_li.py'
    cfg = swapped(FASTER, dict(type='PVTv2', arch='b2_li')).cfg
    assert cfg.model.backbone == Config.fromfile(file).backbone


@pytest.mark.parametrize('kind', swap.ARCHS)
def test_every_arch_has_its_weights(kind):
    for arch, published in swap.ARCHS[kind].items():
        backbone, dims = swap.make_backbone(dict(type=kind, arch=arch))
        assert backbone['init_cfg']['checkpoint'].startswith('https://')
        assert (backbone['type'], backbone['arch'], dims) == (kind, arch, published['dims'])


def test_own_arguments_of_the_backbone_win():
    """Arguments that are given replace the published ones; an own arch has no weights."""
    cfg = swapped(FASTER, dict(type=pvt_mm.PVT, drop_path_rate=0.3, init_cfg=None)).cfg
    assert cfg.model.backbone.type == 'PVT'
    assert (cfg.model.backbone.arch, cfg.model.backbone.drop_path_rate) == ('small', 0.3)
    assert cfg.model.backbone.init_cfg is None
    arch = dict(
        dims=(8, 16, 24, 32),
        depths=(1,) * 4,
        num_heads=(1,) * 4,
        mlp_ratios=(2,) * 4,
        sr_ratios=(8, 4, 2, 1),
    )
    cfg = swapped(FASTER, dict(type='PVT', arch=arch)).cfg
    assert cfg.model.neck.in_channels == [8, 16, 24, 32]
    assert 'init_cfg' not in cfg.model.backbone


def test_the_given_config_stays_as_it_is():
    cfg = copy.deepcopy(original(FASTER))
    pvt_mm.swap_backbone(cfg, SMALL)
    assert cfg.to_dict() == original(FASTER).to_dict()


def test_schedule_and_clipping_stay():
    """AdamW replaces SGD alone: warm-up, steps, clipping and precision stay."""
    cfg = copy.deepcopy(original(RETINA))
    cfg.optim_wrapper.update(type='AmpOptimWrapper', clip_grad=dict(max_norm=35))
    after = pvt_mm.swap_backbone(cfg, SMALL)
    assert after.param_scheduler == cfg.param_scheduler
    assert after.optim_wrapper == dict(cfg.optim_wrapper, optimizer=ADAM_1E4)


def test_the_variable_of_the_optimizer_follows():
    """mmseg's schedules make the optimiser from a variable, which the written file still shows."""
    cfg = swapped(DILATED, allow_stride_change=True).cfg
    assert original(DILATED).optimizer.type == 'SGD'
    assert cfg.optimizer == cfg.optim_wrapper.optimizer == ADAM_1E4


def test_keep_optimizer():
    cfg = swapped(RETINA, keep_optimizer=True).cfg
    assert cfg.optim_wrapper == original(RETINA).optim_wrapper


def test_weights_of_the_whole_model_are_removed():
    cfg = copy.deepcopy(original(FASTER))
    cfg.load_from = 'https://example.org/faster_rcnn_r50.pth'
    after, changes = swap.swap_with_changes(cfg, SMALL)
    assert after.load_from is None
    assert any(change.startswith('load_from: removed') for change in changes)


@pytest.mark.parametrize('imports', ['mmdet.models', ['mmdet.models', 'pvt_mm']])
def test_custom_imports_are_added_to(imports):
    cfg = copy.deepcopy(original(FASTER))
    cfg.custom_imports = dict(imports=imports, allow_failed_imports=True)
    cfg.custom_hooks = [dict(type='CheckInvalidLossHook')]
    after = pvt_mm.swap_backbone(cfg, SMALL)
    assert after.custom_imports == dict(
        imports=['mmdet.models', 'pvt_mm'], allow_failed_imports=True
    )
    assert [hook.type for hook in after.custom_hooks] == [
        'CheckInvalidLossHook',
        'PVTCheckpointHook',
    ]


def test_wrappers_and_scopes():
    """A backbone is found below any wrapper, its type behind a scope or `_scope_`."""
    model = original(RETINA).model.to_dict()
    model['backbone'].update(type='mmdet.ResNet', _scope_='mmdet')
    model['neck']['type'] = 'mmdet.FPN'
    wrapped = dict(type='Any', module=dict(teacher=model, student=copy.deepcopy(model)))
    cfg = swap.swap_with_changes(Config(dict(model=wrapped)), SMALL).cfg
    for part in cfg.model.module.values():
        assert part.neck.in_channels == [64, 128, 320, 512]
        assert part.backbone.type == 'PVT'
        assert '_scope_' not in part.backbone


@pytest.mark.parametrize(('channels', 'mode'), [(1, 'sum'), (4, 'repeat'), (6, 'repeat')])
def test_image_channels_stay(channels, mode):
    """Other image channels stay, their statistics too; weights for RGB are adapted, and said so."""
    cfg = copy.deepcopy(original(RETINA))
    cfg.model.backbone.in_channels = channels
    cfg.model.data_preprocessor.update(mean=[0.0] * channels, std=[1.0] * channels)
    after, changes = swap.swap_with_changes(cfg, SMALL)
    assert after.model.backbone.in_channels == channels
    assert after.model.backbone.adapt_in_channels == mode
    assert after.model.data_preprocessor.mean == [0.0] * channels
    assert f'its weights for RGB are adapted to {channels} image channels ({mode})' in changes
    after = pvt_mm.swap_backbone(cfg, dict(SMALL, init_cfg=None))
    assert 'adapt_in_channels' not in after.model.backbone


def test_new_weights_of_the_same_arch_are_adapted_too():
    """A PVT without weights for four channels gets the published ones, which are for RGB."""
    cfg = copy.deepcopy(swapped(RETINA).cfg)
    cfg.model.backbone.update(init_cfg=None, in_channels=4)
    assert 'adapt_in_channels' not in pvt_mm.swap_backbone(cfg).model.backbone
    init_cfg = dict(type='Pretrained', checkpoint='x')
    after = pvt_mm.swap_backbone(cfg, dict(SMALL, init_cfg=init_cfg))
    assert after.model.backbone.adapt_in_channels == 'repeat'


def test_checkpointing_stays():
    """`with_cp` means the same to every backbone; a drop path rate belongs to an arch."""
    cfg = copy.deepcopy(original('mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py'))
    assert cfg.model.backbone.with_cp
    after, changes = swap.swap_with_changes(cfg, dict(SMALL, drop_path_rate=0.1))
    assert after.model.backbone.with_cp is True
    assert 'its drop_path_rate: 0.2 became 0.1' in changes
    assert pvt_mm.swap_backbone(cfg, dict(SMALL, with_cp=False)).model.backbone.with_cp is False


def test_swap_again():
    """A PVT is itself a backbone that can be swapped, and swapping to the same changes nothing."""
    once = swapped(FASTER).cfg
    twice, changes = swap.swap_with_changes(once, SMALL)
    assert twice.to_dict() == once.to_dict()
    assert not [change for change in changes if not change.startswith('backbone:')]
    assert swap.swap_with_changes(once, B0).cfg.model.neck.in_channels == [32, 64, 160, 256]


# From a PVT: what both have is kept

THEIRS = {
    'mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py': dict(type='PVT', arch='tiny'),
    'mmdet::pvt/retinanet_pvt-s_fpn_1x_coco.py': dict(type='PVT', arch='small'),
    'mmdet::pvt/retinanet_pvt-m_fpn_1x_coco.py': dict(type='PVT', arch='medium'),
    'mmdet::pvt/retinanet_pvt-l_fpn_1x_coco.py': dict(type='PVT', arch='large'),
    **{
        f'mmdet::pvt/retinanet_pvtv2-b{i}_fpn_1x_coco.py': dict(type='PVTv2', arch=f'b{i}')
        for i in range(6)
    },
}


@pytest.mark.parametrize('name', THEIRS)
def test_a_config_moves_from_mmdets_own_pvt(name):
    """Without a backbone, arch, weights and drop path rate stay, and the changes say so."""
    old = original(name).model.backbone
    cfg, changes = swapped(name, None)
    weights = old.init_cfg.checkpoint
    assert cfg.model.backbone == dict(
        **THEIRS[name],
        drop_path_rate=0.1,  # mmdet's default, which its configs do not name
        init_cfg=dict(type='Pretrained', checkpoint=weights),
    )
    assert cfg.model.neck == original(name).model.neck
    depths = ', '.join(map(str, old.num_layers))
    (stays,) = [change for change in changes if change.endswith(f'its weights, {weights}')]
    assert stays.startswith(f'its depths {depths} and widths ')
    assert 'data_preprocessor' not in ''.join(changes), 'its weights expect these statistics'
    assert swapped(name, THEIRS[name]).cfg.model.backbone == cfg.model.backbone
    cfg, changes = swapped(name, dict(THEIRS[name], init_cfg=None))
    assert cfg.model.backbone.init_cfg is None and f'its init_cfg: {weights} became None' in changes
    assert not [change for change in changes if 'stay' in change and weights in change]


def test_what_is_set_in_mmdets_own_pvt_stays():
    """An own arch, levels, image channels, rates, statistics, weights of the backbone and all."""
    cfg = copy.deepcopy(original('mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py'))
    cfg.load_from = 'trained.pth'
    cfg.model.backbone.update(
        num_layers=[1, 2, 3, 1], in_channels=4, with_cp=True, drop_path_rate=0.3, drop_rate=0.2
    )
    cfg.model.data_preprocessor.update(mean=[1.0] * 4, std=[2.0] * 4)
    after = pvt_mm.swap_backbone(cfg)
    backbone = after.model.backbone
    assert backbone.arch == {**swap.ARCHS['PVT']['tiny'], 'depths': (1, 2, 3, 1)}
    assert (backbone.in_channels, backbone.with_cp) == (4, True)
    assert (backbone.drop_path_rate, backbone.drop_rate) == (0.3, 0.2)
    assert 'adapt_in_channels' not in backbone, 'the weights are of four channels'
    assert after.model.data_preprocessor.mean == [1.0] * 4
    assert after.load_from == 'trained.pth'


def test_weights_of_mmdets_own_pvt_fit_what_it_becomes():
    """All weights of a whole model load into the moved config's, which gives the same maps."""
    cfg = copy.deepcopy(original('mmdet::pvt/retinanet_pvtv2-b0_fpn_1x_coco.py'))
    cfg.model.backbone.update(num_layers=[1, 1, 1, 1], embed_dims=8)
    cfg.model.neck.in_channels = [8, 16, 40, 64]
    theirs, ours = build('mmdet', cfg.model), build('mmdet', pvt_mm.swap_backbone(cfg).model)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for own, their in zip(ours.eval().backbone(image), theirs.eval().backbone(image)):
            torch.testing.assert_close(own, their, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ('name', 'own'),
    [
        ('pvt_v2_b2_li', dict(type='PVTv2', arch='b2_li')),
        ('pvt_small', dict(type='PVT', arch='small')),
    ],
)
def test_a_config_moves_from_the_authors_pvt(name, own):
    """Their classes are known by name; mmseg's models hold the weights beside the backbone."""
    model = dict(
        type='EncoderDecoder',
        pretrained='pvt.pth',
        backbone=dict(type=name, style='pytorch'),
        neck=dict(type='FPN', in_channels=[64, 128, 320, 512], out_channels=256),
        decode_head=dict(type='FPNHead', in_channels=[256] * 4),
    )
    for backbone in (None, own):
        cfg, changes = swap.swap_with_changes(Config(dict(model=model)), backbone)
        weights = dict(type='Pretrained', checkpoint='pvt.pth')
        assert cfg.model.backbone == dict(own, drop_path_rate=0.1, init_cfg=weights)
        assert 'pretrained' not in cfg.model
        assert changes[1].endswith('widths 64, 128, 320, 512 stay, and its weights, pvt.pth')
    with pytest.raises(SwapRefusedError, match='The backbone pvt_huge is not known here'):
        model['backbone']['type'] = 'pvt_huge'
        swap.swap_with_changes(Config(dict(model=model)), own)


@pytest.mark.parametrize(
    'change',
    [
        dict(qkv_bias=False),
        dict(use_abs_pos_embed=False),
        dict(norm_cfg=dict(type='BN')),
        dict(strides=[4, 2, 2, 1]),
        dict(num_heads=[3, 2, 5, 8], embed_dims=[64, 128, 320, 512]),
    ],
)
def test_a_pvt_that_is_not_the_published_one_is_not_kept(change):
    """Its weights would not fit; a published arch can take its place."""
    cfg = copy.deepcopy(original('mmdet::pvt/retinanet_pvt-s_fpn_1x_coco.py'))
    cfg.model.backbone.update(change)
    with pytest.raises(SwapRefusedError) as caught:
        pvt_mm.swap_backbone(cfg)
    assert caught.value.reason is Refusal.OTHER_PVT
    if 'embed_dims' not in change and change.get('strides') is None:
        assert pvt_mm.swap_backbone(cfg, B0).model.backbone.arch == 'b0'


def test_own_weights_stay_with_the_same_arch_and_are_named_with_another():
    """Of PVT to PVT; so do the weights of the whole model."""
    cfg = copy.deepcopy(swapped(RETINA).cfg)
    own = dict(type='Pretrained', checkpoint='own.pth')
    cfg.model.backbone.update(init_cfg=own, frozen_stages=2, sr_mode='avg')
    cfg.load_from = 'trained.pth'
    for backbone in (SMALL, None, dict(SMALL, drop_path_rate=0.2)):
        after, changes = swap.swap_with_changes(cfg, backbone)
        assert after.model.backbone.init_cfg == own and after.load_from == 'trained.pth'
        assert (after.model.backbone.frozen_stages, after.model.backbone.sr_mode) == (2, 'avg')
    assert 'its drop_path_rate: 0.1 became 0.2' in changes
    after, changes = swap.swap_with_changes(cfg, B0)
    assert after.model.backbone.frozen_stages == 2 and after.load_from is None
    published = after.model.backbone.init_cfg.checkpoint
    assert f'its init_cfg: own.pth became {published}' in changes
    assert changes[0] == 'backbone: PVT small became PVTv2 b0, without sr_mode'


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(('PVT', 'PVTv2', 'PyramidVisionTransformer', 'SwinTransformer', 'ResNet')),
    backbone=st.sampled_from((SMALL, B0, None)),
    data=st.data(),
)
def test_nothing_of_the_old_backbone_goes_unsaid(name, backbone, data):
    """Whatever the old one has set is kept, or the changes name it."""
    values = dict(
        drop_rate=0.25,
        attn_drop_rate=0.125,
        drop_path_rate=0.375,
        frozen_stages=1,
        with_cp=True,
        pretrain_img_size=384,
        init_cfg=dict(type='Pretrained', checkpoint='own.pth'),
        compute_dtype='bfloat16',
        allow_partial=True,
    )
    ours = ('compute_dtype', 'allow_partial', 'frozen_stages', 'with_cp')
    keys = data.draw(st.sets(st.sampled_from([*values])))
    if name == 'PyramidVisionTransformer':
        keys -= {*ours}
    if name == 'ResNet':
        keys &= {'frozen_stages', 'with_cp', 'init_cfg'}
    old = {key: values[key] for key in keys}
    model = dict(type='EncoderDecoder', backbone=dict(type=name, **old))
    if backbone is None and name in ('SwinTransformer', 'ResNet'):
        with pytest.raises(UserError, match='is no PVT whose arch could be kept'):
            swap.swap_with_changes(Config(dict(model=model)))
        return
    after, changes = swap.swap_with_changes(Config(dict(model=model)), backbone)
    text = ' '.join(changes)
    for key, value in old.items():
        assert after.model.backbone.get(key) == value or key in text


def test_a_preprocessor_beside_the_model_is_set_too():
    """mmengine's Runner gives it to the model."""
    cfg = copy.deepcopy(original('mmdet::cascade_rcnn/cascade-mask-rcnn_r50-caffe_fpn_1x_coco.py'))
    cfg.data_preprocessor = cfg.model.pop('data_preprocessor')
    after = pvt_mm.swap_backbone(cfg, SMALL)
    assert after.data_preprocessor.mean == [123.675, 116.28, 103.53]
    assert after.data_preprocessor.bgr_to_rgb and after.data_preprocessor.pad_size_divisor == 32


# Dilated backbones


def test_dilated_backbone_needs_leave():
    """Levels that get coarser are refused, or on leave swapped, and named among the changes."""
    with pytest.raises(SwapRefusedError, match='--allow-stride-change') as caught:
        swapped(DILATED)
    assert caught.value.reason is Refusal.STRIDE
    cfg, changes = swapped(DILATED, allow_stride_change=True)
    assert 'strides [4, 8, 8, 8] became [4, 8, 16, 32]' in changes
    assert cfg.model.decode_head.in_channels == 512
    assert cfg.model.auxiliary_head.in_channels == 320


def test_two_heads_that_read_one_level():
    """OCR's second head takes the size of the first: with all levels, as on HRNet, it does."""
    cfg = swapped('mmseg::ocrnet/ocrnet_hr18_4xb2-40k_cityscapes-512x1024.py').cfg
    assert [head.in_channels for head in cfg.model.decode_head] == [[64, 128, 320, 512]] * 2
    model = original('mmseg::ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py').model.to_dict()
    model['decode_head'][0].update(in_index=3, in_channels=2048)  # both on the last stage
    cfg = swap.swap_with_changes(Config(dict(model=model)), SMALL, allow_stride_change=True).cfg
    assert [head.in_channels for head in cfg.model.decode_head] == [512, 512]


def test_dilated_head_with_a_low_level():
    name = 'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512.py'
    head = swapped(name, allow_stride_change=True).cfg.model.decode_head
    assert (head.in_channels, head.c1_in_channels) == (512, 64)


def test_heads_straight_on_a_dilated_stage():
    """DC5: RPN and RoI head on the last stage, with the strides of anchors and extractor."""
    name = 'mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py'
    with pytest.raises(SwapRefusedError) as caught:
        swapped(name)
    assert caught.value.reason is Refusal.STRIDE
    model = swapped(name, allow_stride_change=True).cfg.model
    assert model.rpn_head.in_channels == model.roi_head.bbox_head.in_channels == 512
    assert model.rpn_head.anchor_generator.strides == [32]
    assert model.roi_head.bbox_roi_extractor.out_channels == 512
    assert model.roi_head.bbox_roi_extractor.featmap_strides == [32]


# What is refused

REFUSED = {
    'mmdet::faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py': Refusal.SHARED_HEAD,
    'mmdet::detectors/cascade-rcnn_r50-rfp_1x_coco.py': Refusal.DETECTORS,
    'mmdet::yolox/yolox_s_8xb8-300e_coco.py': Refusal.DARKNET,
    'mmdet::tridentnet/tridentnet_r50-caffe_1x_coco.py': Refusal.MULTI_BRANCH,
    'mmdet::ssd/ssd300_coco.py': Refusal.LEVELS,
    'mmdet::rtmdet/rtmdet_l_swin_b_p6_4xb16-100e_coco.py': Refusal.LEVELS,  # five stages
    'mmdet::misc/d2_retinanet_r50-caffe_fpn_ms-90k_coco.py': Refusal.NO_BACKBONE,
    'mmdet::common/ms_3x_coco.py': Refusal.NO_MODEL,
    'mmseg::ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py': Refusal.ONE_SIZE,
    'mmseg::icnet/icnet_r50-d8_4xb2-80k_cityscapes-832x832.py': Refusal.MULTI_BRANCH,
    'mmseg::bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py': Refusal.MULTI_BRANCH,
}


def test_the_page_lists_every_reason():
    page = (REPO / 'docs' / 'swap.md').read_text()
    assert re.findall(r'^\| ([^|]+) \|', page.split('## What is refused')[1], re.M)[1:] == [
        reason.value for reason in Refusal
    ]


def test_the_page_of_the_census():
    """It states the goal as reached, on over 1,000 configs, and knows no reason but ours."""
    page = (REPO / 'docs' / 'swap_census.md').read_text()
    goal = re.search(r'Of the \*\*(\d+)\*\*[^*]*\*\*(\d+)\*\* \(([\d.]+)%\)', page)
    total, done, share = goal.groups()
    assert int(total) > 1000
    assert int(done) / int(total) >= 0.95
    assert float(share) == round(100 * int(done) / int(total), 1)
    assert set(re.findall(r'^\| refused \| ([^|]+) \|', page, re.M)) <= {r.value for r in Refusal}
    assert not re.search(r'^\| failed \|', page, re.M), 'a swap that does not build or run'


@pytest.mark.parametrize('name', REFUSED)
def test_refusal(name):
    with pytest.raises(SwapRefusedError) as caught:
        swapped(name, allow_stride_change=True)
    assert caught.value.reason is REFUSED[name]
    assert str(caught.value).endswith('.')


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (dict(backbone=dict(type='OwnNet')), Refusal.UNKNOWN_BACKBONE),
        (dict(backbone=dict(type='RegNet', arch='regnetx_9gf')), Refusal.UNKNOWN_BACKBONE),
        (dict(backbone=dict(type='ResNet', depth=50, out_indices=(3, 1))), Refusal.LEVELS),
        (dict(neck=dict(type='OwnNeck', in_channels=[256, 512, 1024, 2048])), Refusal.UNKNOWN_NECK),
        (dict(neck=dict(type='FPN', in_channels=[1, 2, 3, 4])), Refusal.CHANNELS),
        (dict(neck=dict(type='FPN', in_channels=[256, 512])), Refusal.CHANNELS),
        (dict(neck=None), Refusal.UNKNOWN_HEAD),
        (
            dict(neck=None, bbox_head=dict(type='FCNHead', in_channels=2048, in_index=4)),
            Refusal.CHANNELS,
        ),
        (
            dict(neck=None, bbox_head=dict(type='FCNHead', in_channels=2048, in_index=2)),
            Refusal.CHANNELS,
        ),
    ],
)
def test_what_is_not_understood_is_refused(change, reason):
    """Nothing is guessed: an unknown part, or channels that do not agree, end in a refusal."""
    model = {**original(RETINA).model.to_dict(), **change}
    with pytest.raises(SwapRefusedError) as caught:
        swap.swap_with_changes(Config(dict(model=model)), SMALL)
    assert caught.value.reason is reason


def test_groups_that_do_not_divide_a_level():
    """A neck with a group norm takes the widths that its groups divide, and no others."""
    name = 'mmdet::rtmdet/rtmdet_l_swin_b_4xb32-100e_coco.py'
    assert swapped(name).cfg.model.neck.in_channels == [128, 320, 512]
    with pytest.raises(SwapRefusedError, match='half of 160 channels in 32 groups') as caught:
        swapped(name, B0)
    assert caught.value.reason is Refusal.CHANNELS


@pytest.mark.parametrize(
    ('backbone', 'message'),
    [
        (dict(type='PVT', arch='huge'), 'choose one of tiny, small, medium, large'),
        (dict(type='PVTv2', arch='b9'), 'b0, b1, b2, b2_li, b3, b4, b5'),
        (dict(type='Swin'), 'choose one of PVT, PVTv2'),
        (dict(type='pvt_v2_b2'), "write type='PVTv2', arch='b2'"),
        (dict(type='PVT', num_layers=[2, 2, 2, 2]), "write arch='tiny' for num_layers"),
        (None, 'ResNet is no PVT whose arch could be kept; name the one to swap in'),
        (dict(type='PVT', out_indices=(3,)), 'Leave out_indices out'),
    ],
)
def test_wrong_backbone(backbone, message):
    with pytest.raises(UserError, match=re.escape(message)):
        swapped(FASTER, backbone)


# What is written

LAZY = """
from mmdet.models.backbones import ResNet
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.dense_heads import RetinaHead
from mmdet.models.detectors import RetinaNet
from mmdet.models.necks import FPN
from torch.optim import SGD

model = dict(
    type=RetinaNet,
    data_preprocessor=dict(
        type=DetDataPreprocessor, mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0],
        bgr_to_rgb=False),
    backbone=dict(type=ResNet, depth=18, frozen_stages=1),
    neck=dict(type=FPN, in_channels=[64, 128, 256, 512], out_channels=16, num_outs=5),
    bbox_head=dict(type=RetinaHead, num_classes=3, in_channels=16, feat_channels=16))
optim_wrapper = dict(optimizer=dict(type=SGD, lr=0.01))
"""


def test_lazy_config(tmp_path):
    """Classes as types are recognised, and written as dotted names that build."""
    file = tmp_path / 'lazy.py'
    file.write_text(LAZY)
    cfg, _ = result = swap.swap_with_changes(file, B0)
    assert cfg.model.neck.in_channels == [32, 64, 160, 256]
    assert cfg.model.data_preprocessor.pad_size_divisor == 32
    assert cfg.model.data_preprocessor.bgr_to_rgb is True
    assert cfg.optim_wrapper.optimizer == ADAM_1E4
    swap.write(result, tmp_path / 'out.py', str(file))
    again = Config.fromfile(tmp_path / 'out.py')
    assert again.to_dict() == cfg.to_dict()
    assert type(build('mmdet', again.model)).__name__ == 'RetinaNet'


def test_classes_and_functions_become_names(tmp_path):
    """A Config made in Python may hold them as types; the written file names them."""
    cfg = copy.deepcopy(original(FASTER))
    cfg.model.neck.type = mmdet.models.necks.FPN
    cfg.train_dataloader.collate_fn = dict(type=mmengine.dataset.default_collate)
    result = swap.swap_with_changes(cfg, SMALL)
    assert result.cfg.model.neck.type == 'mmdet.models.necks.fpn.FPN'
    assert result.cfg.model.neck.in_channels == [64, 128, 320, 512]
    swap.write(result, tmp_path / 'out.py', 'a config')
    again = Config.fromfile(tmp_path / 'out.py')
    assert again.to_dict() == result.cfg.to_dict()
    assert FUNCTIONS.get(again.train_dataloader.collate_fn.type) is mmengine.dataset.default_collate


@pytest.mark.parametrize(
    'name',
    [FASTER, DILATED, 'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py'],
)
def test_written_config_reloads(tmp_path, name):
    """The file stands alone, says what was changed, and loads to the same config."""
    result = swapped(name, allow_stride_change=True)
    file = tmp_path / 'out.py'
    swap.write(result, file, name)
    text = file.read_text()
    assert text.startswith(f'# {name}, its backbone swapped for a PVT. Changed:\n#  - backbone: ')
    assert all(f'#  - {change}\n' in text for change in result.changes)
    assert '_base_' not in text
    assert Config.fromfile(file).to_dict() == result.cfg.to_dict()
    result.cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == result.cfg.to_dict()


def test_tool(tmp_path, run_tool, capsys):
    run_tool(
        'swap_backbone',
        DILATED,
        '--arch',
        'v2_b0',
        '-o',
        'own.py',
        '--allow-stride-change',
        '--keep-optimizer',
    )
    cfg = Config.fromfile(tmp_path / 'own.py')
    assert (cfg.model.backbone.type, cfg.model.backbone.arch) == ('PVTv2', 'b0')
    assert cfg.optim_wrapper.optimizer.type == 'SGD'
    assert '- decode_head.in_channels: 2048 became 256' in capsys.readouterr().out


def test_tool_moves_a_config_from_mmdets_own_pvt(tmp_path, run_tool, capsys):
    """Without --arch; the list of changes says what stays."""
    run_tool('swap_backbone', 'mmdet::pvt/retinanet_pvtv2-b0_fpn_1x_coco.py', '-o', 'own.py')
    cfg = Config.fromfile(tmp_path / 'own.py')
    assert (cfg.model.backbone.type, cfg.model.backbone.arch) == ('PVTv2', 'b0')
    assert '- its depths 2, 2, 2, 2 and widths 32, 64, 160, 256 stay' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((FASTER, '--arch', 'v2_b9', '-o', 'own.py'), 'choose one of tiny, small'),
        ((FASTER, '--arch', 'tiny', '-o', 'no/folder/own.py'), 'in a folder that exists'),
        ((FASTER, '-o', 'own.py'), 'such as --arch v2_b2'),
        ((DILATED, '--arch', 'tiny', '-o', 'own.py'), 'the features get coarser'),
    ],
)
def test_tool_tells_what_is_wrong(run_tool, capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as caught:
        run_tool('swap_backbone', *arguments)
    assert caught.value.code == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob('own.py'))


# Run


def build(codebase, model):
    """Build a model without its weights."""
    model = copy.deepcopy(model)
    model.backbone.pop('init_cfg', None)
    module = importlib.import_module(f'{codebase}.utils')
    module.register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(codebase):
        return importlib.import_module(f'{codebase}.registry').MODELS.build(model)


def tool_module():
    """tests/stress/swap_census.py as a module."""
    return load_tool('swap_census')


@pytest.mark.parametrize(
    ('name', 'family', 'stride_changed'),
    [
        ('mmdet::atss/atss_r50_fpn_1x_coco.py', 'ResNet', False),
        ('mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py', 'ResNet', True),
        # of two dates, six channels
        pytest.param(
            'mmseg::swin/swin-tiny-patch4-window7_upernet_1xb8-20k_levir-256x256.py',
            'Swin',
            False,
            marks=pytest.mark.skipif(
                requirements._is_onedl(), reason='the fork takes one or three'
            ),
        ),
    ],
)
def test_census_of_a_config(name, family, stride_changed):
    """A config is swapped, read back, built, and carries a gradient from its loss to the stem."""
    census = tool_module()
    row = census.census_config(name)
    assert (row['outcome'], row['family']) == ('swapped', family)
    assert row['stride_changed'] == stride_changed
    assert census.check(row)['error'] == ''


def test_census_of_what_fails():
    """What fails with its own backbone too is told from what the swap broke."""
    census = tool_module()
    row = census.census_config('mmdet::cascade_rpn/cascade-rpn_r50-caffe_fpn_1x_coco.py')
    found = census.check(row)
    assert found['error'].startswith('TypeError: CascadeRPNHead') and found['anyway']
    row = census.census_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swap, 'LIST_NECKS', ())  # a swap that refuses where it did not before
        found = census.check(row)
    assert found['error'].startswith('SwapRefusedError: How the neck FPN') and not found['anyway']


def test_census_of_a_config_that_does_not_load():
    name = 'mmdet::sort/faster-rcnn_r50_fpn_8xb2-8e_mot20train_test-mot20train.py'
    row = tool_module().census_config(name)
    assert (row['outcome'], row['family']) == ('does not load', 'unknown')
    assert row['reason'].startswith('file "sort/faster-rcnn_r50')  # no folder of this machine


def test_census_counts(tmp_path):
    """Refusals and failures count against the goal; other backbones do not count at all."""
    census = tool_module()

    def row(outcome, name, **fields):
        defaults = dict(codebase='mmdet', family='ResNet', stride_changed=False, seconds=60)
        return {**defaults, 'outcome': outcome, 'name': f'mmdet::{name}', 'reason': '', **fields}

    rows = [
        row('swapped', 'a', model='good'),
        row('swapped', 'b', model='good', stride_changed=True),
        row('swapped', 'c', model='bad'),
        row('refused', 'd', reason='C4'),
        row('refused', 'e', family='Darknet', reason='YOLO'),
        row('swapped', 'f', model='broken'),
    ]
    results = census.Results(tmp_path, force=False)
    results.rows = {row['name']: row for row in rows}
    model = dict(criterion=census.LOSS, anyway=False, seconds=60)
    results.models = dict(
        good=dict(model, error=''),
        bad=dict(model, error='ValueError: no'),
        broken=dict(model, error='ImportError: x', anyway=True),
    )
    page = census.page(results, census.outcomes(results, list(results.rows)))
    assert 'Of the **5** configs' in page
    assert '**2** (40.0%) swap, build and carry a gradient: 1 at the strides they' in page
    assert '| ResNet | 1 | 1 | 1 | 1 | 1 |  |' in page
    assert '| refused | YOLO | 1 |' in page
    assert '| `mmdet::c` | failed | ValueError: no |' in page
    assert '| `mmdet::f` | fails anyway | ImportError: x |' in page
    assert '3 distinct models, 9 minutes of one core' in page


def test_census_goes_on(tmp_path):
    """What is kept is not done again, but failures are, and swaps after the swap has changed."""
    census = tool_module()
    results = census.Results(tmp_path, force=False)
    results.rows = {'mmdet::a': dict(outcome='refused')}
    results.models = dict(good=dict(error=''), bad=dict(error='ValueError: no'))
    results.save()
    again = census.Results(tmp_path, force=False)
    assert (again.rows, set(again.models)) == (results.rows, {'good'})
    results.digest = 'of another swap.py'
    results.save()
    again = census.Results(tmp_path, force=False)
    assert (again.rows, set(again.models)) == ({}, {'good'})
    assert not census.Results(tmp_path, force=True).models


def test_census_of_no_config():
    with pytest.raises(UserError, match='did you mean mmdet::retinanet/retinanet_'):
        tool_module().find_configs(['mmdet::retina_net/*'])
