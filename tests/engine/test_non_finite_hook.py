"""A training that diverges is stopped early, named, and leaves its checkpoint as it was."""

import hashlib
import re
import shutil

import pytest
import torch
from conftest import losses, scalars
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS

from pvt_mm.engine.non_finite_hook import finite_gradients

WITHOUT_VAL = (
    '--cfg-options',
    'val_cfg=None',
    'val_dataloader=None',
    'val_evaluator=None',
    'default_hooks.checkpoint.max_keep_ckpts=-1',
)


def weights(checkpoint):
    return torch.load(checkpoint, weights_only=True)['state_dict']


def test_a_diverging_training_stops_and_the_way_on_works(
    trained,
    failing,
    run_tool,
    tmp_path,
):
    """At lr 1e30 the second loss is not finite; the message says what to do, and that trains."""
    config, data, first_run, name = trained('seg')
    work_dir = shutil.copytree(first_run, tmp_path / 'run')
    kept = work_dir / name.name
    (work_dir / 'last_checkpoint').write_text(str(kept))
    before = hashlib.sha256(kept.read_bytes()).digest()
    run = ('train', config, *data, '--work-dir', work_dir)
    rate = ('--cfg-options', 'optim_wrapper.optimizer.lr=1e30', 'param_scheduler=None')
    message = failing(*run, '--load-from', kept, '--seed', 1, *rate)
    assert 'stopped at iteration 2: the loss is not finite (loss nan, decode.' in message
    assert re.search(r'images of the batch: \S+/ADE_train_0\d+\.jpg, \S+\.jpg\. ', message)
    assert f'The last checkpoint is {kept}: go on from it by --resume with gradient' in message
    assert f'with --load-from {kept} --cfg-options optim_wrapper.optimizer.lr=1e+29' in message
    assert hashlib.sha256(kept.read_bytes()).digest() == before
    assert list(work_dir.glob('*.pth')) == [kept]
    advice = re.search(r'(--resume) .*\((--cfg-options \S+)\)', message)
    options = [advice.group(1), *advice.group(2).split()]
    run_tool(*run, *options, 'train_cfg.max_iters=4')
    (entry,) = [entry for entry in scalars(work_dir) if 'loss' in entry]
    assert entry['step'] == 4 and entry['grad_norm'] > 0


@HOOKS.register_module()
class InfiniteGradient(Hook):
    """Make a gradient infinite, of a loss that is not, in the second to fourth iteration."""

    def before_train(self, runner):
        weight = runner.model.decode_head.conv_seg.weight
        weight.register_hook(lambda grad: grad * float('inf') if 1 <= runner.iter <= 3 else grad)


def infinite(patience):
    """What a config needs to meet infinite gradients."""
    return (
        f'custom_hooks = [dict(type="InfiniteGradient"), dict(type="NonFiniteHook", {patience=})]'
    )


def test_infinite_gradients_of_a_finite_loss_stop_training(
    small_config, failing, demo_data, tmp_path
):
    """After N updates in a row; none of them was made, so the last checkpoint is sound."""
    run = ('--data-root', demo_data / 'ade', '--work-dir', tmp_path / 'run', '--seed', 1)
    each = 'default_hooks.checkpoint.interval=1'
    message = failing('train', small_config('seg', infinite(patience=2)), *run, *WITHOUT_VAL, each)
    assert 'stopped at iteration 3: the gradients are not finite, in 2 update(s) in a' in message
    assert f'The last checkpoint is {tmp_path / "run/iter_2.pth"}: go on' in message
    first, last = (weights(tmp_path / f'run/iter_{i}.pth') for i in (1, 2))
    assert all(torch.equal(first[key], last[key]) for key in first if key.endswith('.weight'))
    assert all(value.isfinite().all() for value in last.values())
    assert not (tmp_path / 'run/iter_3.pth').exists()


@OPTIM_WRAPPERS.register_module()
class ScaledOptimWrapper(OptimWrapper):
    """Loss scaling as AmpOptimWrapper does it, on a CPU."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu')

    def backward(self, loss, **kwargs):
        self.loss_scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs):
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update()


@pytest.mark.skipif(not hasattr(torch.amp, 'GradScaler'), reason='this PyTorch scales on CUDA only')
@pytest.mark.parametrize(('fused', 'patience'), [(False, 3), (True, 4)])
def test_loss_scaling_may_look_for_its_scale(
    small_config, failing, run_tool, demo_data, tmp_path, fused, patience
):
    """Updates that a GradScaler goes without are allowed for, up to the patience."""
    run = (
        *('train', small_config('seg', infinite(patience))),
        *('--data-root', demo_data / 'ade', '--work-dir', tmp_path / 'run', '--seed', 1),
        *WITHOUT_VAL,
        'optim_wrapper.type=ScaledOptimWrapper',
        f'optim_wrapper.optimizer.fused={fused}',
        'train_cfg.max_iters=5',
        'default_hooks.checkpoint.interval=5',
    )
    if patience == 3:
        assert 'iteration 4: the gradients are not finite, in 3 update' in failing(*run)
        return
    run_tool(*run)
    assert len(losses(tmp_path / 'run')) == 5
    saved = torch.load(tmp_path / 'run/iter_5.pth', weights_only=True)
    assert saved['optimizer']['state'][0]['step'] == 2, 'of five updates three were not made'
    assert all(value.isfinite().all() for value in saved['state_dict'].values())


def test_finite_is_what_is_finite():
    """Large is finite, also where its square is not; NaN and infinity are not; no gradient is."""

    def parameter(value):
        made = torch.nn.Parameter(torch.ones(3))
        if value is not None:
            made.grad = torch.tensor([0.0, value, 1.0])
        return made

    assert finite_gradients([parameter(None), parameter(3e38), parameter(-3e38)])
    assert finite_gradients([parameter(None)])
    for value in (float('nan'), float('inf'), float('-inf')):
        assert not finite_gradients([parameter(1.0), parameter(value)])
