"""Configs load, say what the reference's recipes say, and build with channels that agree."""

import copy
import re
from unittest import mock

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from recipes import (
    CLASSIFIERS,
    CONFIGS,
    LEAVES,
    PUBLISHED,
    V1,
    V2,
    load,
    parts_of,
    published_figures,
    read_metafile,
)
from reference import REPO, load_json

from pvt_mm import PVT, convert_checkpoint

RECIPES = {recipe['file']: recipe for recipe in load_json('official_recipes.json')['configs']}
README = (REPO / 'README.md').read_text()
EXAMPLES = [
    text for text in re.findall('^```python\n(.*?)^```', README, re.M | re.S) if '_base_' in text
]
#: Where the model zoo has its rows; classification's are on its own page.
ZOO = README + (REPO / 'docs/classification.md').read_text()

REQUIRED = {'retinanet_pvt_s_fpn_1x_coco_640.py'}
for head in ('retinanet', 'mask_rcnn'):
    REQUIRED |= {f'{head}_pvt_{arch}_fpn_1x_coco.py' for arch in V1}
    REQUIRED |= {f'{head}_pvt_v2_{arch}_fpn_1x_coco.py' for arch in V2}
    REQUIRED |= {f'{head}_pvt_{arch}_fpn_3x_mstrain.py' for arch in V1}
for length in ('40k', '80k'):
    REQUIRED |= {f'fpn_pvt_{arch}_ade20k_{length}.py' for arch in V1}
    REQUIRED |= {f'fpn_pvtv2_{arch}_ade20k_{length}.py' for arch in V2}
for arch in ('b2', 'b2_li'):
    REQUIRED |= {
        f'mask_rcnn_pvt_v2_{arch}_fpn_3x_mstrain.py',
        f'cascade_mask_rcnn_pvt_v2_{arch}_fpn_3x_mstrain_fp16.py',
        f'atss_pvt_v2_{arch}_fpn_3x_mstrain_fp16.py',
        f'gfl_pvt_v2_{arch}_fpn_3x_mstrain_fp16.py',
        f'sparse_rcnn_pvt_v2_{arch}_fpn_300_proposals_crop_mstrain_480-800_3x_coco.py',
    }
REQUIRED |= {f'pvt_{arch}_8xb128_in1k.py' for arch in V1}
REQUIRED |= {f'pvt_v2_{arch}_8xb128_in1k.py' for arch in V2}
REQUIRED |= {
    'mask_rcnn_pvt_v2_b0_fpn_3x_mstrain.py',
    'detr_pvt_s_8x2_50ep_coco.py',
    'detr_pvt_v2_b2_8x2_50ep_coco.py',
    'deformable_detr_pvt_v2_b2_16x2_50ep_coco.py',
    'dino_pvt_v2_b2_4scale_8x2_12ep_coco.py',
    'segmenter_pvt_s_mask_ade20k_40k.py',
}
# The 3x recipes of the second version, which crop; those of the first only resize.
CROPPED = [name for name in LEAVES if re.search('pvt_v2_.*_3x_', name)]
RESIZED = [name for name in LEAVES if re.search('pvt_[tsml]_.*_3x_', name)]

# What a recipe states and ours states otherwise, on purpose.
DIFFERENCES = {
    'apex_fp16': "NVIDIA Apex is retired: mmengine's AmpOptimWrapper stands for it.",
    'runner type': 'EpochBasedRunnerAmp went with Apex; the loop follows the epochs or iterations.',
    'pretrained': 'The recipes of PVTv2-Seg name a bare file; ours name its release URL.',
    'find_unused_parameters': 'Every parameter gets a gradient, so nothing needs finding.',
    'neck of DETR': "mmdet 3.x's ChannelMapper does what the reference's DETRHead did itself.",
    'betas': "The recipes that state them state PyTorch's own.",
    'absolute_pos_embed': 'A key of Swin without decay, which names nothing in a PVT.',
    'relative_position_bias_table': 'Another key of Swin, which names nothing in a PVT.',
}
COMPARED = {
    'file',
    'source',
    'backbone',
    'neck',
    'optimizer',
    'grad_clip',
    'lr_config',
    'runner',
    'samples_per_gpu',
}


def arch_of(recipe):
    """`('PVT', 'small')` of `pvt_small`, `('PVTv2', 'b2_li')` of `pvt_v2_b2_li`."""
    name = recipe['backbone'].removeprefix('pvt_').removesuffix('_f4')
    return ('PVTv2', name.removeprefix('v2_')) if name.startswith('v2_') else ('PVT', name)


def is_segmentation(recipe):
    return 'ade20k' in recipe['file']


def published_drop_path(recipe):
    """Stochastic depth as published; the second version's segmentation keeps its classes' 0.1."""
    kind, arch = arch_of(recipe)
    if is_segmentation(recipe):
        return PUBLISHED['drop_path_rate']['segmentation']['all_v1'] if kind == 'PVT' else 0.1
    return PUBLISHED['drop_path_rate']['detection'][arch if kind == 'PVT' else 'all_v2']


def published_batch(recipe):
    """Images a GPU; a recipe that inherits it has 2 for COCO and 4 for ADE20K."""
    stated = recipe['samples_per_gpu']
    return stated if isinstance(stated, int) else 4 if is_segmentation(recipe) else 2


def published_schedule(recipe):
    """Epochs with their steps, or iterations with their polynomial; 1x is inherited."""
    steps, runner = recipe['lr_config'] or {}, recipe['runner'] or {}
    if is_segmentation(recipe):
        return dict(iterations=runner['max_iters'], power=steps['power'], end=steps['min_lr'])
    return dict(
        epochs=runner.get('max_epochs', 12),
        steps=steps.get('step', [8, 11]),
        warmup=None if recipe['file'].startswith('detr') else (0.001, 500),
    )


def published_optimizer(recipe):
    """The optimiser and its rules for single parameters, without what DIFFERENCES lists."""
    optimizer = copy.deepcopy(recipe['optimizer'])
    assert optimizer.pop('betas', None) in (None, [0.9, 0.999])
    paramwise = optimizer.pop('paramwise_cfg', None)
    if paramwise is not None:
        for key in DIFFERENCES:
            paramwise['custom_keys'].pop(key, None)
    return optimizer, paramwise


def schedule(cfg):
    """Our schedule in the words of published_schedule."""
    if cfg.train_cfg.type == 'IterBasedTrainLoop':
        (poly,) = cfg.param_scheduler
        assert (poly.type, poly.begin, poly.by_epoch) == ('PolyLR', 0, False)
        assert poly.end == cfg.train_cfg.max_iters
        return dict(iterations=cfg.train_cfg.max_iters, power=poly.power, end=poly.eta_min)
    *warmup, steps = cfg.param_scheduler
    assert (steps.type, steps.by_epoch, steps.gamma) == ('MultiStepLR', True, 0.1)
    assert steps.end == cfg.train_cfg.max_epochs
    for ramp in warmup:
        assert (ramp.type, ramp.by_epoch) == ('LinearLR', False)
    ramps = [(ramp.start_factor, ramp.end) for ramp in warmup]
    return dict(
        epochs=cfg.train_cfg.max_epochs, steps=steps.milestones, warmup=ramps[0] if ramps else None
    )


def without_scope(cfg):
    """Plain dicts and lists without mmengine's own `_scope_` entries."""
    if isinstance(cfg, dict):
        return {key: without_scope(value) for key, value in cfg.items() if key != '_scope_'}
    return [without_scope(value) for value in cfg] if isinstance(cfg, list) else cfg


def test_every_required_config_exists():
    """All recipes of the reference, under its names, and those of our own."""
    assert set(LEAVES) == REQUIRED
    assert set(RECIPES) <= REQUIRED


@pytest.mark.parametrize('name', LEAVES)
def test_a_leaf_is_short(name):
    """A leaf says only what differs, in 3 to 8 lines."""
    assert 3 <= len((CONFIGS / name).read_text().splitlines()) <= 8


@pytest.mark.parametrize('name', LEAVES)
def test_a_leaf_registers_itself(name):
    """Whatever reads the config imports pvt_mm and gets the hook for published weights."""
    cfg = load(name)
    assert 'pvt_mm' in cfg.custom_imports.imports
    assert not cfg.custom_imports.allow_failed_imports
    assert dict(type='PVTCheckpointHook') in cfg.custom_hooks


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_equals_the_reference(name):
    """Model, optimiser, schedule and batch are the published ones, but for DIFFERENCES."""
    recipe, cfg = RECIPES[name], load(name)
    assert set(recipe) <= COMPARED | set(DIFFERENCES), 'a stated figure is not compared'

    kind, arch = arch_of(recipe)
    backbone = cfg.model.backbone
    assert (backbone.type, backbone.arch) == (kind, arch)
    assert backbone.drop_path_rate == published_drop_path(recipe)
    weights = f'{recipe["backbone"].removesuffix("_f4")}.pth'
    assert recipe['pretrained'].endswith(weights)
    assert backbone.init_cfg == dict(
        type='Pretrained',
        checkpoint=f'https://github.com/whai362/PVT/releases/download/v2/{weights}',
    )

    neck = without_scope(cfg.model.neck)
    if recipe['neck'] is None:
        assert (neck['type'], neck['in_channels']) == ('ChannelMapper', [512])
    else:
        assert neck == {**neck, **recipe['neck']}
        if 'add_extra_convs' not in recipe['neck']:
            assert {'add_extra_convs', 'start_level'}.isdisjoint(neck)

    optimizer, paramwise = published_optimizer(recipe)
    assert cfg.optim_wrapper.get('paramwise_cfg') == paramwise
    assert without_scope(cfg.optim_wrapper.optimizer) == optimizer
    assert cfg.optim_wrapper.get('clip_grad') == recipe['grad_clip']
    assert (cfg.optim_wrapper.type == 'AmpOptimWrapper') is recipe['apex_fp16']

    assert schedule(cfg) == published_schedule(recipe)
    assert cfg.train_dataloader.batch_size == published_batch(recipe)
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=8 * published_batch(recipe))


@pytest.mark.parametrize('name', sorted(REQUIRED))
def test_first_line_quotes_the_published_figure(name):
    """The score in a leaf's first line is the published one, or the line says there is none."""
    first = (CONFIGS / name).read_text().splitlines()[0]
    figures = published_figures(name)
    assert re.findall(r'\b\d+\.\d\b', first) == [str(figure) for figure in figures]
    assert bool(figures) is ('Reference: ' in first)
    _, kind, arch = parts_of(name)
    backbone = load(name).model.backbone
    assert (backbone.type, backbone.arch) == (kind, arch)


@pytest.mark.parametrize('name', sorted(REQUIRED))
def test_the_model_zoo_quotes_the_same_figure(name):
    """Every config has its row in the model zoo, with the figures of its own first line."""
    row = re.search(rf'^\|.*[(`]configs/{name}[)`] \|(.*)\|$', ZOO, re.MULTILINE)
    assert row is not None
    figures = r'\b\d+\.\d\b'
    first = (CONFIGS / name).read_text().splitlines()[0]
    assert re.findall(figures, row.group(1)) == re.findall(figures, first)


@pytest.mark.parametrize('example', EXAMPLES)
def test_readme_examples_build(example, tmp_path):
    """The configs that README shows for other models load and run as they stand there."""
    file = tmp_path / 'example.py'
    file.write_text(example)
    with mock.patch('mmengine.config.utils.load', read_metafile):
        cfg = Config.fromfile(file)
    with torch.device('meta'):
        model = MODELS.build(cfg.model).eval()
        features = model.backbone(torch.zeros(1, 3, 64, 96))
        outputs = model.neck(features) if model.with_neck else model.decode_head(features)
    assert outputs[0].shape[-2:] == (16, 24)


@pytest.mark.parametrize(
    ('name', 'shorter'),
    [('retinanet_pvt_s_fpn_1x_coco.py', 800), ('retinanet_pvt_s_fpn_1x_coco_640.py', 640)],
)
def test_image_size(name, shorter):
    """The 640 recipe trains, validates and tests on a shorter side of 640."""
    cfg = load(name)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        (resize,) = [step for step in loader.dataset.pipeline if step.type == 'Resize']
        assert (tuple(resize.scale), resize.keep_ratio) == ((1333, shorter), True)


@pytest.mark.parametrize('name', [name for name in LEAVES if 'ade20k' in name])
def test_semantic_images_are_multiples_of_32(name):
    """As in the reference, test images (not their labels) are resized to multiples of 32."""
    cfg = load(name)
    assert cfg.model.decode_head.num_classes == 150
    assert tuple(cfg.model.data_preprocessor.size) == (512, 512)
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        steps = [step.type for step in loader.dataset.pipeline]
        assert steps[1:4] == ['Resize', 'ResizeToMultiple', 'LoadAnnotations']
    views = cfg.tta_pipeline[1].transforms
    assert [view[0].type for view in views[:3]] == ['Resize', 'ResizeToMultiple', 'RandomFlip']


@pytest.mark.parametrize('name', CROPPED)
def test_3x_images_of_the_second_version(name):
    """3x crops as mmdet's own Sparse R-CNN does; masks are loaded where a head learns them."""
    steps = without_scope(load(name).train_dataloader.dataset.pipeline)
    sparse = next(leaf for leaf in CROPPED if leaf.startswith('sparse'))
    assert steps[2:] == without_scope(load(sparse).train_dataloader.dataset.pipeline)[2:]
    assert [step['type'] for step in steps[2:]] == ['RandomFlip', 'RandomChoice', 'PackDetInputs']
    assert steps[1].get('with_mask', False) is ('mask_rcnn' in name)


@pytest.mark.parametrize('name', RESIZED)
def test_3x_of_the_first_version(name):
    """3x is 1x for thrice as long, on images of a shorter side from 640 to 800."""
    cfg, once = load(name), load(name.replace('3x_mstrain', '1x_coco'))
    assert cfg.model == once.model
    assert cfg.optim_wrapper == once.optim_wrapper
    assert cfg.auto_scale_lr == once.auto_scale_lr
    assert schedule(cfg) == {**schedule(once), 'epochs': 36, 'steps': [27, 33]}
    steps = without_scope(cfg.train_dataloader.dataset.pipeline)
    assert steps[2] == dict(type='RandomResize', scale=[(1333, 640), (1333, 800)], keep_ratio=True)
    steps[2] = without_scope(once.train_dataloader.dataset.pipeline)[2]
    assert steps == without_scope(once.train_dataloader.dataset.pipeline)


def test_b0_trains_3x_as_b2():
    """The figure of PVTv2-B0 has no recipe of its own in the reference; it gets that of B2."""
    b0, b2 = (load(f'mask_rcnn_pvt_v2_{arch}_fpn_3x_mstrain.py') for arch in ('b0', 'b2'))
    for key in ('optim_wrapper', 'param_scheduler', 'train_cfg', 'train_dataloader'):
        assert b0[key] == b2[key]


def test_detr_images():
    """DETR resizes to the reference's six sizes and pads to multiples of 32."""
    cfg = load('detr_pvt_s_8x2_50ep_coco.py')
    resize = cfg.train_dataloader.dataset.pipeline[2]
    assert (resize.type, resize.keep_ratio) == ('RandomChoiceResize', True)
    assert resize.scales == [(1333, side) for side in (640, 672, 704, 736, 768, 800)]
    assert cfg.model.data_preprocessor.pad_size_divisor == 32


def test_cascade_heads():
    """Three heads of four convolutions; each has mmdet's own stds of box offsets."""
    cfg = load('cascade_mask_rcnn_pvt_v2_b2_fpn_3x_mstrain_fp16.py')
    heads = cfg.model.roi_head.bbox_head
    assert [head.bbox_coder.target_stds[0] for head in heads] == [0.1, 0.05, 0.033]
    for head in heads:
        assert (head.type, head.num_shared_convs, head.num_shared_fcs) == ('ConvFCBBoxHead', 4, 1)
        assert (head.reg_class_agnostic, head.reg_decoded_bbox) == (False, True)
        assert head.loss_bbox == dict(type='GIoULoss', loss_weight=10.0)


@pytest.mark.parametrize('name', [name for name in LEAVES if name.endswith('_ade20k_80k.py')])
def test_80k_sees_as_many_images_as_40k(name):
    """Half the batch and learning rate, twice the iterations, nothing else."""
    cfg, whole = load(name), load(name.replace('80k', '40k'))
    assert (cfg.auto_scale_lr.base_batch_size, whole.auto_scale_lr.base_batch_size) == (16, 32)
    assert cfg.train_dataloader == whole.train_dataloader
    assert (cfg.optim_wrapper.optimizer.lr, whole.optim_wrapper.optimizer.lr) == (1e-4, 2e-4)
    assert schedule(cfg) == {**schedule(whole), 'iterations': 80000}
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == 8000
    assert cfg.model == whole.model


@pytest.mark.parametrize('arch', ['b0', 'b2', 'b2_li'])
def test_norms_and_nothing_else_do_not_decay(arch):
    """Of the backbone, the key `norm` of the 3x recipes names the layer norms alone."""
    cfg = load(f'mask_rcnn_pvt_v2_{arch}_fpn_3x_mstrain.py')
    assert cfg.optim_wrapper.paramwise_cfg == dict(custom_keys=dict(norm=dict(decay_mult=0.0)))
    with torch.device('meta'):
        backbone = MODELS.build(copy.deepcopy(cfg.model.backbone))
    for name, module in backbone.named_modules():
        for parameter, _ in module.named_parameters(recurse=False):
            assert ('norm' in f'{name}.{parameter}') is isinstance(module, torch.nn.LayerNorm)


def check_heads(model, pyramid):
    """The neck's levels are as many, and as wide, as the heads after it read."""
    if hasattr(model, 'encoder'):
        assert len(pyramid) == getattr(model, 'num_feature_levels', 1)
        assert {level.shape[1] for level in pyramid} == {model.embed_dims}
    elif hasattr(model, 'rpn_head') and hasattr(model.rpn_head, 'init_proposal_features'):
        assert len(pyramid) == model.roi_head.bbox_roi_extractor[0].num_inputs
    else:
        dense = model.bbox_head if hasattr(model, 'bbox_head') else model.rpn_head
        assert len(dense(pyramid)[0]) == len(dense.prior_generator.strides)


@pytest.mark.parametrize('name', sorted({*LEAVES} - {*CLASSIFIERS}))
def test_builds_and_channels_agree(name):
    """The whole model builds without memory; features fit the neck, the neck fits the heads."""
    cfg = load(name)
    is_segmenter = name.startswith('segmenter')
    # Segmenter's head reads a tensor's value as it is made, which the meta device does not have.
    with torch.device('cpu' if is_segmenter else 'meta'), torch.no_grad():
        model = MODELS.build(copy.deepcopy(cfg.model)).eval()
        features = model.backbone(torch.zeros(1, 3, 64, 96))
        stages = cfg.model.backbone.get('out_indices', (0, 1, 2, 3))
        assert [tuple(feature.shape) for feature in features] == [
            (1, cfg.out_channels[stage], 16 >> stage, 24 >> stage) for stage in stages
        ]
        if is_segmenter:
            assert model.decode_head(features).shape == (1, 150, 2, 3)
            return
        assert list(model.backbone.out_channels) == list(cfg.model.neck.in_channels)
        pyramid = model.neck(features)
        if 'ade20k' in name:
            assert model.decode_head(pyramid).shape == (1, 150, 16, 24)
        else:
            check_heads(model, pyramid)


def test_pooled_reduction_takes_the_published_weights():
    """All of them fit PVT-Small with average pooling, but for the layers after the pooling."""
    backbone = Config.fromfile(CONFIGS / '_base_' / 'backbones' / 'pvt_s_avg.py').backbone
    del backbone['init_cfg']
    model = MODELS.build(backbone)
    weights = convert_checkpoint(PVT('small').state_dict(), to='official')
    before = model.stages[0].blocks[0].attn.sr.weight.clone()
    model.load_state_dict(weights)
    assert model.loaded.startswith('PVT: loaded 283 of 296 backbone tensors from weights of small')
    assert torch.equal(model.stages[0].blocks[0].attn.sr.weight, before)
    assert torch.equal(model.stages[0].blocks[0].attn.q.weight, weights['block1.0.attn.q.weight'])
