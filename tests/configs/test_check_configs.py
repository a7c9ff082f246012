"""The check of every recipe: a slice of it for real, and what it must notice."""

import copy
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import cv2
import mmengine.config.utils
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData
from recipes import read_metafile
from reference import REPO

from pvt_mm import config
from pvt_mm.config import iter_dicts
from pvt_mm.errors import UserError

spec = importlib.util.spec_from_file_location(
    'check_configs', REPO / 'tests/stress/check_configs.py'
)
tool = importlib.util.module_from_spec(spec)
sys.modules['check_configs'] = tool  # where dataclasses look for the module of a class
spec.loader.exec_module(tool)

RETINANET, SEMANTIC = 'retinanet_pvt_t_fpn_1x_coco.py', 'fpn_pvtv2_b0_ade20k_40k.py'
#: What `shrink` may change in a model, beside its weights.
REDUCED = {'num_classes', 'init_cfg', 'score_thr', 'size'}


def load(name):
    with mock.patch.object(mmengine.config.utils, 'load', read_metafile):
        return Config.fromfile(REPO / 'configs' / name)


def check(*arguments):
    """Run the tool as a user does; it forks, which this process's threads would not survive."""
    command = [sys.executable, '-W', 'ignore', REPO / 'tests/stress/check_configs.py', *arguments]
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300
    )


def test_a_slice_of_the_check(tmp_path):
    """Two recipes train, evaluate and load again; a broken one is named and does not stop them."""
    broken = tmp_path / 'broken.py'
    broken.write_text(
        f'_base_ = {str(REPO / "configs" / RETINANET)!r}\n'
        'model = dict(bbox_head=dict(in_channels=128))\n'
    )
    page, options = tmp_path / 'page.md', ('--iters', '2', '--work-dir', tmp_path / 'runs')
    result = check('--pattern', broken, RETINANET, SEMANTIC, *options, '--markdown', page)
    assert result.returncode == 1, result.stderr
    (failure,) = (line for line in result.stderr.splitlines() if line.startswith('FAILED'))
    assert failure.startswith('FAILED broken.py: RuntimeError: ') and 'channels' in failure
    assert '2 of 3 trained, evaluated and loaded again' in result.stdout

    lines = page.read_text().splitlines()
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines if line[:1] == '|']
    assert rows[0] == [
        'config', 'parameters, million', 'first loss', 'last loss', 'evaluated', 'seconds'
    ]  # fmt: skip
    by_name = {row[0]: row for row in rows[2:]}
    assert set(by_name) == {'broken.py', RETINANET, SEMANTIC}
    assert by_name['broken.py'][4].startswith('FAILED')
    for name, score, millions in ((RETINANET, 'box AP ', 21.4), (SEMANTIC, 'mIoU ', 7.5)):
        assert float(by_name[name][1]) == millions
        assert by_name[name][2] != by_name[name][3], 'the loss moved'
        assert by_name[name][4].startswith(score)
        assert name in result.stdout

    again = check('--pattern', RETINANET, SEMANTIC, *options)
    assert again.returncode == 0, again.stderr
    assert '2 of 2 are done already' in again.stdout
    assert '2 of 2 trained, evaluated and loaded again' in again.stdout


def differences(one, other, key=''):
    """Yield the last key of every place where two nests differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in {*one, *other}:
            yield from differences(one.get(name), other.get(name), name)
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and key != 'size':
        assert len(one) == len(other)
        for pair in zip(one, other):
            yield from differences(*pair, key)
    elif one != other:
        yield key


@pytest.mark.parametrize(
    ('name', 'side', 'iterations'),
    [
        ('cascade_mask_rcnn_pvt_v2_b2_fpn_3x_mstrain_fp16.py', 128, 4),
        ('retinanet_pvt_s_fpn_1x_coco_640.py', 128, 3),
        ('dino_pvt_v2_b2_4scale_8x2_12ep_coco.py', 352, 4),
        ('fpn_pvtv2_b0_ade20k_80k.py', 128, 4),
    ],
)
def test_only_data_sizes_and_schedule_shrink(name, side, iterations, tmp_path):
    """The model, its losses, the optimiser and the steps of the pipelines stay the recipe's."""
    cfg = load(name)
    whole = copy.deepcopy(cfg)
    tool.shrink(cfg, tmp_path / 'data', iterations, tmp_path / 'run')
    assert set(differences(whole.model, cfg.model)) <= REDUCED
    assert 'num_classes' in set(differences(whole.model, cfg.model))
    assert cfg.optim_wrapper == whole.optim_wrapper
    for loader in ('train_dataloader', 'val_dataloader'):
        ours, theirs = (list(iter_dicts(c[loader].dataset.pipeline)) for c in (cfg, whole))
        assert [step['type'] for step in ours] == [step['type'] for step in theirs]
        assert set(differences(theirs, ours)) <= {'', 'scale', 'scales', 'crop_size'}
        assert str(tmp_path / 'data') in cfg[loader].dataset.data_root
    (resize,) = [s for s in cfg.test_dataloader.dataset.pipeline if s.type == 'Resize']
    assert min(resize.scale) == side
    kinds = [scheduler.type for scheduler in cfg.param_scheduler]
    assert kinds == [scheduler.type for scheduler in whole.param_scheduler]
    if cfg.train_cfg.type == 'EpochBasedTrainLoop':
        images = cfg.train_dataloader.dataset.indices
        assert cfg.train_cfg.max_epochs * images == iterations * tool.BATCH
    else:
        assert cfg.train_cfg.max_iters == iterations


def test_a_classifier_shrinks_too(tmp_path, monkeypatch):
    """The same model, with the classes and image sizes of the cut-outs; the sampler stays."""
    monkeypatch.setattr(config, 'find_spec', lambda name: name)
    cfg = load('pvt_s_8xb128_in1k.py')
    whole = copy.deepcopy(cfg)
    tool.shrink(cfg, tmp_path / 'data', 3, tmp_path / 'run')
    assert set(differences(whole.model, cfg.model)) == {'num_classes'}
    assert cfg.model.head.num_classes == cfg.model.data_preprocessor.num_classes == 5
    assert cfg.optim_wrapper == whole.optim_wrapper
    assert cfg.train_dataloader.sampler == whole.train_dataloader.sampler
    for loader, split in (('train_dataloader', 'train'), ('test_dataloader', 'val')):
        data = cfg[loader].dataset
        assert (data.type, data.data_prefix) == ('CustomDataset', split)
        assert data.data_root == str(tmp_path / 'data' / 'classes')
    assert cfg.train_dataloader.dataset.pipeline[1].scale == 112
    assert [step.get('scale') for step in cfg.test_dataloader.dataset.pipeline][1] == 128
    assert cfg.train_cfg.max_epochs * cfg.train_dataloader.dataset.indices == 3 * tool.BATCH


def test_objects_are_cut_out_for_classification(tmp_path):
    """A picture of each object lies in its class's folder, and every class has one."""
    image = np.zeros((50, 60, 3), 'uint8')
    image[10:30, 20:45] = 255
    for split in ('train', 'val'):
        (tmp_path / f'coco/{split}2017').mkdir(parents=True)
        (tmp_path / 'coco/annotations').mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / f'coco/{split}2017/a.png'), image)
        coco = dict(
            images=[dict(id=7, file_name='a.png')],
            categories=[dict(id=i + 1, name=name) for i, name in enumerate(tool.CLASSES)],
            annotations=[dict(id=3, image_id=7, category_id=2, bbox=[20, 10, 25, 20])],
        )
        file = tmp_path / f'coco/annotations/instances_{split}2017.json'
        file.write_text(json.dumps(coco))
    tool.crop_objects(tmp_path)
    folders = {path.name for path in (tmp_path / 'classes/val').iterdir()}
    assert folders == set(tool.CLASSES)
    (file,) = (tmp_path / 'classes/train').rglob('*.png')
    assert file.parent.name == 'one'
    cut = cv2.imread(str(file))
    assert cut.shape == (20, 25, 3) and cut.min() == 255


def test_classification_is_skipped_without_mmpretrain(monkeypatch):
    """The others run, and a sentence says what does not and how it would; alone, it is an error."""
    monkeypatch.setattr(tool, 'find_spec', lambda name: None)
    paths = tool.find_configs(['pvt_*_in1k.py', RETINANET])
    left, sentence = tool.split_off_classification(paths)
    assert [path.name for path in left] == [RETINANET]
    assert sentence.startswith('11 classification recipes are skipped')
    assert "pip install 'pvt-mm[classification]'" in sentence
    assert sentence in tool.markdown_page([tool.Row(RETINANET)], 3, sentence)
    with pytest.raises(UserError, match='11 classification recipes'):
        tool.split_off_classification([path for path in paths if path not in left])
    assert tool.split_off_classification(left) == (left, '')
    monkeypatch.setattr(tool, 'find_spec', lambda name: name)
    assert tool.split_off_classification(paths) == (paths, '')


class Toy(torch.nn.Linear):
    """A model of one weight, which it predicts as a score."""

    found = 1

    def test_step(self, batch):
        scores = self.weight.detach().repeat(self.found, 1)[:, 0]
        return [InstanceData(pred_instances=InstanceData(scores=scores))]


def toy_runner(tmp_path, **state):
    """Stand in for a finished Runner, whose checkpoint holds `state` beside the weight."""
    model = Toy(1, 1, bias=False)
    torch.save({'state_dict': {'weight': model.weight.detach(), **state}}, tmp_path / 'x.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'x.pth'))
    return SimpleNamespace(
        work_dir=tmp_path,
        cfg=Config(dict(model={})),
        build_model=lambda cfg: Toy(1, 1, bias=False),
        model=model,
        val_dataloader=[None],
    )


def test_the_same_weights_predict_the_same(tmp_path):
    tool.check_reload(toy_runner(tmp_path))


def test_other_weights_are_noticed(tmp_path):
    """A checkpoint that lacks what was trained last fails the check."""
    runner = toy_runner(tmp_path, weight=torch.full((1, 1), 7.0))
    with pytest.raises(UserError, match='predicts something else'):
        tool.check_reload(runner)


def test_unknown_weights_are_noticed(tmp_path):
    """Loading is strict."""
    with pytest.raises(RuntimeError, match='Unexpected key'):
        tool.check_reload(toy_runner(tmp_path, other=torch.ones(1)))


def test_nothing_predicted_is_nothing_compared(tmp_path):
    runner = toy_runner(tmp_path)
    runner.model.found = 0
    with pytest.raises(UserError, match='nothing was compared'):
        tool.check_reload(runner)


def test_a_parameter_without_gradient_is_noticed():
    """On several GPUs it would stop the training."""
    model = torch.nn.ModuleDict({'used': torch.nn.Linear(1, 1), 'idle': torch.nn.Linear(1, 1)})
    optimizer = torch.optim.AdamW(model.parameters())
    model['used'](torch.ones(1)).backward()
    optimizer.step()
    with pytest.raises(UserError, match=r'reached idle\.weight, idle\.bias$'):
        tool.check_gradients(model, optimizer)
    tool.check_gradients(model['used'], optimizer)


def test_a_row_is_kept_until_what_it_depends_on_changes(tmp_path):
    """Neither a failed row nor one of another state of the files is taken over."""
    config = tmp_path / 'config.py'
    config.write_text('a = 1')
    results, key = tool.Results(tmp_path / 'rows.json'), tool.digest(config, 4)
    results.put(config, key, tool.Row('config.py', scores='box AP 0.1'))
    kept = tool.Results(tmp_path / 'rows.json')
    assert kept.get(config, tool.digest(config, 4)).scores == 'box AP 0.1'
    assert kept.get(config, tool.digest(config, 5)) is None
    config.write_text('a = 2')
    assert kept.get(config, tool.digest(config, 4)) is None
    results.put(config, key, tool.Row('config.py', error='no'))
    assert results.get(config, key) is None


@pytest.mark.parametrize(
    ('action', 'error'),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 'ended by signal 9'),
        (lambda: time.sleep(60), 'still running after 0.5 seconds'),
        (lambda: 1 / 0, 'ZeroDivisionError: division by zero'),
    ],
    ids=['killed', 'stuck', 'raised'],
)
def test_no_way_of_failing_stops_the_others(action, error, tmp_path, monkeypatch):
    """A run that crashes, hangs or raises leaves a row that says so."""
    monkeypatch.setattr(tool, 'LIMIT', 0.5 if 'still' in error else 60)
    monkeypatch.setattr(tool, 'check_config', lambda *arguments: action())
    row = tool.run_apart(tmp_path / 'some.py', tmp_path, 1, tmp_path / 'folder')
    assert (row.config, row.error) == ('some.py', error)


def test_all_configs_but_the_demos_are_found():
    names = {path.name for path in tool.find_configs(['*.py'])}
    assert names == {p.name for p in REPO.glob('configs/*.py') if not p.name.startswith('demo_')}
    with pytest.raises(UserError, match=r'--pattern nothing_\*: no config'):
        tool.find_configs(['fpn_*', 'nothing_*'])


@pytest.mark.parametrize('pattern', ['retina_net_pvt_s*', 'retinanet_pvt_s_1x_coco.py'])
def test_a_pattern_of_no_config_names_the_nearest(pattern):
    with pytest.raises(UserError, match='did you mean retinanet_pvt_s_fpn_1x_coco.py'):
        tool.find_configs([pattern])


def test_a_schedule_after_a_long_warm_up_is_shortened():
    """What begins after the warm-up begins within the few iterations."""
    cfg = load('fpn_pvtv2_b0_ade20k_80k.py')
    cfg.param_scheduler = [
        dict(type='LinearLR', by_epoch=False, begin=0, end=1500, start_factor=1e-6),
        dict(type='PolyLR', by_epoch=False, begin=1500, end=160000, power=1.0),
    ]
    tool.shorten(cfg, 3)
    assert [(part.begin, part.end) for part in cfg.param_scheduler] == [(0, 2), (1, 4)]
