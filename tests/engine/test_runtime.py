"""What is mended around mmengine: safe reading, bf16 on a CPU, configs without CUDA."""

import datetime
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MessageHub

from pvt_mm import cli
from pvt_mm.checkpoint import safe_load
from pvt_mm.checkpoint.safe_load import read_checkpoint
from pvt_mm.config import datasets, set_data_root, task_of
from pvt_mm.engine import runtime
from pvt_mm.engine.distributed import check_launcher
from pvt_mm.errors import UserError

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason='there is CUDA')


def test_importing_the_package_changes_nothing_else():
    """No safe globals, no loaders, neither codebase: that is setup()'s and the configs' part."""
    code = (
        'import sys, torch, pvt_mm; '
        'from mmengine.runner.checkpoint import CheckpointLoader as loader; '
        'allowed = getattr(torch.serialization, "get_safe_globals", list); '
        'assert "getattr" not in str(allowed()); '
        'assert all(f.__module__.startswith("mmengine") for f in loader._schemes.values()); '
        'assert not {"mmdet", "mmseg"} & set(sys.modules)'
    )
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)


def test_log_buffers_come_back_from_a_safe_load(tmp_path):
    """A message hub's scalars, as mmengine saves them, load with weights_only."""
    runtime.setup()
    hub = MessageHub('saved')
    for value in (1.0, 2.0, 6.0):
        hub.update_scalar('train/loss', value)
    path = tmp_path / 'hub.pth'
    torch.save({'message_hub': hub.state_dict(), 'number': np.float64(3)}, path)
    loaded = read_checkpoint(path)
    buffer = loaded['message_hub']['log_scalars']['train/loss']
    assert isinstance(buffer, HistoryBuffer)
    assert buffer.mean() == 3.0 and buffer.max() == 6.0 and buffer.current() == 6.0
    assert loaded['number'] == 3


@pytest.mark.parametrize(
    ('owner', 'name'),
    [(HistoryBuffer, '__init__'), (HistoryBuffer, 'register_statistics'), (list, 'min')],
)
def test_the_narrow_getattr_answers_nothing_else(owner, name, tmp_path):
    """A file that asks getattr for anything but the four statistics is refused."""
    runtime.setup()

    class Reaches:
        def __reduce__(self):
            return getattr, (owner, name)

    torch.save({'x': Reaches()}, tmp_path / 'reaching.pth')
    with pytest.raises(UserError, match='was refused'):
        read_checkpoint(tmp_path / 'reaching.pth')


@pytest.mark.skipif(not safe_load.takes_safe_globals(), reason='needs PyTorch 2.6')
def test_setup_twice_is_setup_once():
    """A second call adds nothing."""
    runtime.setup()
    before = torch.serialization.get_safe_globals()  # a list in no particular order
    runtime.setup()
    after = torch.serialization.get_safe_globals()
    assert len(after) == len(before) and set(after) == set(before)


@no_cuda
def test_a_config_is_adapted_to_the_cpu():
    """SyncBN becomes BN wherever it stands, and mixed precision the CPU's own."""
    cfg = Config(
        dict(
            model=dict(
                backbone=dict(type='PVT'),
                head=dict(norm_cfg=dict(type='SyncBN')),
                parts=[dict(type='SyncBN')],
            ),
            optim_wrapper=dict(type='AmpOptimWrapper', loss_scale='dynamic', optimizer=dict(lr=1)),
        )
    )
    runtime.setup(cfg)
    assert cfg.model.head.norm_cfg.type == 'BN' and cfg.model.parts[0].type == 'BN'
    assert cfg.model.backbone.compute_dtype == 'bfloat16'
    assert cfg.optim_wrapper.type == 'OptimWrapper'
    assert 'loss_scale' not in cfg.optim_wrapper and cfg.optim_wrapper.optimizer.lr == 1


@no_cuda
@pytest.mark.parametrize(('version', 'kept'), [('2.3.1+cpu', False), ('2.4.0', True)])
def test_fused_optimizers_are_for_a_torch_that_has_them(monkeypatch, version, kept):
    """Before 2.4 a CPU has none, and the plain one gives the same numbers in more time."""
    monkeypatch.setattr(torch, '__version__', version)
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type='AdamW', fused=True))))
    runtime.setup(cfg)
    assert cfg.optim_wrapper.optimizer.fused is kept


@no_cuda
def test_mixed_precision_needs_a_pvt():
    """Without one there is nothing that could run in bf16, and the message says so."""
    cfg = Config(dict(model=dict(type='ResNet'), optim_wrapper=dict(type='AmpOptimWrapper')))
    with pytest.raises(UserError, match='this config has none'):
        runtime.setup(cfg)


# Launchers


@pytest.fixture
def launched(monkeypatch):
    """Set what torchrun sets, for one process; a variable of None is missing."""

    def environment(**changes):
        alone = dict(RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500')
        for name, value in {**alone, **changes}.items():
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)

    return environment


@pytest.mark.parametrize('name', ['RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'])
def test_a_launcher_that_has_not_started_this_process_is_refused(name, launched):
    """mmengine would end in a traceback about the variable."""
    launched(**{name: None})
    with pytest.raises(UserError, match=f'--launcher pytorch needs {name} in the environment'):
        runtime.setup(Config(dict(launcher='pytorch')))


@no_cuda
@pytest.mark.parametrize('launcher', ['slurm', 'mpi'])
def test_other_launchers_need_cuda(launcher):
    with pytest.raises(UserError, match=f'--launcher {launcher} needs CUDA'):
        runtime.setup(Config(dict(launcher=launcher)))


@pytest.mark.parametrize('launcher', ['slurm', 'mpi'])
def test_other_launchers_are_asked_for_with_cuda(launcher, monkeypatch):
    """Each has its own variables, and its own way to start."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    with pytest.raises(UserError, match=f'--launcher {launcher} needs (SLURM|OMPI)_'):
        check_launcher(launcher)


def test_processes_that_would_each_train_alone_are_refused(launched, monkeypatch):
    """torchrun without --launcher: each process would write the same work dir."""
    launched(TORCHELASTIC_RUN_ID='none', WORLD_SIZE='2')
    with pytest.raises(UserError, match='started 2 processes, but each would run alone; add'):
        check_launcher('none')
    launched(TORCHELASTIC_RUN_ID='none')
    check_launcher('none')
    launched(TORCHELASTIC_RUN_ID=None, WORLD_SIZE='2')  # a cluster's variable
    check_launcher('none')


@pytest.fixture
def gloo(monkeypatch):
    """Note what a process group is started with, and start none."""
    started = []
    monkeypatch.setattr(
        torch.distributed, 'init_process_group', lambda *args, **more: started.append((args, more))
    )
    return started


@no_cuda
def test_what_a_config_says_of_its_processes_is_obeyed(launched, gloo):
    """Its wrapper's arguments and timeout; only devices and SyncBN are the GPU's."""
    launched()
    cfg = Config(
        dict(
            launcher='pytorch',
            model_wrapper_cfg=dict(type='MMDistributedDataParallel', static_graph=True),
            find_unused_parameters=True,
            sync_bn='torch',
            model=dict(norm_cfg=[dict(type='MMSyncBN'), dict(type='SyncBN')]),
            env_cfg=dict(dist_cfg=dict(backend='nccl', timeout=90)),
        )
    )
    runtime.setup(cfg)
    assert cfg.model_wrapper_cfg == dict(
        type='MMDistributedDataParallel',
        static_graph=True,
        broadcast_buffers=False,
        find_unused_parameters=True,
        device_ids=None,
    )
    assert [norm.type for norm in cfg.model.norm_cfg] == ['BN', 'BN'] and 'sync_bn' not in cfg
    assert gloo == [(('gloo',), dict(timeout=datetime.timedelta(seconds=90)))]


@no_cuda
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            dict(model_wrapper_cfg=dict(type='MMFullyShardedDataParallel')),
            'type=MMFullyShardedDataParallel needs CUDA; leave model_wrapper_cfg out',
        ),
        (dict(env_cfg=dict(dist_cfg=dict(timeout='1h'))), "timeout='1h' must be a number"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(change, message, launched, gloo):
    launched()
    with pytest.raises(UserError, match=message):
        runtime.setup(Config(dict(launcher='pytorch', **change)))
    assert not gloo


# Configs


def nested():
    """A config whose data sets stand in wrappers."""
    inner = dict(type='CocoDataset', data_root='data/coco/', ann_file='a.json')
    return Config(
        dict(
            data_root='data/coco/',
            train_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=inner)),
            val_dataloader=dict(dataset=dict(type='ConcatDataset', datasets=[dict(inner)] * 2)),
            val_evaluator=dict(ann_file='data/coco/annotations/a.json', other='data/coconut'),
        )
    )


def test_data_root_moves_every_path_and_no_other():
    """Data sets inside wrappers, evaluators and the bare key move; look-alikes stay."""
    cfg = nested()
    set_data_root(cfg, '/new/')
    assert {data.data_root for data in datasets(cfg)} == {'/new/'}
    assert len(list(datasets(cfg))) == 3
    assert cfg.val_evaluator == dict(ann_file='/new/annotations/a.json', other='data/coconut')
    assert cfg.data_root == '/new/'


def test_data_root_of_several_is_refused():
    """Which of two roots is meant cannot be told."""
    cfg = nested()
    cfg.val_dataloader.dataset.datasets[0].data_root = 'elsewhere'
    with pytest.raises(UserError, match=r"has \['data/coco/', 'elsewhere'\]"):
        set_data_root(cfg, '/new')


def test_names_of_results_do_not_collide():
    """Images of the same name from different folders get results of their own."""
    assert cli.unique_names(['a/x.jpg', 'b/x.png', 'x_2.jpg', 'c/x.jpg']) == [
        'x',
        'x_2',
        'x_2_2',
        'x_3',
    ]


def test_other_codebases_are_refused():
    """A config that is neither mmdet's nor mmseg's says so."""
    with pytest.raises(UserError, match="default_scope='mmpose'"):
        task_of(Config(dict(default_scope='mmpose')))
