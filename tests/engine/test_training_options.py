"""Training options: layer-wise decay, no decay, averaged weights, accumulated gradients."""

import copy
import functools
import re
from unittest import mock

import pytest
import torch
from conftest import write_config
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from recipes import LEAVES, load, read_metafile
from reference import REPO, SMALL, small
from torch import nn

from pvt_mm import PVT
from pvt_mm.checkpoint.safe_load import read_checkpoint
from pvt_mm.config import add_training_option, load_config
from pvt_mm.errors import UserError

CONFIGS = REPO / 'configs'
OPTIONS = sorted(path.stem for path in CONFIGS.glob('_base_/options/*.py'))
#: The one line that a leaf needs besides the file among its bases.
LINES = {
    'accumulate': 'optim_wrapper = _base_.optim_wrapper_accumulate',
    'ema': 'default_hooks = _base_.default_hooks_ema',
    'layer_decay': 'optim_wrapper = _base_.optim_wrapper_layer_decay',
    'no_decay': 'optim_wrapper = _base_.optim_wrapper_no_decay',
}
DET, SEG = 'retinanet_pvt_s_fpn_1x_coco.py', 'fpn_pvt_s_ade20k_40k.py'
DETR, ATSS = 'detr_pvt_s_8x2_50ep_coco.py', 'atss_pvt_v2_b2_fpn_3x_mstrain_fp16.py'


@functools.cache
def whole_model(name):
    cfg = load(name)
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        return MODELS.build(copy.deepcopy(cfg.model))


def with_options(name, *options):
    cfg = copy.deepcopy(load(name))
    for option in options:
        add_training_option(cfg, option)
    return cfg


def rates(name, *options, **paramwise):
    """Learning rate and decay of every parameter of a leaf, by its name, and the groups."""
    cfg, model = with_options(name, *options), whole_model(name)
    cfg.optim_wrapper.type = 'OptimWrapper'  # mixed precision asks for a GPU
    cfg.optim_wrapper.pop('loss_scale', None)
    if paramwise:
        cfg.optim_wrapper.paramwise_cfg.update(paramwise)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    names = {parameter: key for key, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group['lr'], group['weight_decay'])
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    }
    assert set(found) == set(names.values())
    return found, wrapper.optimizer.param_groups


def depth_of(name, depths=(3, 4, 6, 3)):
    """The layer of a parameter by the rule in the documentation, written anew."""
    found = re.match(r'backbone\.stages\.(\d)\.(?:blocks\.(\d+)\.)?', name)
    if found is None:
        return sum(depths) + 1
    stage, block = int(found[1]), found[2]
    return sum(depths[:stage]) + (0 if block is None else int(block) + 1)


# Layers


@pytest.mark.parametrize('variant', ['v1', 'v2', 'v2_li'])
def test_layers_follow_the_forward_pass(variant):
    """Depths rise from the first embedding to the head, and no layer is empty."""
    model = small(variant)
    depths = [model.get_layer_depth(f'b.{name}', 'b.') for name, _ in model.named_parameters()]
    assert {count for _, count in depths} == {sum(SMALL['depths']) + 2}
    layers = {depth for depth, _ in depths}
    assert layers == set(range(sum(SMALL['depths']) + 1))
    assert model.get_layer_depth('b.stages.1.blocks.1.norm1.weight', 'b.') == (3, 7)
    assert model.get_layer_depth('b.stages.1.patch_embed.proj.weight', 'b.') == (1, 7)
    assert model.get_layer_depth('b.stages.1.norm.weight', 'b.') == (3, 7)
    for other in ('neck.stages.0.weight', 'stages.0.pos_embed', 'b.head.weight'):
        assert model.get_layer_depth(other, 'b.') == (6, 7)


def test_the_class_token_counts_with_its_stage():
    """It enters at the last stage; the norm that reads it out learns like the head."""
    model = PVT(SMALL, out_indices=(3,), with_cls_token=True)
    assert model.get_layer_depth('stages.3.cls_token') == (4, 7)
    assert model.get_layer_depth('stages.3.cls_position') == (4, 7)
    assert model.get_layer_depth('stages.3.final_norm.bias') == (6, 7)


# Groups of real leaves


@pytest.mark.parametrize(('name', 'rate'), [(DET, 1e-4), (SEG, 2e-4)])
def test_layer_decay_of_a_leaf(name, rate):
    """Each layer learns at 0.9 of the next one's rate; decay is the recipe's everywhere."""
    found, groups = rates(name, 'layer_decay')
    for key, (lr, decay) in found.items():
        assert lr == pytest.approx(rate * 0.9 ** (17 - depth_of(key))), key
        assert decay == 1e-4
    assert found['backbone.stages.0.pos_embed'][0] == pytest.approx(rate * 0.9**17)
    assert len(groups) == 18, 'one a layer'


@pytest.mark.parametrize(('name', 'rate'), [(DET, 1e-4), (SEG, 2e-4)])
def test_no_decay_of_a_leaf(name, rate):
    """Vectors and position embeddings do not decay, all else does; rates are the recipe's."""
    found, groups = rates(name, 'no_decay')
    shapes = {key: parameter.shape for key, parameter in whole_model(name).named_parameters()}
    free = {key for key, (_, decay) in found.items() if decay == 0.0}
    assert free == {key for key in shapes if len(shapes[key]) < 2 or 'pos_embed' in key}
    assert sum('pos_embed' in key for key in free) == 4
    assert set(found.values()) == {(rate, 0.0), (rate, 1e-4)} and len(groups) == 2
    assert len(rates(name, 'layer_decay', 'no_decay')[1]) == 36, 'two a layer'


def test_both_respect_the_rules_that_a_recipe_has():
    """DETR's tenth of the rate for the backbone is multiplied; its norms do not decay either."""
    found, _ = rates(DETR, 'layer_decay', 'no_decay')
    for key, (lr, decay) in found.items():
        scale = 0.1 * 0.9 ** (17 - depth_of(key)) if key.startswith('backbone.') else 1.0
        assert lr == pytest.approx(1e-4 * scale), key
        assert (decay == 0.0) is (whole_model(DETR).get_parameter(key).ndim < 2 or 'pos_' in key)


def test_norms_that_a_recipe_names_stay_free():
    """ATSS's own rule for norms goes on beside the layers' rates."""
    found, _ = rates(ATSS, 'layer_decay')
    assert found['backbone.stages.2.blocks.5.norm1.weight'] == pytest.approx((1e-4 * 0.9**4, 0.0))
    assert found['backbone.stages.2.blocks.5.mlp.fc1.weight'] == pytest.approx(
        (1e-4 * 0.9**4, 0.05)
    )


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 1.0))
def test_any_rate(rate):
    """The rate of the command line takes the place of the file's."""
    found, _ = rates(DET, 'layer_decay', layer_decay_rate=rate)
    assert found['backbone.stages.3.blocks.0.attn.q.weight'][0] == pytest.approx(1e-4 * rate**3)


@pytest.mark.parametrize('rate', [0.0, -1, 1.5])
def test_rates_out_of_range_are_refused(rate):
    with pytest.raises(UserError, match=f'layer_decay_rate={rate} must be above 0'):
        rates(DET, 'layer_decay', layer_decay_rate=rate)


def test_a_model_without_pvt_is_refused():
    """Its layers are not known; without layer decay the constructor serves it."""
    cfg = dict(
        constructor='PVTOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.1),
        paramwise_cfg=dict(no_decay=True),
    )
    wrapper = build_optim_wrapper(nn.Linear(2, 2), copy.deepcopy(cfg))
    assert [group['weight_decay'] for group in wrapper.optimizer.param_groups] == [0.1, 0.0]
    cfg['paramwise_cfg']['layer_decay_rate'] = 0.5
    with pytest.raises(UserError, match='needs the layers of a PVT'):
        build_optim_wrapper(nn.Linear(2, 2), copy.deepcopy(cfg))
    del cfg['optimizer']['lr']
    with pytest.raises(UserError, match=r'set optimizer\.lr'):
        build_optim_wrapper(nn.Linear(2, 2), cfg)


def test_frozen_parameters_are_left_out():
    """A frozen stage is in no group, and the layers above keep their rates."""
    model = nn.ModuleDict({'backbone': small('v1', frozen_stages=1), 'head': nn.Linear(2, 2)})
    cfg = copy.deepcopy(with_options(DET, 'layer_decay').optim_wrapper)
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    trained = {parameter for group in groups for parameter in group['params']}
    assert trained == {p for p in model.parameters() if p.requires_grad}
    assert [group['lr'] for group in groups] == pytest.approx(
        [1e-4 * 0.9**n for n in (5, 4, 3, 2, 1, 0)]
    )


# The two ways to take an option


@pytest.mark.parametrize('name', LEAVES)
def test_every_leaf_takes_every_option(name):
    """Merged together, they change what they say and nothing else; custom hooks survive."""
    before, cfg = load(name), with_options(name, *OPTIONS)
    assert cfg.custom_hooks == before.custom_hooks
    assert dict(type='PVTCheckpointHook') in cfg.custom_hooks
    assert cfg.default_hooks.pop('ema').type == 'EMAHook'
    assert cfg.default_hooks == before.default_hooks
    wrapper = cfg.optim_wrapper
    assert wrapper.pop('accumulative_counts') == 4
    assert wrapper.pop('constructor') == 'PVTOptimWrapperConstructor'
    paramwise = wrapper.paramwise_cfg
    assert (paramwise.pop('layer_decay_rate'), paramwise.pop('no_decay')) == (0.9, True)
    assert dict(wrapper, paramwise_cfg=None) == dict(before.optim_wrapper, paramwise_cfg=None)
    assert paramwise == before.optim_wrapper.get('paramwise_cfg', {})


@pytest.mark.parametrize('name', [DET, SEG, ATSS, 'pvt_s_8xb128_in1k.py'])
@pytest.mark.parametrize('option', OPTIONS)
def test_a_leaf_of_ones_own_takes_an_option_with_one_line(option, name, tmp_path):
    """The file among the bases, and the line that it states itself: as by --option."""
    file = CONFIGS / '_base_' / 'options' / f'{option}.py'
    assert f'#     {LINES[option]}\n' in file.read_text()
    bases = [str(CONFIGS / name), str(file)]
    (tmp_path / 'leaf.py').write_text(f'_base_ = {bases!r}\n{LINES[option]}\n')
    with mock.patch('mmengine.config.utils.load', read_metafile):
        leaf = Config.fromfile(tmp_path / 'leaf.py')
    leaf = {key: value for key, value in leaf.items() if not key.endswith(f'_{option}')}
    assert leaf == dict(with_options(name, option).items())


def test_every_option_is_documented():
    """The page has each file, its line for a leaf, and the tool names it in its help."""
    page = (REPO / 'docs/training_options.md').read_text()
    tool = (REPO / 'tools/train.py').read_text()
    assert set(OPTIONS) == set(LINES)
    assert f'training options: {", ".join(OPTIONS)} ' in tool
    for option in OPTIONS:
        assert f'`{LINES[option]}`' in page and f'`{option}`' in page


def test_unknown_options_are_refused():
    with pytest.raises(UserError, match="no option 'emma'; choose of accumulate, ema, "):
        add_training_option(Config({}), 'emma')


def test_command_line_values_win(tmp_path):
    """--cfg-options come after --option."""
    option = {'optim_wrapper.paramwise_cfg.layer_decay_rate': 0.7}
    with mock.patch('mmengine.config.utils.load', read_metafile):
        cfg = load_config(str(CONFIGS / DET), option, training_options=['layer_decay'])
    assert cfg.optim_wrapper.paramwise_cfg.layer_decay_rate == 0.7


# What they do


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Nothing moves for three of four small batches; then it moves as by one large one."""
    init_default_scope('mmdet')
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    moved = []
    for option, batches in (['accumulate'], images.split(1)), ([], [images]):
        model = small('v1')
        wrapper = build_optim_wrapper(model, with_options(DET, *option).optim_wrapper)
        before = model.stages[0].pos_embed.detach().clone()
        for batch in batches:
            assert torch.equal(model.stages[0].pos_embed, before)
            wrapper.update_params(model(batch)[3].square().mean())
        moved.append(model.stages[0].pos_embed.detach() - before)
    assert moved[1].abs().max() > 5e-5
    torch.testing.assert_close(*moved, rtol=0.0, atol=1e-6)


def test_a_training_with_all_options(run_tool, demo_data, tmp_path):
    """Bare weights reach model and average through both hooks; the average is what is saved."""
    config = write_config(tmp_path, 'det')
    torch.save(small('v1').state_dict(), tmp_path / 'backbone.pth')
    options = ('--option', *OPTIONS, '--load-from', tmp_path / 'backbone.pth', '--seed', 1)
    # Three iterations: the average follows quickly, and each is a step.
    values = ('default_hooks.ema.momentum=0.25', 'optim_wrapper.accumulative_counts=1')
    places = ('--data-root', demo_data / 'coco', '--work-dir', tmp_path / 'run')
    run_tool('train', config, *places, *options, '--cfg-options', *values)
    checkpoint = read_checkpoint(tmp_path / 'run' / 'epoch_1.pth')
    averaged, latest = checkpoint['state_dict'], checkpoint['ema_state_dict']
    assert latest['steps'] == 3
    start = small('v1').state_dict()
    for key in ('stages.3.blocks.0.mlp.fc1.weight', 'stages.0.pos_embed'):
        lag = (averaged[f'backbone.{key}'] - start[key]).norm()
        lead = (latest[f'module.backbone.{key}'] - start[key]).norm()
        assert 0 < lag < lead < 0.1 * start[key].norm()
    assert len(checkpoint['optimizer']['param_groups']) == 2 * (sum(SMALL['depths']) + 2)
