"""Bad data in a training: the file is named, or skipped and counted; classes are compared first."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from bad_data import COCO, SEGMENTATION, coco_set, segmentation_set
from conftest import forget_runs, losses
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from mmengine.utils import ManagerMixin
from reference import REPO

from pvt_mm.config import datasets, task_of
from pvt_mm.datasets import consistency, guard
from pvt_mm.datasets.checks import STOPPING
from pvt_mm.datasets.consistency import category_names, check_classes
from pvt_mm.engine.options import enable_tta
from pvt_mm.errors import DataError, UserError

TRAIN_ONLY = ('val_cfg=None', 'val_dataloader=None', 'val_evaluator=None')
WORKERS = ('train_dataloader.num_workers=2', 'train_dataloader.persistent_workers=True')


def guarded(cfg):
    init_default_scope(task_of(cfg))
    dataset = DATASETS.build(dict(cfg.train_dataloader.dataset, serialize_data=False))
    guard.guard_pipeline(dataset)
    return dataset


def guarded_runner(cfg, skip=False):
    forget_runs(ManagerMixin)
    cfg.work_dir = str(Path(next(datasets(cfg)).data_root) / 'run')
    runner = Runner.from_cfg(cfg)
    guard.guard_loading(runner, 'my.py', skip)
    return runner


def stops(kinds):
    """Of the kinds planted, those on which loading a sample stops."""
    return [kind for kind in kinds if STOPPING.get(kind, '').startswith('stops and names')]


@pytest.mark.parametrize('name', [name for name in COCO if stops(COCO[name][1])])
def test_a_detection_sample_that_cannot_be_used_is_named(name, config, tmp_path):
    """Each kind, in mmdet's pipeline, with what is wrong and the file."""
    ((file, kind),) = [(file, kind) for file, kind in coco_set(tmp_path, [name]) if stops([kind])]
    with pytest.raises(DataError) as error:
        guarded(config('ins', tmp_path))[0]
    assert str(error.value).startswith(f'{file}: {kind} (') and str(error.value).endswith(').')


@pytest.mark.parametrize(
    'name', [name for name in SEGMENTATION if stops(SEGMENTATION[name][1] + SEGMENTATION[name][2])]
)
def test_a_segmentation_sample_that_cannot_be_used_is_named(name, config, tmp_path):
    """Each kind, in mmseg's pipeline: the image, or the label map."""
    planted = segmentation_set(tmp_path, [name])
    ((file, kind),) = [(file, kind) for file, kind in planted if stops([kind])]
    with pytest.raises(DataError) as error:
        guarded(config('seg', tmp_path))[0]
    assert str(error.value).startswith(f'{file}: {kind} (') and str(error.value).endswith(').')


def test_the_guard_changes_no_sample(config, demo_data):
    """Good data pass through as they are, and a second guard is none."""
    for task, folder in (('ins', 'coco'), ('seg', 'ade')):
        cfg = config(task, demo_data / folder)
        dataset = guarded(cfg)
        plain = list(dataset.pipeline.transforms)
        names = [type(transform).__name__ for transform in plain]
        assert names.count('GuardedLoader') == 2
        guard.guard_pipeline(dataset)
        assert dataset.pipeline.transforms == plain


def test_loaders_inside_others_are_guarded(config, demo_data):
    """Those of test-time augmentation, and of data sets inside others."""
    cfg = config('seg', demo_data / 'ade')
    enable_tta(cfg)
    init_default_scope('mmseg')
    inner = dict(next(datasets(cfg, ['test_dataloader'])), serialize_data=False)
    dataset = DATASETS.build(dict(type='ConcatDataset', datasets=[inner]))
    guard.guard_pipeline(dataset)
    first, tta = dataset.datasets[0].pipeline.transforms
    assert isinstance(first, guard.GuardedLoader)
    loaders = [
        transform for pipeline in tta.subroutines for transform in pipeline.transforms
        if isinstance(transform, guard.GuardedLoader)
    ]  # fmt: skip
    assert loaders and len(loaders) == len(tta.subroutines)


# Through the tools


def train(config, data, work_dir, *options):
    return (
        *('train', config, '--data-root', data, '--work-dir', work_dir, '--seed', 1),
        *options,
        '--cfg-options',
        *TRAIN_ONLY,
    )


def test_a_worker_names_the_file(small_config, failing, tmp_path):
    """A cut image that a worker process meets: one sentence, as its error crosses to the main."""
    coco_set(tmp_path / 'data', ['clean', 'cut', 'clean', 'clean'])
    message = failing(*train(small_config('det'), tmp_path / 'data', tmp_path / 'run'), *WORKERS)
    file = tmp_path / 'data/train2017/002.jpg'
    assert message.startswith(f'error: {file}: truncated image (')


def test_bad_images_are_skipped_and_counted(small_config, run_tool, tmp_path):
    """With two workers: all iterations are made, and each draw of a bad image is counted."""
    names = ['clean', 'cut', 'clean', 'missing', 'clean', 'size']
    coco_set(tmp_path / 'data', names)
    arguments = train(small_config('det'), tmp_path / 'data', tmp_path / 'run', '--skip-bad-images')
    run_tool(*arguments, *WORKERS)
    assert len(losses(tmp_path / 'run')) == 3
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    counts = sorted(map(int, re.findall(r'WARNING - Skipped bad data, (\d+) times so far: ', log)))
    assert counts == list(range(1, len(counts) + 1)) and len(counts) >= 3
    for kind in ('002.jpg: truncated image', '004.jpg: missing file', '006.jpg: image of another'):
        assert f'/train2017/{kind}' in log
    run_tool(*arguments[:5], tmp_path / 'again', *arguments[6:])
    assert losses(tmp_path / 'again') == losses(tmp_path / 'run'), 'whichever worker skips'


def test_evaluation_stops_also_where_training_skips(config, tmp_path):
    """A score without an image would be another score."""
    segmentation_set(tmp_path, ['clean', 'image cut'])
    for kind in ('images', 'annotations'):
        (tmp_path / kind / 'validation').symlink_to(tmp_path / kind / 'training')
    runner = guarded_runner(config('seg', tmp_path), skip=True)
    batch = next(iter(runner.build_dataloader(runner.cfg.train_dataloader)))
    assert len(batch['inputs']) == 2
    with pytest.raises(DataError, match='validation/002.jpg: truncated image'):
        list(runner.build_dataloader(runner.cfg.val_dataloader))


def test_testing_names_the_file(trained, failing, demo_data, tmp_path):
    """tools/test.py has the same guard."""
    config, _, _, checkpoint = trained('seg')
    segmentation_set(tmp_path / 'data', ['clean', 'map rgb'])
    for kind in ('images', 'annotations'):
        (tmp_path / f'data/{kind}/validation').symlink_to(tmp_path / f'data/{kind}/training')
    message = failing('test', config, checkpoint, '--data-root', tmp_path / 'data')
    assert (
        'validation/002.png: label map in colour (3 channels; all equal: save one of them).'
        in message
    )


def test_a_data_set_that_does_not_load_leads_to_its_check(config, tmp_path):
    """An entry without its box: mmdet's KeyError would name nothing; file and entry are named."""
    coco_set(tmp_path, ['clean', 'no box'])
    with pytest.raises(UserError) as error:
        guarded_runner(config('det', tmp_path)).train()
    file = tmp_path / 'annotations/instances_train2017.json'
    reason = f'{file}: incomplete entry (annotation 2: it has no bbox)'
    assert f'my.py cannot be loaded ({reason}); ' in str(error.value)
    assert 'python tools/analysis_tools/check_dataset.py my.py says what is wrong' in str(
        error.value
    )


# Classes


def change_json(root, change):
    file = root / 'annotations/instances_train2017.json'
    content = json.loads(file.read_text())
    change(content['categories'])
    file.write_text(json.dumps(content))


def check(cfg, loaders=('train_dataloader',)):
    check_classes(cfg, 'my.py', loaders)


@pytest.mark.parametrize(
    ('task', 'keys'),
    [
        ('det', ['model.bbox_head.num_classes']),
        ('ins', [f'model.roi_head.{part}_head.num_classes' for part in ('bbox', 'mask')]),
        ('seg', ['model.decode_head.num_classes']),
    ],
)
def test_a_wrong_number_of_classes_stops_before_training(
    task, keys, small_config, failing, run_tool, demo_data, tmp_path
):
    """The message holds what to give; given, it trains."""
    config = small_config(task)
    root = demo_data / ('ade' if task == 'seg' else 'coco')
    arguments = train(config, root, tmp_path / 'run')
    message = failing(*arguments, *(f'{key}=80' for key in keys))
    count = 6 if task == 'seg' else 5
    assert f'{config} has {", ".join(f"{key}=80" for key in keys)}, but' in message
    fix = re.search(r'; set (.+) in the config or by --cfg-options', message).group(1).split()
    assert fix == [f'{key}={count}' for key in keys]
    assert not (tmp_path / 'run').exists()
    if task == 'det':
        run_tool(*arguments, f'{keys[0]}=80', *fix)
        assert len(losses(tmp_path / 'run')) == 3


def test_testing_compares_the_classes_too(trained, failing):
    """Of the test data."""
    config, data, _, checkpoint = trained('seg')
    wrong = ('--cfg-options', 'model.decode_head.num_classes=150')
    assert 'decode_head.num_classes=6' in failing('test', config, checkpoint, *data, *wrong)


def test_categories_that_the_file_lacks_or_orders_otherwise(config, tmp_path):
    """mmdet would train on, with labels that mean other names; the classes to write are named."""
    coco_set(tmp_path, ['clean'])
    cfg = config('det', tmp_path)
    check(cfg)
    change_json(tmp_path, lambda categories: categories.reverse())
    with pytest.raises(UserError) as error:
        check(cfg)
    assert 'in another order' in str(error.value)
    classes = re.search(r'classes=(\(.*?\))\)', str(error.value)).group(1)
    cfg.train_dataloader.dataset.metainfo.classes = eval(classes)
    check(cfg)
    change_json(tmp_path, lambda categories: categories.pop(0))
    with pytest.raises(UserError, match='has no category four, .*num_classes=4 in the heads'):
        check(cfg)


def test_labels_follow_the_file_and_not_the_config(config, tmp_path):
    """Why the order is refused: mmdet's label of a class is its place in the file."""
    coco_set(tmp_path, ['clean'])
    change_json(tmp_path, lambda categories: categories.reverse())
    assert guarded(config('det', tmp_path))[0]['data_samples'].gt_instances.labels.tolist() == [4]


def test_a_part_of_the_categories_may_be_learnt(config, tmp_path, monkeypatch):
    """With a warning that names those that are left out."""
    coco_set(tmp_path, ['clean'])
    change_json(tmp_path, lambda categories: categories.append(dict(id=6, name='five')))
    warnings = []
    monkeypatch.setattr(consistency, 'print_log', lambda text, **_: warnings.append(text))
    check(config('det', tmp_path))
    (warning,) = warnings
    assert 'objects of five are left out' in warning and 'num_classes=6 in the heads' in warning


def test_classes_in_one_text_are_refused(config, tmp_path):
    """A tuple of one, without its comma."""
    coco_set(tmp_path, ['clean'])
    cfg = config('det', tmp_path)
    cfg.train_dataloader.dataset.metainfo.classes = 'zero'
    with pytest.raises(UserError, match=r"classes=\('zero',\)\), with a comma"):
        check(cfg)


def test_classes_that_a_data_set_refuses(config, demo_data):
    """ADE20KDataset knows none but its own."""
    cfg = config('seg', demo_data / 'ade')
    cfg.train_dataloader.dataset.type = 'ADE20KDataset'
    with pytest.raises(UserError, match='my.py: new classes .* is not a subset'):
        check(cfg)


def test_our_configs_agree_with_their_data_sets(monkeypatch):
    """No recipe is refused by its own number of classes."""
    monkeypatch.setattr(consistency, 'category_names', lambda file: pytest.fail(file))
    for pattern in ('cascade_*_b2_fpn_*', 'dino_*', 'fpn_pvt_s_*_40k.py'):
        (path,) = (REPO / 'configs').glob(pattern)
        check_classes(Config.fromfile(path), str(path), ['train_dataloader'])


@pytest.mark.parametrize('place', ['first', 'last', 'far', 'decoy'])
def test_categories_are_read_wherever_they_stand(place, tmp_path):
    """Before or after much else, in a list longer than the window, or behind a namesake."""
    categories = [dict(id=i, name=f'class_{i}') for i in range(3)]
    if place == 'far':
        categories[1]['description'] = 'x' * 2**21
    rest = dict(annotations=list(range(1000)))
    content = dict(categories=categories, **rest)
    if place == 'last':
        content = dict(**rest, categories=categories)
    if place == 'decoy':
        content = dict(info=dict(categories=['none', 'of', 'these']), **content)
    file = tmp_path / 'a.json'
    file.write_text(json.dumps(content))
    assert category_names(str(file)) == ['class_0', 'class_1', 'class_2']


@pytest.mark.parametrize(
    ('content', 'says'),
    [
        ('float32 of 3 channels', '3 channel(s) of float32; convert it to 3 channels of 8 bits'),
        ('float32 of 1 channels', '1 channel(s) of float32; convert it to 3 channels of 8 bits'),
        ('float64 of 3 channels', '3 channel(s) of float64; convert it to 3 channels of 8 bits'),
        (b'II+\0' + bytes(100), 'it is a BigTIFF, which is not read; convert it to PNG'),
        (b'\n<!DOCTYPE html><html>', 'it is a web page'),
        (b'version https://git-lfs.github.com/spec/v1\n', 'it is a pointer of Git LFS; fetch the'),
        (b'\x93NUMPY' + bytes(100), 'it is an array of NumPy'),
        (bytes(4) + b'ftypheic' + bytes(100), 'it is HEIC or AVIF; convert it to JPEG or PNG'),
        (bytes(128) + b'DICM' + bytes(100), 'it is DICOM; convert it to PNG'),
        (b'hello', 'its content is no image'),
    ],
)
def test_what_a_file_is_that_is_no_image(content, says, config, tmp_path):
    """A TIFF of floats is an image, and a web page none: the way out differs."""
    segmentation_set(tmp_path, ['clean'])
    file = tmp_path / 'images/training/001.jpg'
    if isinstance(content, str):
        dtype, channels = content.split(' of ')
        pixels = np.zeros((48, 64, int(channels[0])), dtype)
        content = cv2.imencode('.tiff', pixels)[1].tobytes()
    file.write_bytes(content)
    with pytest.raises(DataError, match='unreadable image') as error:
        guarded(config('seg', tmp_path))[0]
    assert error.value.detail.startswith(says)
