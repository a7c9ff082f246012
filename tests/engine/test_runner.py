"""build_runner: one call gives a script what the tools do, in training and in testing."""

from unittest import mock

import pytest
import torch
from conftest import forget_runs, losses
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.utils import ManagerMixin

from pvt_mm.config import load_config
from pvt_mm.engine import build_runner
from pvt_mm.engine.options import enable_amp, enable_tta, show_predictions
from pvt_mm.errors import DataError, UserError


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Load the config of a finished training, for a script of a user's own."""

    def load(first, **more):
        forget_runs(ManagerMixin)
        cfg = load_config(str(first.config), data_root=str(first.data[1]))
        cfg.merge_from_dict({'work_dir': str(tmp_path / 'run'), 'randomness': dict(seed=1), **more})
        return cfg

    return load


@pytest.mark.parametrize('task', ['det', 'seg'])
def test_a_script_trains_as_the_tool_does(task, trained, script, tmp_path):
    """The same losses, from a Runner with every hook that tools/train.py gives."""
    first = trained(task)
    runner = build_runner(script(first), config=str(first.config), train=True)
    names = [type(hook).__name__ for hook in runner.hooks]
    for name in ('PVTCheckpointHook', 'NonFiniteHook', 'TrainingSummaryHook'):
        assert names.count(name) == 1, name
    assert 'ResumableCheckpointHook' in names
    runner.train()
    assert losses(tmp_path / 'run') == losses(first.work_dir)
    assert type(runner.train_dataloader.batch_sampler).__name__ == 'ResumableBatchSampler'


def test_a_script_goes_on_with_a_training(trained, script, tmp_path):
    """With resume='auto' a second call goes on where the first one stopped."""
    first, longer = trained('seg'), {'train_cfg.max_iters': 5, 'resume': 'auto'}
    build_runner(script(first, resume='auto'), config='x.py', train=True).train()
    build_runner(script(first, **longer), config='x.py', train=True).train()
    assert len(losses(tmp_path / 'run')) == 2


def test_a_script_tests_as_the_tool_does(trained, script, tmp_path):
    """The scores of the validation at the end of training; published weights are not fetched."""
    first = trained('det')
    init = {'model.backbone.init_cfg': dict(type='Pretrained', checkpoint='https://nowhere/x.pth')}
    cfg = script(first, load_from=str(first.checkpoint), resume=True, **init)
    scores = build_runner(cfg, config='x.py', train=False).test()
    assert 'coco/bbox_mAP' in scores and cfg.resume is False


def test_a_test_refuses_a_backbone_alone(trained, script, tmp_path):
    """A training takes such a file, and the error of a test names it."""
    first = trained('det')
    weights = torch.load(first.checkpoint, weights_only=True)['state_dict']
    bare = {key: value for key, value in weights.items() if key.startswith('backbone.')}
    torch.save(bare, tmp_path / 'bare.pth')
    cfg = script(first, load_from=str(tmp_path / 'bare.pth'))
    with pytest.raises(RuntimeError, match=r'^\S+/bare\.pth: These weights are of a backbone'):
        build_runner(cfg, config='x.py', train=False).test()


def test_what_does_not_fit_is_told_before_a_runner_is_built(trained, script, tmp_path):
    """Data, classes and weights are looked at first, and no work dir is made."""
    first = trained('det')
    cases = {
        'train_dataloader.dataset.ann_file': ('none.json', 'none.json is missing'),
        'model.bbox_head.num_classes': (7, r'x\.py has model\.bbox_head\.num_classes=7'),
        'load_from': (str(tmp_path / 'none.pth'), 'There is no checkpoint'),
        'model.backbone.init_cfg': (
            dict(type='Pretrained', checkpoint='none.pth'), 'There is no checkpoint none.pth'
        ),
        'default_scope': ('mmpose', "default_scope='mmpose'"),
    }  # fmt: skip
    for key, (value, message) in cases.items():
        with pytest.raises(UserError, match=message):
            build_runner(script(first, **{key: value}), config='x.py', train=True)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            dict(runner_type='FlexibleRunner', strategy=dict(type='FSDPStrategy')),
            "has runner_type='FlexibleRunner' and strategy='FSDPStrategy', which this tool",
        ),
        (dict(runner_type='FlexibleRunner'), "has runner_type='FlexibleRunner', which"),
        (dict(strategy=dict(type='DDPStrategy')), "has strategy='DDPStrategy', which"),
        (dict(runner_type='OwnRunner'), "has runner_type='OwnRunner', which"),
        (dict(launcher='pytorch'), '--launcher pytorch needs RANK'),
    ],
)
@pytest.mark.parametrize('train', [True, False])
def test_another_runner_is_refused(change, message, train, trained, script, tmp_path):
    """It would be left out without a word: exact resume builds on mmengine's Runner."""
    with pytest.raises(UserError, match=message):
        build_runner(script(trained('det'), **change), config='x.py', train=train)
    assert not (tmp_path / 'run').exists()


def test_a_runner_of_ones_own_is_taken(trained, script):
    """What is made from mmengine's Runner has all that is built upon."""

    class OwnRunner(Runner):
        pass

    cfg = script(trained('det'))
    for name in ('OwnRunner', 'Runner'):
        with mock.patch.dict(RUNNERS.module_dict, OwnRunner=OwnRunner):
            cfg.runner_type = name
            forget_runs(ManagerMixin)
            runner = build_runner(cfg, config='x.py', train=True)
        assert type(runner).__name__ == name


def test_mixed_precision_replaces_no_other_wrapper():
    """--amp would drop what another wrapper does."""
    for kind in (None, 'OptimWrapper', 'AmpOptimWrapper', 'mmengine.OptimWrapper', OptimWrapper):
        cfg = Config(dict(optim_wrapper=dict(type=kind) if kind else {}))
        enable_amp(cfg)
        assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    with pytest.raises(UserError, match='but the config has ApexOptimWrapper'):
        enable_amp(Config(dict(optim_wrapper=dict(type='ApexOptimWrapper'))))


@pytest.mark.parametrize('name', ['train', 'test'])
def test_a_lost_worker_is_one_sentence_in_every_tool(name, trained, failing, monkeypatch, tmp_path):
    """Each names the dataloaders that it reads."""

    def lose(runner):
        raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.')

    monkeypatch.setattr(Runner, name, lose)
    first = trained('det')
    checkpoint = [first.checkpoint] if name == 'test' else []
    message = failing(name, first.config, *checkpoint, *first.data, '--work-dir', tmp_path / 'run')
    assert 'a process that loads data exited unexpectedly' in message.replace(': A', ': a')
    assert f'{name}_dataloader.num_workers=0' in message


def test_pictures_need_the_hook_that_draws():
    """A config without it is told which one."""
    for hooks in ({}, dict(default_hooks=None), dict(default_hooks=dict(visualization=None))):
        with pytest.raises(UserError, match="visualization=dict.type='SegVisualizationHook'"):
            show_predictions(Config(dict(default_scope='mmseg', **hooks)), 'pictures')


def test_classes_are_named_without_the_wrapper_of_test_time_augmentation(trained, script):
    """What the message says to set is a key of the config, which has no ``module``."""
    cfg = script(trained('det'), **{'model.bbox_head.num_classes': 7})
    enable_tta(cfg)
    with pytest.raises(UserError, match=r'set model\.bbox_head\.num_classes=5 in the config'):
        build_runner(cfg, config='x.py', train=False)


@pytest.mark.parametrize('skip', [False, True])
def test_bad_images_stop_or_are_skipped(skip, trained, script, demo_data, tmp_path):
    """As the argument says."""
    first = trained('det')
    cfg = script(first)
    broken = sorted((demo_data / 'coco/train2017').iterdir())[0]
    folder = tmp_path / 'train2017'
    folder.mkdir()
    for image in broken.parent.iterdir():
        content = image.read_bytes()
        (folder / image.name).write_bytes(content[:99] if image == broken else content)
    cfg.train_dataloader.dataset.data_prefix.img = str(folder)
    runner = build_runner(cfg, config='x.py', train=True, skip_bad_images=skip)
    if skip:
        runner.train()
        assert runner.iter == 3
    else:
        with pytest.raises(DataError, match=broken.name):
            runner.train()
