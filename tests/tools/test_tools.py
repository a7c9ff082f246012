"""The tools, end to end on small models: train, resume, test and infer for each task."""

import json
import os
import pickle
import shutil

import cv2
import numpy as np
import pytest
import torch
from conftest import losses, scalars
from PIL import Image
from pycocotools import mask as coco_mask
from reference import REPO, small

from pvt_mm import requirements
from pvt_mm.cli import main_errors
from pvt_mm.models.fast import branches

TASKS = ('det', 'ins', 'seg')
DATA = {'det': 'coco', 'ins': 'coco', 'seg': 'ade'}
SCORES = {'det': 'coco/bbox_mAP', 'ins': 'coco/segm_mAP', 'seg': 'mIoU'}


@pytest.mark.parametrize('task', TASKS)
def test_train_resume_test_and_infer(task, trained, run_tool, demo_data, tmp_path):
    """One training of each task goes all the way: checkpoint, resume, scores, predictions."""
    config, data, first_run, first_checkpoint = trained(task)
    work_dir = shutil.copytree(first_run, tmp_path / 'run')
    (work_dir / 'last_checkpoint').write_text(str(work_dir / first_checkpoint.name))
    first = losses(work_dir)
    assert len(first) == 3 and np.isfinite(first).all()
    assert any(SCORES[task] in entry for entry in scalars(work_dir))

    longer = 'train_cfg.max_iters=6' if task == 'seg' else 'train_cfg.max_epochs=2'
    more = ('--cfg-options', longer, 'default_hooks.checkpoint.interval=1')
    run_tool('train', config, *data, '--work-dir', work_dir, '--resume', *more)
    entries = [entry for entry in scalars(work_dir) if 'loss' in entry]
    assert [entry['step'] for entry in entries] == [4, 5, 6], 'goes on where it stopped'

    checkpoint = max(work_dir.glob('*.pth'), key=os.path.getmtime)
    out = tmp_path / ('labels' if task == 'seg' else 'out.pkl')
    results = ('--out', out, '--show-dir', tmp_path / 'shown', '--work-dir', tmp_path / 'test')
    run_tool('test', config, checkpoint, *data, *results)
    assert has_score(tmp_path / 'test', task)
    if task == 'seg':
        assert len(list(out.glob('*.png'))) == 2
    else:
        assert len(pickle.loads(out.read_bytes())) == 2
    assert len([*(tmp_path / 'shown').rglob('*.jpg'), *(tmp_path / 'shown').rglob('*.png')]) == 2

    folder = demo_data / ('ade/images/validation' if task == 'seg' else 'coco/val2017')
    images = sorted(folder.iterdir())
    run_tool(
        'infer', config, checkpoint, folder, '--out-dir', tmp_path / 'inferred', '--score-thr', 0
    )
    for image in images:
        check_inferred(tmp_path / 'inferred' / image.stem, cv2.imread(str(image)).shape[:2])


def has_score(work_dir, task):
    return any(SCORES[task] in file.read_text() for file in work_dir.glob('*/*.json'))


def check_inferred(stem, size):
    assert cv2.imread(f'{stem}.png') is not None
    report = json.loads(stem.with_suffix('.json').read_text())
    found = report.get('objects', report.get('segments'))
    assert found
    for item in found:
        assert item['class'] in ('background', 'zero', 'one', 'two', 'three', 'four')
        if 'mask' in item:
            assert coco_mask.decode(item['mask']).shape == size
    if 'segments' in report:
        assert sum(item['pixels'] for item in found) == size[0] * size[1]


@pytest.mark.parametrize('task', TASKS)
def test_amp_on_a_cpu_trains_in_bf16(task, trained, run_tool, monkeypatch, tmp_path):
    """The backbone computes in bf16, heads get fp32, and the losses are near fp32's."""
    config, data, work_dir, _ = trained(task)
    seen = set()
    plain = branches.linear

    def spy(x, layer, dtype):
        out = plain(x, layer, dtype)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(branches, 'linear', spy)
    run_tool('train', config, *data, '--work-dir', tmp_path / 'amp', '--seed', 1, '--amp')
    assert seen == {torch.bfloat16}, 'in training and in its validation'
    # Mask R-CNN samples its regions among proposals that bf16 reorders.
    tolerance = 0.2 if task == 'ins' else 0.02
    assert losses(tmp_path / 'amp') == pytest.approx(losses(work_dir), rel=tolerance)
    assert losses(tmp_path / 'amp') != losses(work_dir)


@pytest.mark.parametrize('task', ['det', 'seg'])
def test_test_time_augmentation_runs(task, trained, run_tool, tmp_path):
    """Boxes of flipped images are merged; segmentation averages its scales."""
    config, data, _, checkpoint = trained(task)
    run_tool('test', config, checkpoint, *data, '--tta', '--work-dir', tmp_path / 'tta')
    assert has_score(tmp_path / 'tta', task)


def test_same_seed_same_losses(trained, tmp_path, small_config, run_tool):
    """Two runs with one seed print the same losses."""
    config, data, work_dir, _ = trained('seg')
    run_tool('train', config, *data, '--work-dir', tmp_path / 'again', '--seed', 1)
    assert losses(work_dir) == losses(tmp_path / 'again')


def test_load_from_takes_bare_backbone_weights(
    trained, small_config, run_tool, demo_data, tmp_path
):
    """ImageNet-style weights reach the backbone of a whole detector."""
    config = small_config('det')
    weights = small('v1').state_dict()
    torch.save({'model': weights}, tmp_path / 'bare.pth')
    frozen = ('--cfg-options', 'optim_wrapper.optimizer.lr=0.0')
    run_tool(
        'train',
        config,
        '--data-root',
        demo_data / 'coco',
        '--load-from',
        tmp_path / 'bare.pth',
        *frozen,
    )
    saved = torch.load(tmp_path / 'work_dirs/det/epoch_1.pth', weights_only=True)['state_dict']
    for key, value in weights.items():
        torch.testing.assert_close(saved[f'backbone.{key}'], value, rtol=0, atol=1e-6)


def test_a_checkpoint_cannot_bring_its_config_to_life(trained, run_tool, tmp_path):
    """Resuming does not run the Python text that a checkpoint carries as its config."""
    config, data, _, checkpoint = trained('seg')
    content = torch.load(checkpoint, weights_only=True)
    content['meta']['config'] = f'open({str(tmp_path / "ran")!r}, "w").close()'
    torch.save(content, tmp_path / 'other.pth')
    run_tool('train', config, *data, '--resume', tmp_path / 'other.pth')
    assert not (tmp_path / 'ran').exists()


# Bad input: one sentence, exit code 1


def test_unknown_config_names_the_nearest(failing):
    message = failing('train', REPO / 'configs/retinanet_pvt_s_fpn_1x_coc.py')
    assert 'no config' in message and 'retinanet_pvt_s_fpn_1x_coco.py' in message


@pytest.mark.parametrize(
    'text',
    ['_base_ = "nowhere.py"', 'model = (', '_base_ = "mmdet::_base_/no.py"'],
)
def test_broken_config_is_named(failing, tmp_path, text):
    (tmp_path / 'broken.py').write_text(text)
    assert 'broken.py does not load' in failing('train', tmp_path / 'broken.py')


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_missing_data_says_where_and_how(failing, tool, tmp_path):
    checkpoint = [tmp_path / 'x.pth'] if tool == 'test' else []
    message = failing(tool, REPO / 'configs/retinanet_pvt_s_fpn_1x_coco.py', *checkpoint)
    assert 'data/coco/annotations/instances_' in message and '--data-root DIR' in message


def test_missing_image_folder_is_named(failing, small_config, tmp_path):
    (tmp_path / 'coco/annotations').mkdir(parents=True)
    (tmp_path / 'coco/annotations/instances_train2017.json').write_text('{}')
    message = failing('train', small_config('det'), '--data-root', tmp_path / 'coco')
    assert 'coco/train2017 is missing' in message


def test_tta_on_instance_masks_is_refused(failing, small_config, demo_data, tmp_path):
    torch.save({'state_dict': {'x': torch.zeros(1)}}, tmp_path / 'x.pth')
    data = ('--data-root', demo_data / 'coco')
    assert 'not instance masks' in failing(
        'test', small_config('ins'), tmp_path / 'x.pth', *data, '--tta'
    )


@pytest.mark.parametrize(
    ('task', 'out', 'message'), [('det', 'x', '.pkl'), ('seg', 'x.pkl', 'folder')]
)
def test_out_of_the_other_kind_is_refused(
    failing, small_config, demo_data, tmp_path, task, out, message
):
    torch.save({'state_dict': {'x': torch.zeros(1)}}, tmp_path / 'x.pth')
    data = ('--data-root', demo_data / DATA[task])
    assert message in failing('test', small_config(task), tmp_path / 'x.pth', *data, '--out', out)


def test_no_image_is_refused(failing, trained, tmp_path):
    config, _, _, checkpoint = trained('seg')
    assert 'no image' in failing('infer', config, checkpoint, tmp_path / 'missing.jpg')
    (tmp_path / 'text.jpg').write_text('not a picture')
    message = failing('infer', config, checkpoint, tmp_path / 'text.jpg')
    assert message.endswith('text.jpg is no image that OpenCV can read: its content is no image.')
    Image.new('RGB', (64, 48)).save(tmp_path / 'good.png')
    places = (tmp_path / 'good.png', tmp_path / 'text.jpg')
    message = failing('infer', config, checkpoint, *places, '--out-dir', tmp_path / 'out')
    assert message.endswith('its content is no image. The other 1 images are done.')
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['good.json', 'good.png']
    before = places[0].read_bytes()
    message = failing('infer', config, checkpoint, places[0], '--out-dir', tmp_path)
    assert 'would overwrite' in message and places[0].read_bytes() == before
    (tmp_path / 'empty').mkdir()
    assert 'The folder empty has no image' in failing('infer', config, checkpoint, 'empty')


def test_other_launchers_need_cuda(failing, small_config, demo_data):
    if torch.cuda.is_available():
        pytest.skip('there is CUDA')
    data = ('--data-root', demo_data / 'coco')
    assert 'needs CUDA' in failing('train', small_config('det'), *data, '--launcher', 'slurm')


def test_auto_scale_lr_needs_a_base(failing, small_config, demo_data):
    config = small_config('det', 'auto_scale_lr = dict(_delete_=True, enable=False)')
    assert 'base_batch_size' in failing(
        'train', config, '--data-root', demo_data / 'coco', '--auto-scale-lr'
    )


def test_bare_data_root_option_is_routed(failing, tmp_path):
    """mmengine would accept and ignore it; here it moves every path."""
    message = failing(
        'train',
        REPO / 'configs/retinanet_pvt_s_fpn_1x_coco.py',
        '--cfg-options',
        'data_root=/nowhere',
    )
    assert '/nowhere/annotations/instances_train2017.json' in message


@pytest.mark.parametrize('tool', ['train', 'test', 'infer'])
def test_a_bundled_config_is_found_by_a_part_of_its_name(failing, tool):
    """From any folder, and without its ending, a name leads to the configs that come near it."""
    more = {'train': [], 'test': ['x.pth'], 'infer': ['x.pth', 'x.jpg']}[tool]
    message = failing(tool, 'retinanet_pvt_s_1x', *more)
    assert 'no config retinanet_pvt_s_1x; did you mean ' in message
    assert str(REPO / 'configs/retinanet_pvt_s_fpn_1x_coco.py') in message


@pytest.mark.parametrize(
    ('version', 'head', 'says'),
    [
        ('3.3.0', 'NewHead', 'check the name. If another package has it, name that package in '),
        ('3.0.0', 'DDQDETRHead', 'the configs of pvt_mm are made for mmdet==3.3.0: pip install '),
    ],
)
def test_a_head_that_mmdet_lacks_is_named_with_the_way_out(
    failing, small_config, demo_data, monkeypatch, version, head, says
):
    import mmdet
    from mmdet.registry import MODELS

    monkeypatch.setattr(mmdet, '__version__', version)
    monkeypatch.setattr(requirements, '_is_onedl', lambda: False)
    monkeypatch.delitem(MODELS.module_dict, head, raising=False)
    config = small_config('det', f'model["bbox_head"]["type"] = "{head}"')
    message = failing('train', config, '--data-root', demo_data / 'coco')
    assert f'mmdet {version}, which is installed, has no {head}; {says}' in message


def test_a_missing_import_of_pvt_mm_is_named(capsys):
    """A config that uses PVT and does not import it, where nothing else has."""

    @main_errors
    def main():
        raise KeyError('PVT is not in the mmdet::model registry. Please check ...')

    with pytest.raises(SystemExit):
        main()
    assert "add custom_imports = dict(imports=['pvt_mm']" in capsys.readouterr().err


def test_other_key_errors_keep_their_traceback():
    """A bug is not dressed up as bad input."""

    @main_errors
    def main():
        raise KeyError('loss')

    with pytest.raises(KeyError):
        main()


def test_an_unknown_arch_lists_those_that_exist(failing, small_config, demo_data):
    extra = 'model["backbone"]["arch"] = "smal"'
    message = failing('train', small_config('det', extra), '--data-root', demo_data / 'coco')
    assert message == ("error: There is no arch 'smal'; choose one of tiny, small, medium, large.")


@pytest.mark.parametrize(
    ('name', 'package', 'says'),
    [
        ('pvt_v2_b2', 'mmdet', "mmdet has no pvt_v2_b2; write type='PVTv2', arch='b2'"),
        ('pvt_tiny', 'mmseg', "mmseg has no pvt_tiny; write type='PVT', arch='tiny'"),
        ('PvtV2Model', 'mmpretrain', "mmpretrain has no PvtV2Model; write type='PVTv2'"),
    ],
)
def test_a_type_of_another_pvt_is_translated(name, package, says, capsys):
    """The authors', timm's and Hugging Face's names, in whichever codebase."""

    @main_errors
    def main():
        raise KeyError(f'{name} is not in the {package}::model registry. Please check ...')

    with pytest.raises(SystemExit):
        main()
    assert f'error: {says}' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('extra', 'says'),
    [
        ('["embed_dims"] = 32', 'PVT has no embed_dims: write arch='),
        ('["depth"] = 50', 'PVT has no depth: these are left from the ResNet of a base config'),
        ('["init_cfg"] = dict(checkpoint="x.pth")', "(type='Pretrained', checkpoint='x.pth')"),
        ('["out_indices"] = 3', 'out_indices=3 must be a tuple'),
    ],
)
def test_arguments_of_another_pvt_are_one_sentence(extra, says, failing, small_config, demo_data):
    """In training as anywhere: the constructor itself says it."""
    config = small_config('det', f'model["backbone"]{extra}')
    assert says in failing('train', config, '--data-root', demo_data / 'coco')
