"""The classification recipes in mmpretrain itself; skipped where it is not installed."""

import copy
import json
import pickle

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from reference import REPO, SMALL, load_from, official_weights

from pvt_mm import PVT
from pvt_mm.checkpoint.safe_load import read_checkpoint

pytest.importorskip('mmpretrain')

NAMES = ('dark', 'bright')


@pytest.fixture
def images(tmp_path):
    """Write a few images of two classes, in ImageNet's folders."""
    random = np.random.default_rng(0)
    for split in ('train', 'val'):
        for label, name in enumerate(NAMES):
            folder = tmp_path / 'images' / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                image = random.integers(120 * label, 120 * label + 120, (70, 90, 3))
                cv2.imwrite(str(folder / f'{name}{i}.png'), image.astype('uint8'))
    return tmp_path / 'images'


@pytest.fixture
def config(images, tmp_path):
    """Write the recipe of PVT-Tiny with a small backbone, on the two classes."""
    backbone = f"type='PVT', arch={SMALL!r}, out_indices=(3,), with_cls_token=True"
    path = tmp_path / 'small.py'
    path.write_text(
        f'_base_ = {str(REPO / "configs/pvt_t_8xb128_in1k.py")!r}\n'
        f'model = dict(backbone=dict(_delete_=True, {backbone}),\n'
        '    data_preprocessor=dict(num_classes=2), head=dict(num_classes=2, in_channels=64))\n'
        'def loader(folder, pipeline):\n'
        "    dataset = dict(_delete_=True, type='CustomDataset', data_prefix=folder,\n"
        f'        data_root={str(images)!r}, pipeline=pipeline)\n'
        '    return dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)\n'
        "train_dataloader = loader('train', _base_.train_pipeline)\n"
        "val_dataloader = test_dataloader = loader('val', _base_.test_pipeline)\n"
        'train_cfg = dict(max_epochs=1)\n'
        'val_evaluator = test_evaluator = dict(topk=(1, 2))\n'
    )
    return path


def top1(work_dir, pattern):
    (file,) = work_dir.glob(pattern)
    return json.loads(file.read_text().splitlines()[-1])['accuracy/top1']


def test_train_and_test(config, run_tool, tmp_path):
    """The tools train, evaluate, keep predictions and draw; the class token moves."""
    run_tool('train', config, '--work-dir', tmp_path / 'run', '--seed', 1)
    checkpoint = tmp_path / 'run' / 'epoch_1.pth'
    weights = read_checkpoint(checkpoint)['state_dict']
    assert {'backbone.stages.3.cls_token', 'head.weight', 'head.bias'} <= set(weights)
    results = ('--out', tmp_path / 'out.pkl', '--show-dir', tmp_path / 'shown')
    run_tool('test', config, checkpoint, *results, '--work-dir', tmp_path / 'test')
    score = top1(tmp_path / 'test', '*/*.json')
    assert score == top1(tmp_path / 'run', '*/vis_data/scalars.json')
    assert len(list((tmp_path / 'shown').glob('*.png'))) == 8
    predicted = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    right = [int(sample['pred_label']) == int(sample['gt_label']) for sample in predicted]
    assert 100 * np.mean(right) == score


def test_published_weights_give_their_logits(images):
    """ImageNet weights loaded into the classifier: the same as backbone and head alone."""
    cfg = Config.fromfile(REPO / 'configs/pvt_t_8xb128_in1k.py')
    init_default_scope('mmpretrain')
    model = MODELS.build(copy.deepcopy(cfg.model)).eval()
    weights = official_weights('tiny', classification=True)
    weights['head.weight'] = torch.randn(weights['head.weight'].shape)
    weights['norm.weight'] = torch.ones(512)
    load_from(model, weights)
    backbone = PVT('tiny', out_indices=(3,), with_cls_token=True).eval()
    backbone.load_state_dict(weights)
    image = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = backbone(image)[0] @ weights['head.weight'].T
        assert expected.std() > 0.1
        torch.testing.assert_close(model(image), expected, rtol=0, atol=1e-4)
        sample = model.predict(image)[0]
    assert sample.pred_label.item() == expected[0].argmax()
    torch.testing.assert_close(sample.pred_score, expected[0].softmax(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    'constructor', ['LearningRateDecayOptimWrapperConstructor', 'PVTOptimWrapperConstructor']
)
def test_both_constructors_give_the_same_rates(constructor, config):
    """mmpretrain's layer-wise decay asks our backbone for its layers."""
    cfg = Config.fromfile(config)
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model)
    optimizer = dict(type='AdamW', lr=1.0, weight_decay=0.05)
    paramwise = dict(layer_decay_rate=0.5)
    wrapper = build_optim_wrapper(
        model, dict(constructor=constructor, optimizer=optimizer, paramwise_cfg=paramwise)
    )
    rates = {p: group['lr'] for group in wrapper.optimizer.param_groups for p in group['params']}
    stages = model.backbone.stages
    assert rates[stages[0].pos_embed] == 0.5**6
    assert rates[stages[1].blocks[0].mlp.fc1.weight] == 0.5**4
    assert rates[stages[3].cls_token] == 0.5**2
    assert rates[stages[3].final_norm.weight] == rates[model.head.weight] == 1.0


def test_what_classification_lacks_is_refused(config, run_tool, tmp_path, capsys):
    """One sentence for --tta; and for a folder that is not there."""
    (tmp_path / 'w.pth').write_bytes(b'x')
    for arguments, message in (
        (['--tta'], '--tta serves detection and segmentation'),
        (['--data-root', 'nowhere'], 'The data set is expected at nowhere, but nowhere/val is'),
    ):
        with pytest.raises(SystemExit):
            run_tool('test', config, tmp_path / 'w.pth', *arguments)
        assert message in capsys.readouterr().err
