"""Every format, loaded in every way, for every arch; wrappers, other people's heads.

The archs have their published depths but an eighth of their widths: names decide here,
and narrow weights can all be compared.
"""

import copy
import functools
import hashlib
import os
import re
from unittest import mock

import mmengine.config.utils
import pytest
import torch
from conftest import forget_runs
from mmdet.models import SemiBaseDetector
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel, ExponentialMovingAverage
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, load_checkpoint, loops
from mmengine.utils import ManagerMixin
from reference import ARCHS, PAIRS, REPO, V1, backbone_class, load_json, small
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pvt_mm import CheckpointMismatchError, convert_checkpoint
from pvt_mm.apis import inference
from pvt_mm.checkpoint import loaders
from pvt_mm.checkpoint.convert import bare_backbone
from pvt_mm.checkpoint.safe_load import read_checkpoint
from pvt_mm.engine import runtime
from pvt_mm.engine.runner import name_loaded_file
from pvt_mm.errors import UserError

FEW = [(arch, fmt) for arch, fmt in PAIRS if arch in ('tiny', 'b0', 'b2_li')]
OLD_KEYS = load_json('mmdet2_keys.json')

# mmengine reads every metafile of mmdet for each `mmdet::` base.
read_metafile = functools.cache(mmengine.config.utils.load)


def narrow(arch):
    spec = backbone_class(arch).ARCHS[arch]
    return {**spec, 'dims': tuple(dim // 8 for dim in spec['dims'])}


@functools.cache
def build(arch):
    return backbone_class(arch)(narrow(arch))


@functools.cache
def published(arch, fmt='official'):
    """Random weights of a narrow arch in a format, with all that a classifier's file has."""
    generator = torch.Generator().manual_seed(3)
    state = build(arch).state_dict()
    weights = convert_checkpoint(
        {key: torch.randn(value.shape, generator=generator) for key, value in state.items()},
        to='official',
    )
    width = narrow(arch)['dims'][-1]
    weights |= {'head.weight': torch.randn(10, width), 'head.bias': torch.randn(10)}
    if arch in V1:
        slot = torch.randn(1, 1, width)
        weights['pos_embed4'] = torch.cat([slot, weights['pos_embed4']], 1)
        weights |= {f'norm.{leaf}': torch.randn(width) for leaf in ('weight', 'bias')}
        weights['cls_token'] = torch.randn(1, 1, width)
    return convert_checkpoint(weights, to=fmt)


#: What a training's checkpoint holds beside weights.
STATE = {
    'meta': dict(epoch=0, iter=1),
    'message_hub': dict(log_scalars={}, runtime_info={}, resumed_keys={}),
}


class Net(BaseModel):
    """A stand-in for detectors: a backbone under its usual name, a head, and a loss."""

    def __init__(self, arch, classes=4):
        super().__init__()
        self.backbone = backbone_class(arch)(narrow(arch)) if isinstance(arch, str) else arch
        self.head = nn.Linear(4, classes)

    def forward(self, *inputs, mode='tensor'):
        return {'loss': self.head(torch.stack(inputs)).square().mean()}


def whole(arch, fmt):
    """A whole detector's weights: backbone in a format, and a head."""
    weights = {f'backbone.{key}': value for key, value in published(arch, fmt).items()}
    return weights | {'head.weight': torch.ones(4, 4), 'head.bias': torch.ones(4)}


def runner_of(model, folder, **kwargs):
    """A real Runner of mmengine with the hook, on four samples of noise."""
    forget_runs(ManagerMixin)
    sampler = dict(type='DefaultSampler', shuffle=False)
    data = dict(dataset=[torch.ones(4)] * 4, batch_size=2, sampler=sampler)
    hooks = [dict(type='PVTCheckpointHook'), *kwargs.pop('custom_hooks', [])]
    with mock.patch.object(Runner, '_log_env'):  # it asks compilers for their versions
        return Runner(
            model,
            str(folder),
            train_dataloader=data,
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0)),
            custom_hooks=hooks,
            default_scope=None,
            log_level='WARNING',
            **kwargs,
        )


# Ways to load: each takes weights to backbones, and returns these


def by_load_state_dict(arch, fmt, folder):
    backbone = backbone_class(arch)(narrow(arch))
    backbone.load_state_dict(published(arch, fmt), strict=True)
    return [backbone]


def by_pretrained(arch, fmt, folder):
    torch.save({'model': published(arch, fmt)}, folder / 'w.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(folder / 'w.pth'))
    backbone = backbone_class(arch)(narrow(arch), init_cfg=init_cfg)
    backbone.init_weights()
    return [backbone]


def by_load_checkpoint(arch, fmt, folder):
    torch.save({'state_dict': published(arch, fmt)}, folder / 'w.pth')
    backbone = backbone_class(arch)(narrow(arch))
    load_checkpoint(backbone, str(folder / 'w.pth'), strict=True)
    return [backbone]


def by_load_from(arch, fmt, folder):
    torch.save(published(arch, fmt), folder / 'w.pth')
    runner = runner_of(Net(arch), folder, load_from=str(folder / 'w.pth'))
    runner.load_or_resume()
    return [runner.model.backbone]


def by_resume(arch, fmt, folder):
    torch.save(STATE | {'state_dict': whole(arch, fmt)}, folder / 'w.pth')
    runner = runner_of(Net(arch), folder)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.resume(str(folder / 'w.pth'))
    assert runner.iter == 1 and (runner.model.head.weight == 1).all()
    return [runner.model.backbone]


def inside_a_detector(arch, fmt, folder):
    net = Net(arch)
    net.load_state_dict(whole(arch, fmt), strict=True)
    assert (net.head.weight == 1).all()
    return [net.backbone]


def inside_ddp(arch, fmt, folder):
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder / "group"}', rank=0, world_size=1
    )
    try:
        net = DistributedDataParallel(Net(arch))
        weights = {f'module.{key}': value for key, value in whole(arch, fmt).items()}
        net.load_state_dict(weights, strict=True)
    finally:
        torch.distributed.destroy_process_group()
    return [net.module.backbone]


def inside_ema(arch, fmt, folder):
    net = ExponentialMovingAverage(Net(arch))
    weights = {f'module.{key}': value for key, value in whole(arch, fmt).items()}
    net.load_state_dict(weights | {'steps': torch.tensor(7)}, strict=True)
    return [net.module.backbone]


def inside_teacher_and_student(arch, fmt, folder):
    net = SemiBaseDetector(dict(type=Net, arch=arch), semi_train_cfg={})
    net.load_state_dict(whole(arch, fmt), strict=True)
    return [net.teacher.backbone, net.student.backbone]


WAYS = (
    by_load_state_dict, by_pretrained, by_load_checkpoint, by_load_from, by_resume,
    inside_a_detector, inside_ddp, inside_ema, inside_teacher_and_student,
)  # fmt: skip


def check(backbones, arch):
    expected = bare_backbone(published(arch))
    for backbone in backbones:
        state = backbone.state_dict()
        assert state.keys() == expected.keys()
        wrong = [key for key in expected if not torch.equal(state[key], expected[key])]
        assert not wrong


@pytest.mark.parametrize('way', WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(('arch', 'fmt'), PAIRS)
def test_every_format_of_every_arch_arrives_in_every_way(arch, fmt, way, tmp_path):
    """All backbone tensors arrive, bit for bit, and the load is strict."""
    runtime.setup()
    check(way(arch, fmt, tmp_path), arch)


# What people wrap around weights

PREFIXES = (
    'encoder.', 'encoder.encoder.', '_orig_mod.', 'model.backbone.', 'net.', 'backbone.bottom_up.',
    'backbone.0.body.', 'teacher.backbone.',
)  # fmt: skip
DICTS = ('model_state_dict', 'net', 'module', 'ema', 'my_weights')


def wrapped(prefix='', name=None):
    weights = {f'{prefix}{key}': value for key, value in published('b0').items()}
    optimizer = {'state': {i: {'exp_avg': torch.ones(1)} for i in range(999)}}
    return {'optimizer': optimizer, name: weights, 'epoch': 3} if name else weights


def features_only():
    """timm's names for a model that returns its features."""
    timm = published('b0', 'timm').items()
    return {re.sub(r'^stages\.', 'stages_', key): value for key, value in timm}


WRAPPED = {
    **{prefix: functools.partial(wrapped, prefix) for prefix in PREFIXES},
    **{name: functools.partial(wrapped, 'module.', name) for name in DICTS},
    'features_only': features_only,
}


def wrapped_by_load_state_dict(file):
    backbone = backbone_class('b0')(narrow('b0'))
    backbone.load_state_dict(read_checkpoint(file), strict=True)
    return backbone


def wrapped_by_pretrained(file):
    backbone = backbone_class('b0')(
        narrow('b0'), init_cfg=dict(type='Pretrained', checkpoint=str(file))
    )
    backbone.init_weights()
    return backbone


def wrapped_by_load_checkpoint(file):
    backbone = backbone_class('b0')(narrow('b0'))
    load_checkpoint(backbone, str(file), strict=True)
    return backbone


def wrapped_by_load_from(file):
    runner = runner_of(Net('b0'), file.parent, load_from=str(file))
    runner.load_or_resume()
    return runner.model.backbone


@pytest.mark.parametrize('kind', WRAPPED)
@pytest.mark.parametrize(
    'way',
    [
        wrapped_by_load_state_dict, wrapped_by_pretrained, wrapped_by_load_checkpoint,
        wrapped_by_load_from,
    ],
    ids=lambda way: way.__name__,
)  # fmt: skip
def test_wrapped_weights_arrive_in_every_way(kind, way, tmp_path):
    """Prefixes and dicts of segmentation encoders, compilers, Lightning, DETR, teachers, EMA."""
    runtime.setup()
    torch.save(WRAPPED[kind](), tmp_path / 'w.pth')
    check([way(tmp_path / 'w.pth')], 'b0')


@pytest.mark.parametrize('prefix', ['_orig_mod.', 'model.', 'module.net.'])
@pytest.mark.parametrize('resume', [False, True])
def test_a_wrapped_training_arrives_whole(prefix, resume, tmp_path):
    """load_from and resume take the head as well as the backbone out of a compiled model's file."""
    runtime.setup()
    weights = {f'{prefix}{key}': value for key, value in whole('b0', 'official').items()}
    torch.save(STATE | {'state_dict': weights}, tmp_path / 'w.pth')
    runner = runner_of(Net('b0'), tmp_path, load_from=str(tmp_path / 'w.pth'), resume=resume)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.load_or_resume()
    check([runner.model.backbone], 'b0')
    assert (runner.model.head.weight == 1).all()
    assert runner.iter == (1 if resume else 0)


def test_of_two_encoders_the_config_chooses(tmp_path):
    """weights_prefix stands in the backbone, so that it holds in every way; without it: refused."""
    runtime.setup()
    other = {key: torch.zeros_like(value) for key, value in published('b0').items()}
    weights = {f'depth.{key}': value for key, value in published('b0').items()}
    torch.save({'net': weights | {f'rgb.{k}': v for k, v in other.items()}}, tmp_path / 'w.pth')
    for way in (wrapped_by_load_state_dict, wrapped_by_pretrained, wrapped_by_load_from):
        with pytest.raises(CheckpointMismatchError, match="'depth.' .*'rgb.' .*weights_prefix="):
            way(tmp_path / 'w.pth')
    backbone = backbone_class('b0')(
        narrow('b0'),
        weights_prefix='depth.',
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth')),
    )
    net = Net(copy.deepcopy(backbone))
    backbone.init_weights()
    runner_of(net, tmp_path, load_from=str(tmp_path / 'w.pth')).load_or_resume()
    check([backbone, net.backbone], 'b0')
    net.load_state_dict(Net('b0').state_dict())  # a file of its own has nothing to choose


def test_mmengines_own_prefix_chooses_too(tmp_path):
    """init_cfg=dict(prefix=...) is mmengine's argument; a wrong one lists what there is."""
    runtime.setup()
    weights = {f'rgb.{key}': value for key, value in published('b0').items()}
    torch.save({'state_dict': weights}, tmp_path / 'w.pth')
    for prefix, fault in (('rgb', None), ('rgb.', None), ('nir', 'no keys under .nir')):
        init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth'), prefix=prefix)
        backbone = backbone_class('b0')(narrow('b0'), init_cfg=init_cfg)
        if fault:
            with pytest.raises(CheckpointMismatchError, match=rf'w\.pth: .*{fault}.* such as rgb'):
                backbone.init_weights()
        else:
            backbone.init_weights()
            check([backbone], 'b0')


# Tools


@pytest.fixture
def seen(monkeypatch):
    """The models that Runners and Predictors load; the test loop itself does nothing."""
    models = []
    run_test, init = Runner.test, inference.Predictor.__init__

    def test(runner):
        models.append(runner.model)
        return run_test(runner)

    def start(predictor, *args, **kwargs):
        init(predictor, *args, **kwargs)
        models.append(predictor.model)

    monkeypatch.setattr(Runner, 'test', test)
    monkeypatch.setattr(loops.TestLoop, 'run', lambda loop: {})
    monkeypatch.setattr(Runner, '_log_env', lambda *args: None)
    monkeypatch.setattr(inference.Predictor, '__init__', start)
    monkeypatch.setattr(inference.Predictor, '__call__', lambda predictor, image: None)
    monkeypatch.setattr(inference.Predictor, 'draw', lambda *args: None)
    monkeypatch.setattr(inference.Predictor, 'as_json', lambda *args: {'objects': []})
    monkeypatch.setattr(mmengine.config.utils, 'load', read_metafile)
    return models


@pytest.fixture
def detector_config(small_config):
    """Write a small RetinaNet's config on a narrow arch."""

    def write(arch):
        return small_config(
            'det',
            f'model["backbone"] = dict(_delete_=True, type={backbone_class(arch).__name__!r}, '
            f'arch={narrow(arch)!r})\nmodel["neck"]["in_channels"] = {list(narrow(arch)["dims"])}',
        )

    return write


@pytest.mark.parametrize(
    ('arch', 'fmt', 'wrapper'),
    [
        *[(*pair, 'state_dict') for pair in FEW],
        ('b0', 'official', 'model'),
        ('b0', 'timm', None),
        ('b0', 'huggingface', 'model_state_dict'),
    ],
)
@pytest.mark.parametrize('tool', ['test', 'infer'])
def test_tools_take_a_whole_detector(
    arch, fmt, tool, wrapper, seen, detector_config, demo_data, run_tool, tmp_path
):
    """tools/test.py and tools/infer.py load a detector whose backbone is in any format."""
    config = detector_config(arch)
    init_default_scope('mmdet')
    cfg = Config.fromfile(config)
    others = {
        key: torch.full_like(value, 0.5)
        for key, value in MODELS.build(cfg.model).state_dict().items()
        if not key.startswith('backbone.')
    }
    backbone = {f'backbone.{key}': value for key, value in published(arch, fmt).items()}
    outer = '' if wrapper in ('state_dict', 'model') else '_orig_mod.model.'
    weights = {f'{outer}{key}': value for key, value in (backbone | others).items()}
    torch.save({wrapper: weights} if wrapper else weights, tmp_path / 'w.pth')
    if tool == 'test':
        run_tool('test', config, tmp_path / 'w.pth', '--data-root', demo_data / 'coco')
    else:
        run_tool('infer', config, tmp_path / 'w.pth', 'x.jpg')
    (model,) = seen
    check([model.backbone], arch)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in others.items())


# Whole checkpoints of mmdet 2.x and mmseg 0.x

MODEL_NAMES = ('retinanet', 'mask_rcnn', 'semantic_fpn')


def config_of(model, arch):
    """The name of our config: the reference writes pvt_t, pvt_v2_b0, and pvtv2_b0 for ADE20K."""
    if model == 'semantic_fpn':
        return f'fpn_{f"pvt_{arch[0]}" if arch in V1 else f"pvtv2_{arch}"}_ade20k_40k.py'
    return f'{model}_{f"pvt_{arch[0]}" if arch in V1 else f"pvt_v2_{arch}"}_fpn_1x_coco.py'


def build_from_config(name, **head):
    with mock.patch('mmengine.config.utils.load', read_metafile):
        cfg = Config.fromfile(REPO / 'configs' / name)
    init_default_scope(cfg.default_scope)
    if head:
        cfg.model.bbox_head.update(head)
    return MODELS.build(cfg.model)


def old_checkpoint(model, arch, fill):
    """The weights of a whole model as mmdet 2.x or mmseg 0.x saved it: key -> fill(shape)."""
    dims = backbone_class(arch).ARCHS[arch]['dims']
    weights = {}
    for key, shape in load_json('checkpoint_keys.json')[arch]['official'].items():
        if not key.startswith(('head.', 'norm.')) and key != 'cls_token':
            weights[f'backbone.{key}'] = fill(shape)
    for key, shape in OLD_KEYS[model].items():
        sizes = [n if isinstance(n, int) else dims[int(n[5])] for n in shape]  # 'dims[1]'
        weights[key] = fill(sizes) if sizes else torch.tensor(9)  # batches that a norm has seen
    return weights


@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.parametrize('model', MODEL_NAMES)
def test_published_checkpoints_of_older_versions_fit(model, arch):
    """Every key and shape of mmdet 2.x and mmseg 0.x has its place in our config's model."""
    with torch.device('meta'):
        net = build_from_config(config_of(model, arch))
        weights = old_checkpoint(model, arch, torch.empty)
    net.load_state_dict(weights, strict=True)


@pytest.mark.parametrize('model', MODEL_NAMES)
def test_published_checkpoints_of_older_versions_load(model, tmp_path):
    """Neck and heads too hold the file's numbers after load_from."""
    generator = torch.Generator().manual_seed(5)
    weights = old_checkpoint(model, 'b0', lambda shape: torch.randn(shape, generator=generator))
    torch.save({'meta': {}, 'state_dict': weights}, tmp_path / 'w.pth')
    runtime.setup()
    runner = runner_of(build_from_config(config_of(model, 'b0')), tmp_path)
    runner.load_checkpoint(str(tmp_path / 'w.pth'), strict=True)
    state = convert_checkpoint(runner.model.state_dict(), to='official')
    assert state.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(state[key], value), key


def test_coco_weights_with_another_head_only_warn(tmp_path, capsys):
    """Fine-tuning on 5 classes from COCO's 80: all but the classifier arrives by load_from."""
    generator = torch.Generator().manual_seed(5)
    weights = old_checkpoint(
        'retinanet', 'b0', lambda shape: torch.randn(shape, generator=generator)
    )
    torch.save({'state_dict': weights}, tmp_path / 'coco.pth')
    net = build_from_config(config_of('retinanet', 'b0'), num_classes=5)
    before = net.bbox_head.retina_cls.weight.clone()
    runtime.setup()
    runner = runner_of(net, tmp_path, load_from=str(tmp_path / 'coco.pth'))
    runner.load_or_resume()
    printed = capsys.readouterr()
    assert 'size mismatch for bbox_head.retina_cls.weight' in printed.out + printed.err
    state = convert_checkpoint(net.state_dict(), to='official')
    for key, value in weights.items():
        assert torch.equal(state[key], value) is not key.startswith('bbox_head.retina_cls'), key
    assert torch.equal(net.bbox_head.retina_cls.weight, before)


# Training runs


def test_a_training_checkpoint_resumes(tmp_path):
    """mmengine's own file, log buffers and all, is read safely and goes on where it stopped."""
    runtime.setup()
    first = runner_of(Net(small('v2')), tmp_path / 'run')
    first.train()
    saved = read_checkpoint(tmp_path / 'run' / 'epoch_1.pth')
    scalars = saved['message_hub']['log_scalars']
    assert any(isinstance(scalar, HistoryBuffer) for scalar in scalars.values())
    model = Net(small('v2'))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    again = runner_of(
        model, tmp_path / 'run', load_from=str(tmp_path / 'run' / 'epoch_1.pth'), resume=True
    )
    again._train_loop['max_epochs'] = 2
    again.train()
    assert (again.epoch, again.iter) == (2, 4)
    for key, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value)


@pytest.mark.parametrize('fmt', ['official', 'timm', 'huggingface', 'mmdet'])
def test_the_averaged_model_gets_published_weights_too(fmt, tmp_path):
    """With EMAHook, load_from fills both the model and its average; training then resumes."""
    runtime.setup()
    torch.save(published('b0', fmt), tmp_path / 'w.pth')
    hook = dict(type='EMAHook')
    runner = runner_of(
        Net('b0'), tmp_path / 'run', load_from=str(tmp_path / 'w.pth'), custom_hooks=[hook]
    )
    runner.train()
    (ema,) = [hook.ema_model for hook in runner.hooks if hasattr(hook, 'ema_model')]
    check([runner.model.backbone], 'b0')
    for key, value in runner.model.backbone.state_dict().items():  # averaging rounds
        torch.testing.assert_close(ema.module.backbone.state_dict()[key], value)
    again = runner_of(
        Net('b0'),
        tmp_path / 'run',
        load_from=str(tmp_path / 'run' / 'epoch_1.pth'),
        resume=True,
        custom_hooks=[hook],
    )
    again._train_loop['max_epochs'] = 2
    again.train()
    check([again.model.backbone], 'b0')


def test_the_hook_fills_every_backbone(tmp_path):
    """Bare weights given to a teacher and student reach both; so does a whole detector's file."""
    runtime.setup()
    for weights in (published('b0'), {'state_dict': whole('b0', 'official')}):
        net = SemiBaseDetector(dict(type=Net, arch='b0'), semi_train_cfg={})
        torch.save(weights, tmp_path / 'w.pth')
        runner = runner_of(net, tmp_path, load_from=str(tmp_path / 'w.pth'))
        runner.load_or_resume()
        check([net.teacher.backbone, net.student.backbone], 'b0')


@pytest.mark.parametrize('resume', [False, True])
def test_a_runner_refuses_another_arch(resume, tmp_path):
    """load_from and resume are never strict in mmengine; the refusal holds all the same."""
    runtime.setup()
    torch.save(STATE | {'state_dict': whole('b1', 'official')}, tmp_path / 'w.pth')
    runner = runner_of(Net('b0'), tmp_path, load_from=str(tmp_path / 'w.pth'), resume=resume)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    with pytest.raises(CheckpointMismatchError, match='do not fit PVTv2'):
        runner.load_or_resume()


class ReadsAnother(Hook):
    """Read a second file after the first and before that is loaded, as for a teacher's weights."""

    def __init__(self, file):
        self.file = file

    def after_load_checkpoint(self, runner, checkpoint):
        read_checkpoint(self.file)


def load_in_runner(first, second, config):
    runner = runner_of(Net('b0'), first.parent, load_from=str(first))
    runner.register_hook(ReadsAnother(second))
    name_loaded_file(runner)
    runner.load_or_resume()


def load_in_module(first, second, config):
    init_cfg = dict(type='Pretrained', checkpoint=str(first))
    backbone = backbone_class('b0')(narrow('b0'), init_cfg=init_cfg)
    with mock.patch.object(loaders.safe_load, 'drop_config', lambda _: read_checkpoint(second)):
        backbone.init_weights()


def load_in_predictor(first, second, config):
    with mock.patch.object(loaders.safe_load, 'drop_config', lambda _: read_checkpoint(second)):
        inference.Predictor(Config.fromfile(config), str(first), 'cpu')


@pytest.mark.parametrize('load', [load_in_runner, load_in_module, load_in_predictor])
def test_an_error_names_the_file_that_does_not_fit(load, tmp_path, small_config, demo_data):
    """Of two files, read one after the other, the first does not fit: it is the one named."""
    runtime.setup()
    first, second = tmp_path / 'first.pth', tmp_path / 'second.pth'
    torch.save({'state_dict': whole('b1', 'official')}, first)
    torch.save({'state_dict': whole('b0', 'official')}, second)
    with pytest.raises(CheckpointMismatchError) as refusal:
        load(first, second, small_config('det'))
    assert str(refusal.value).startswith(f'{first}: The weights do not fit PVT')
    assert refusal.value.file == str(first)


def test_weights_without_a_file_name_none():
    """A state dict may come from anywhere."""
    with pytest.raises(CheckpointMismatchError, match='^The weights do not fit PVTv2') as refusal:
        small('v2').load_state_dict(published('b1'))
    assert refusal.value.file is None


# Safe reading


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch {self.marker}',)


def give_to_pretrained(path):
    start_from(path)


def give_to_load_from(path):
    runner_of(Net('b0'), os.path.dirname(path), load_from=path).load_or_resume()


def give_to_resume(path):
    runner = runner_of(Net('b0'), os.path.dirname(path), load_from=path, resume=True)
    runner.load_or_resume()


def give_to_reader(path):
    read_checkpoint(path)


@pytest.mark.parametrize(
    'give', [give_to_pretrained, give_to_load_from, give_to_resume, give_to_reader],
    ids=lambda give: give.__name__,
)  # fmt: skip
def test_a_file_that_wants_to_run_code_is_refused(give, tmp_path):
    """The refusal names what the file wanted to call; nothing ran."""
    runtime.setup()
    path = tmp_path / 'evil.pth'
    torch.save({'state_dict': whole('b0', 'official'), 'x': Malicious(tmp_path / 'ran')}, path)
    with pytest.raises(UserError, match=r'evil\.pth was refused: .*\bsystem\b') as refusal:
        give(str(path))
    assert '\n' not in str(refusal.value)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('arguments', [('--inspect',), ('out.pth', '--to', 'mmdet')])
def test_the_convert_tool_refuses_such_a_file(arguments, run_tool, tmp_path, capsys):
    """One sentence, exit code 1, no output file."""
    torch.save({'state_dict': {}, 'x': Malicious(tmp_path / 'ran')}, tmp_path / 'evil.pth')
    with pytest.raises(SystemExit) as stopped:
        run_tool('convert_checkpoint', tmp_path / 'evil.pth', *arguments)
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r'was refused: .*\bsystem\b', line)
    assert sorted(os.listdir(tmp_path)) == ['evil.pth']


class Attribute:
    """Pickles as getattr(owner, name)."""

    def __init__(self, owner, name):
        self.call = getattr, (owner, name)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    'attribute',
    [
        Attribute(HistoryBuffer, '__init__'),
        Attribute(HistoryBuffer, '_statistics_methods'),
        Attribute(Attribute(HistoryBuffer, 'mean'), '__globals__'),
        Attribute(torch.Tensor([1]), 'numpy'),
    ],
    ids=['__init__', 'register', '__globals__', 'tensor'],
)
def test_getattr_reaches_only_statistics(attribute, tmp_path):
    """The getattr that training checkpoints name answers four methods of HistoryBuffer alone."""
    runtime.setup()
    torch.save({'x': Attribute(HistoryBuffer, 'mean')}, tmp_path / 'good.pth')
    assert read_checkpoint(tmp_path / 'good.pth')['x'] is HistoryBuffer.mean
    torch.save({'x': attribute}, tmp_path / 'bad.pth')
    with pytest.raises(UserError, match='may not read'):
        read_checkpoint(tmp_path / 'bad.pth')


# URLs


def start_from(url):
    backbone = backbone_class('b0')(narrow('b0'), init_cfg=dict(type='Pretrained', checkpoint=url))
    backbone.init_weights()
    return backbone


def test_a_url_is_fetched_once_and_its_hash_checked(site):
    """A name with a hash is checked against it; the cached copy serves the next time."""
    folder, address, cache = site
    torch.save(published('b0'), folder / 'plain.pth')
    digest = hashlib.sha256((folder / 'plain.pth').read_bytes()).hexdigest()[:8]
    name = f'weights-{digest}.pth'
    (folder / 'plain.pth').rename(folder / name)
    check([start_from(f'{address}/{name}')], 'b0')
    (folder / name).unlink()
    check([start_from(f'{address}/{name}')], 'b0')
    assert [file.name for file in cache.iterdir()] == [name]


def test_a_wrong_hash_is_refused(site):
    """What was fetched is not kept."""
    folder, address, cache = site
    torch.save(published('b0'), folder / 'weights-01234567.pth')
    with pytest.raises(UserError, match='hash'):
        start_from(f'{address}/weights-01234567.pth')
    assert not list(cache.iterdir())


def test_offline_the_message_says_which_file_to_put_where(site):
    """And a file put there is taken without the network."""
    folder, address, cache = site
    url = f'{address}/missing.pth'
    with pytest.raises(UserError) as refusal:
        start_from(url)
    assert url in str(refusal.value) and str(cache / 'missing.pth') in str(refusal.value)
    torch.save(published('b0'), cache / 'missing.pth')
    check([start_from(url)], 'b0')
