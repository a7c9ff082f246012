"""What is mended around mmengine: safe reading, bf16 on a CPU, configs without CUDA."""

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
