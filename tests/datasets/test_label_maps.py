"""Label maps: absent classes, ignored labels and files that are not found are told first."""

import re
import shutil
from collections import Counter

import numpy as np
import pytest
from bad_data import CLASSES, all_labels, labels, picture
from hypothesis import given
from hypothesis import strategies as st
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from pvt_mm.datasets import checks, consistency, guard, ignore_index, label_maps
from pvt_mm.engine import build_runner
from pvt_mm.errors import DataError, UserError
from pvt_mm.evaluation.options import keep_predictions

TRAIN = ('train_dataloader',)
IMAGES, MAPS = 'images/training', 'annotations/training'


def write(root, values=None, count=2, suffix='.jpg', map_suffix='.png', folder=''):
    """Write images with the same label map for each, numbered from 0."""
    for number in range(count):
        for place, end in ((IMAGES, suffix), (MAPS, map_suffix)):
            path = root / place / folder / f'{number:03}{end}'
            path.parent.mkdir(parents=True, exist_ok=True)
            image = picture() if place == IMAGES else None
            (image or Image.fromarray(all_labels() if values is None else values)).save(path)


def binary(config, root, reduce=False):
    """A config of two classes whose maps count from 0."""
    cfg = config('seg', root)
    cfg.model.decode_head.num_classes = 2
    for loader in ('train', 'val', 'test'):
        data = cfg[f'{loader}_dataloader'].dataset
        data.reduce_zero_label = reduce
        data.metainfo = dict(classes=('background', 'polyp'))
        for step in data.pipeline:
            if step['type'] == 'LoadAnnotations':
                step['reduce_zero_label'] = reduce
    return cfg


def found(cfg):
    """What the check finds of a data set as a whole: its details by kind."""
    findings, _ = checks.check_config(cfg, 'my.py', TRAIN)
    return {item.kind: item.detail for item in findings if item.kind in label_maps.KINDS}


def trained_set(cfg, ignored=255):
    """Build the training set, and tell what a training would."""
    init_default_scope('mmseg')
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    guard.guard_pipeline(dataset, ignored=ignored)
    return label_maps.check_labels(dataset, ignored)


# Absent classes


@pytest.mark.parametrize(
    ('values', 'reduce', 'says'),
    [
        ((0, 255), False, ['polyp (label 1) in none of 2 label maps', '10.4% of their pixels']),
        ((0, 255), False, ['if 255 stands for polyp, save 1 instead']),
        ((0, 1), True, ['polyp (label 1) in none', '89.6%', 'reduce_zero_label=True ignores 0']),
        ((0, 0), False, ['polyp (label 1) in none', '0.0%', 'the maps hold 0: compare']),
        ((1, 1), False, ['background (label 0) in none', 'the maps hold 1: compare']),
        ((2, 2), True, ['background (label 0) in none', 'the maps hold 2: compare']),
        ((1, 2), True, []),
        ((0, 1), False, []),
    ],
)
def test_a_class_in_no_map_is_told_with_the_way_out(values, reduce, says, config, tmp_path):
    """The check and a training say the same: which class, how much is ignored, what to save."""
    made = np.where(labels() == 2, values[1], values[0]).astype(np.uint8)
    write(tmp_path, made)
    cfg = binary(config, tmp_path, reduce)
    detail = found(cfg).get(label_maps.ABSENT, '')
    _, warnings = trained_set(cfg)
    assert warnings == ([f'{tmp_path / MAPS}: {detail}.'] if says else [])
    assert bool(detail) == bool(says)
    for text in says:
        assert text in detail


@pytest.mark.parametrize('reduce', [False, True])
def test_maps_without_any_label_stop_before_training(reduce, config, tmp_path):
    """All pixels ignored: the loss would be 0 for ever."""
    write(tmp_path, np.full_like(labels(), 0 if reduce else 255))
    cfg = binary(config, tmp_path, reduce)
    assert 'all pixels of 2 label maps are ignored' in found(cfg)[label_maps.NO_LABEL]
    with pytest.raises(DataError, match='no label in any map'):
        trained_set(cfg)


def test_most_pixels_ignored(config, tmp_path):
    """Every class occurs, and yet the loss sees little."""
    made = np.full_like(labels(), 255)
    made[0] = 0
    made[1] = 1
    write(tmp_path, made)
    detail = found(binary(config, tmp_path))[label_maps.MOSTLY_IGNORED]
    assert detail == '95.8% of the pixels of 2 label maps are ignored'
    assert trained_set(binary(config, tmp_path))[0] == '95.8% of the pixels ignored'


@given(
    maps=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=4), min_size=1, max_size=4),
    ignored=st.sampled_from([None, 0, 3, 7]),
    num_classes=st.integers(1, 6),
)
def test_absent_is_what_no_map_holds(maps, ignored, num_classes):
    """Against a plain set, for any maps, classes and ignored label."""
    counted = sum(label_maps.count(np.array(values)) for values in maps)
    classes = tuple(map(str, range(num_classes)))
    made = label_maps.Labels(counted, len(maps), len(maps), classes, ignored, False, '')
    held = {value for values in maps for value in values}
    assert made.absent == [i for i in range(num_classes) if i not in held and i != ignored]
    every = [value for values in maps for value in values]
    assert made.share_ignored == pytest.approx(every.count(ignored) / len(every))
    assert made.has_any == any(i in held and i != ignored for i in range(num_classes))
    kinds = [error.kind for error in label_maps.label_problems(made)]
    assert (label_maps.NO_LABEL in kinds) == (not made.has_any)
    assert (label_maps.ABSENT in kinds) == (made.has_any and bool(made.absent))


def test_a_large_data_set_is_read_in_part(config, tmp_path, monkeypatch):
    """Until all classes are seen, or up to a limit that is said; the same maps each time."""
    monkeypatch.setattr(label_maps, 'ENOUGH', 3)
    monkeypatch.setattr(label_maps, 'MOST', 5)
    write(tmp_path, count=8)
    cfg = config('seg', tmp_path)
    init_default_scope('mmseg')
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert [labels.read for labels in label_maps.survey(dataset, 255)] == [3]
    for path in (tmp_path / MAPS).iterdir():
        Image.fromarray(labels()).save(path)
    (counted,) = label_maps.survey(dataset, 255)
    assert counted.of_maps() == '5 label maps (of 8)'
    assert (label_maps.survey(dataset, 255)[0].counts == counted.counts).all()


def test_data_sets_inside_others_and_without_maps(config, tmp_path):
    """Each of a ConcatDataset is counted; one without label maps is left alone."""
    write(tmp_path, labels())
    cfg = config('seg', tmp_path)
    one = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[one, one])
    _, warnings = trained_set(cfg)
    assert len(warnings) == 2 and 'four (label 5) in none of 2' in warnings[0]
    one.pipeline = one.pipeline[:1]
    assert trained_set(cfg) == ('', [])


def test_the_box_before_training_tells(config, demo_data, tmp_path, capsys):
    """Masks of 0 and 255 in the data set of the demo: the warning stands before the first loss."""
    root = shutil.copytree(demo_data / 'ade', tmp_path / 'ade')
    for path in root.glob('annotations/*/*.png'):
        values = np.asarray(Image.open(path))
        Image.fromarray(np.where(values > 1, 255, 0).astype(np.uint8)).save(path)
    cfg = binary(config, root)
    cfg.work_dir = str(tmp_path / 'run')
    build_runner(cfg, config='my.py', train=True).train()
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    log = re.sub(r'[\s│|]+', ' ', log)  # out of the box
    told, loss = log.index('if 255 stands for polyp, save 1 instead'), log.index(' loss: ')
    assert told < loss
    assert '(BaseSegDataset), ' in log and '% of the pixels ignored' in log


@pytest.mark.parametrize('sigmoid', [False, True])
def test_a_softmax_over_one_class_is_refused(sigmoid, config, tmp_path):
    """Its loss is 0 whatever the model says; a sigmoid learns."""
    cfg = config('seg', tmp_path)
    cfg.model.decode_head.num_classes = 1
    cfg.model.decode_head.loss_decode = dict(type='CrossEntropyLoss', use_sigmoid=sigmoid)
    cfg.train_dataloader.dataset.metainfo = dict(classes=('polyp',))
    if sigmoid:
        return consistency.check_classes(cfg, 'my.py', TRAIN)
    with pytest.raises(UserError, match='a softmax over one class learns nothing'):
        consistency.check_classes(cfg, 'my.py', TRAIN)


# The label that is ignored


@pytest.mark.parametrize('value', [250, 3])
def test_the_ignored_label_is_that_of_the_head(value, config, tmp_path):
    """In maps, in padding and in the pipeline; 255 is then a label like any other."""
    made = labels() - np.uint8(1)
    made[:4] = value
    write(tmp_path, made)
    cfg = binary(config, tmp_path)
    cfg.model.decode_head.ignore_index = value
    cfg.val_evaluator.ignore_index = cfg.test_evaluator.ignore_index = value
    pad = [
        dict(type='Pad', size=(64, 64)),
        dict(type='RandomRotate', prob=1.0, degree=(30, 30)),
    ]
    pipeline = cfg.train_dataloader.dataset.pipeline
    cfg.train_dataloader.dataset.pipeline = [*pipeline[:2], *pad, pipeline[-1]]
    ignore_index.match_ignored(cfg, 'my.py', ('train_dataloader', 'val_dataloader'))
    assert cfg.model.data_preprocessor.seg_pad_val == value
    assert found(cfg) == {}
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    guard.guard_pipeline(dataset, ignored=value)
    assert dataset[0]['data_samples'].gt_sem_seg.data.unique().tolist() == sorted([0, 1, value])
    made[0] = 255
    write(tmp_path, made)
    with pytest.raises(DataError, match=f'255; 2 class.es., and {value} is ignored'):
        dataset[0]


def test_a_head_that_ignores_nothing(config, tmp_path):
    """None, for a binary loss: 255 would be an index out of range."""
    write(tmp_path, np.where(labels() == 2, 255, 0).astype(np.uint8))
    cfg = binary(config, tmp_path)
    cfg.model.decode_head.ignore_index = None
    findings, _ = checks.check_config(cfg, 'my.py', TRAIN)
    assert 'and no label is ignored' in findings[0].detail


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        ('cfg.val_evaluator.ignore_index = 250', 'val_evaluator.ignore_index=255'),
        ('cfg.model.decode_head.ignore_index = 250', 'val_evaluator.ignore_index=250'),
        (
            'cfg.model.auxiliary_head = [dict(cfg.model.decode_head, ignore_index=250)]',
            'model.auxiliary_head.0.ignore_index=255',
        ),
        (
            'cfg.model.decode_head.ignore_index = cfg.val_evaluator.ignore_index = 250;'
            'cfg.train_dataloader.dataset.reduce_zero_label = True;'
            'cfg.train_dataloader.dataset.pipeline[1].reduce_zero_label = True',
            'model.decode_head.ignore_index=255',
        ),
    ],
)
def test_parts_that_ignore_different_labels_are_refused(change, says, config, tmp_path):
    """With what to set; the check says it too."""
    write(tmp_path, labels() - np.uint8(1))
    cfg = binary(config, tmp_path)
    loaders = ('train_dataloader', 'val_dataloader')
    ignore_index.match_ignored(cfg, 'my.py', loaders)
    exec(change)
    with pytest.raises(UserError, match=f'set {says} too'):
        ignore_index.match_ignored(cfg, 'my.py', loaders)
    if 'val_evaluator' not in says:
        findings, _ = checks.check_config(cfg, 'my.py', TRAIN)
        assert findings[0].kind == 'classes that disagree' and says in findings[0].detail


def test_an_evaluator_may_leave_a_class_out(config, tmp_path, monkeypatch):
    """With a warning, for what the head ignores then counts as errors."""
    warnings = []
    monkeypatch.setattr(ignore_index, 'print_log', lambda text, **_: warnings.append(text))
    cfg = binary(config, tmp_path)
    cfg.val_evaluator.ignore_index = 0
    ignore_index.match_ignored(cfg, 'my.py', ('val_dataloader',))
    assert len(warnings) == 1 and 'pixels of 255 count as errors' in warnings[0]


# Splits that are predicted and not scored


@pytest.mark.parametrize('tta', [False, True])
@pytest.mark.parametrize('prefix', ['none', 'missing'])
def test_a_test_split_needs_no_label_maps(tta, prefix, config, tmp_path):
    """format_only: the maps are neither asked for nor read, with and without augmentation."""
    write(tmp_path)
    cfg = config('seg', tmp_path)
    data = cfg.test_dataloader.dataset
    data.data_prefix = dict(img_path=IMAGES)
    if prefix == 'missing':
        data.data_prefix.seg_map_path = 'annotations/test'
    if tta:
        inner = [[dict(type='Resize', scale=(64, 48))], [data.pipeline[-2]], [data.pipeline[-1]]]
        data.pipeline = [data.pipeline[0], dict(type='TestTimeAug', transforms=inner)]
    loaders = ('test_dataloader',)
    cfg.test_evaluator.update(format_only=True, output_dir=str(tmp_path / 'out'))
    label_maps.drop_unread_maps(cfg, loaders)
    consistency.check_data(cfg, loaders)
    label_maps.check_files(cfg, loaders)
    assert checks.check_config(cfg, 'my.py', loaders) == ([], 2)
    dataset = DATASETS.build(data)
    assert len(dataset[0]['inputs']) == (1 if tta else 3)


def test_predictions_without_a_folder_are_refused(config, tmp_path):
    """mmseg would end in a TypeError after the last image."""
    cfg = config('seg', tmp_path)
    cfg.test_evaluator.format_only = True
    with pytest.raises(UserError, match='test_evaluator has format_only=True without output_dir'):
        label_maps.drop_unread_maps(cfg, ('val_dataloader', 'test_dataloader'))
    cfg.test_evaluator = [cfg.test_evaluator, cfg.test_evaluator]
    keep_predictions(cfg, 'out')
    label_maps.drop_unread_maps(cfg, ('val_dataloader', 'test_dataloader'))


def test_only_splits_without_a_score_lose_their_maps(config, tmp_path):
    """One evaluator that scores is enough to keep them; a training always does."""
    cfg = config('seg', tmp_path)
    score = dict(cfg.test_evaluator)
    cfg.test_evaluator = [dict(score, format_only=True), score]
    before = cfg.pretty_text
    label_maps.drop_unread_maps(cfg, ('train_dataloader', 'val_dataloader', 'test_dataloader'))
    assert cfg.pretty_text == before


def test_a_split_that_is_scored_without_maps_is_told(config, tmp_path):
    """That none exists, once, and where."""
    write(tmp_path)
    cfg = config('seg', tmp_path)
    del cfg.train_dataloader.dataset.data_prefix['seg_map_path']
    with pytest.raises(DataError, match='data_prefix has no seg_map_path'):
        label_maps.check_files(cfg, TRAIN)
    assert list(found(cfg)) == [label_maps.NO_MAP]


# Files


def refused(cfg):
    """The detail with which both check and training refuse a data set; '' where they take it."""
    findings = found(cfg)
    findings.pop(label_maps.OTHER_SUFFIX, None)
    try:
        label_maps.check_files(cfg, TRAIN)
    except DataError as error:
        assert findings == {error.kind: error.detail}, 'check and training say the same'
        return error.detail
    assert not findings
    return ''


@pytest.mark.parametrize(
    ('made', 'data', 'says'),
    [
        (dict(suffix='.png'), {}, "ends in '.jpg', but 2 end in .png: set img_suffix='.png'"),
        (dict(suffix='.JPG'), {}, "2 end in .JPG: set img_suffix='.JPG'"),
        (dict(map_suffix='_mask.png'), {}, "all 2 are; set seg_map_suffix='_mask.png'"),
        (dict(map_suffix='.tif'), {}, "set seg_map_suffix='.tif'"),
        (
            {},
            dict(img_suffix='jpg'),
            "000..png is missing, and all 2 are; set seg_map_suffix='png'",
        ),
        (
            {},
            dict(data_prefix=dict(img_path=IMAGES, seg_map_path='annotations')),
            '000.png is missing, and all 2 are; the folder holds training/000.png, ',
        ),
        ({}, dict(data_prefix=dict(img_path=IMAGES, seg_map_path=IMAGES)), "suffix='.jpg'"),
        (dict(folder='sub/deeper'), {}, ''),
        ({}, {}, ''),
    ],
)
def test_files_of_another_suffix(made, data, says, config, tmp_path):
    """The suffix to set is worked out from what is there."""
    write(tmp_path, **made)
    cfg = config('seg', tmp_path)
    cfg.train_dataloader.dataset.update(data)
    detail = refused(cfg)
    assert says in detail and bool(detail) == bool(says)


def test_images_that_a_suffix_leaves_out_are_told(config, tmp_path, monkeypatch):
    """mmseg would train on the rest without a word; label maps beside the images are none."""
    write(tmp_path)
    write(tmp_path, suffix='.JPEG', count=1)
    warnings = []
    monkeypatch.setattr(label_maps, 'print_log', lambda text, **_: warnings.append(text))
    cfg = config('seg', tmp_path)
    assert '1 end in .JPEG' in found(cfg)[label_maps.OTHER_SUFFIX]
    label_maps.check_files(cfg, TRAIN)
    assert len(warnings) == 1 and 'images of another suffix' in warnings[0]
    (tmp_path / IMAGES / '000.JPEG').unlink()
    for path in (tmp_path / MAPS).iterdir():
        path.rename(tmp_path / IMAGES / path.name)
    cfg.train_dataloader.dataset.data_prefix.seg_map_path = IMAGES
    assert found(cfg) == {}


def test_an_empty_folder(config, tmp_path):
    """No image at all."""
    (tmp_path / IMAGES).mkdir(parents=True)
    (tmp_path / MAPS).mkdir(parents=True)
    assert 'none is an image; check img_path' in refused(config('seg', tmp_path))


@pytest.mark.parametrize(
    ('lines', 'says'),
    [
        ('000\n\n001\n', '1 of 3 lines are blank, such as line 2; remove them'),
        ('000\n001\n \n\n', '2 of 4 lines are blank, such as line 3'),
        ('000.jpg\n001.jpg', '2 of 2 lines are not the path of an image below img_path'),
        ('000\n001.png', "in line 2, instead of '001.png', write '001'"),
        ('\ufeff000\n001', "in line 1, instead of '\\ufeff000', write '000'"),
        ('000,001', 'there is no 000,001.jpg, and no image of the 1 lines'),
        ('training\\000\n001', "write '000'"),
        ('images/training/000.jpg annotations/training/000.png', "write '000'"),
        ('000 1\n001 -1', "instead of '000 1', write '000'"),
        ('/elsewhere/000.jpg', "write '000'"),
        ('', 'it names no image'),
        ('\n\n', 'it names no image'),
        ('000\r001', "write '000'"),
        ('000\r\n001\r\n', ''),
        ('000\n001\n', ''),
        ('  000  \n001', ''),
    ],
)  # fmt: skip
def test_split_files(lines, says, config, tmp_path):
    """A line is the image's path below the folder, without suffix; what is not is shown mended."""
    write(tmp_path)
    (tmp_path / 'split.txt').write_bytes(lines.encode())
    cfg = config('seg', tmp_path)
    cfg.train_dataloader.dataset.ann_file = 'split.txt'
    detail = refused(cfg)
    assert says in detail and bool(detail) == bool(says)


def test_a_split_of_absolute_paths(config, tmp_path):
    """The label maps would be looked for beside the images; where they are, all is well."""
    write(tmp_path)
    lines = [str(tmp_path / IMAGES / name) for name in ('000', '001')]
    (tmp_path / 'split.txt').write_text('\n'.join(lines))
    cfg = config('seg', tmp_path)
    cfg.train_dataloader.dataset.ann_file = 'split.txt'
    assert "the split file has absolute paths; write '000'" in refused(cfg)
    for path in (tmp_path / MAPS).iterdir():
        shutil.copy(path, tmp_path / IMAGES)
    assert refused(cfg) == ''


def test_split_files_in_other_encodings(config, tmp_path):
    """As PowerShell writes them."""
    write(tmp_path)
    (tmp_path / 'split.txt').write_bytes('000\r\n'.encode('utf-16'))
    cfg = config('seg', tmp_path)
    cfg.train_dataloader.dataset.ann_file = 'split.txt'
    assert 'save it as UTF-8' in refused(cfg)


def test_a_split_of_images_with_another_suffix(config, tmp_path):
    """The lines are right, and img_suffix is not."""
    write(tmp_path, suffix='.png')
    (tmp_path / 'split.txt').write_text('000\n001')
    cfg = config('seg', tmp_path)
    cfg.train_dataloader.dataset.ann_file = 'split.txt'
    assert "no 000.jpg, and no image of the 2 lines; set img_suffix='.png'" in refused(cfg)


NAMES = st.text('ab.1_-é ', min_size=1, max_size=6).map(lambda text: f'x{text}y')


@given(
    name=st.lists(NAMES, min_size=1, max_size=3).map('/'.join),
    before=st.sampled_from(['', '\ufeff', 'images/', '/data/images/', './']),
    after=st.sampled_from(['', '.jpg', '.png', '.JPEG', ' 1', '.jpg m.png', '\tx']),
    slash=st.sampled_from(['/', '\\']),
)
def test_a_damaged_line_is_mended_to_the_name(name, before, after, slash, tmp_path_factory):
    """Whatever stands around a name, what the message says to write is the name itself."""
    if ' ' in name and after:  # the name's own blanks end it
        return
    folder = tmp_path_factory.getbasetemp() / 'damaged'
    shutil.rmtree(folder, ignore_errors=True)
    file = folder / f'{name}.jpg'
    file.parent.mkdir(parents=True)
    file.touch()
    line = f'{before}{name}'.replace('/', slash) + after
    meant = label_maps._meant(line.strip(), str(folder), '.jpg')
    if (folder / f'{line}.jpg').is_file():
        assert meant == ''
    else:
        assert meant == name


# Names of metainfo


@pytest.mark.parametrize('task', ['det', 'seg'])
@pytest.mark.parametrize(
    ('key', 'meant'),
    [
        ('CLASSES', 'classes'),
        ('Classes', 'classes'),
        ('class', 'classes'),
        ('class_names', 'classes'),
        ('PALETTE', 'palette'),
        ('pallete', 'palette'),
        ('thing_classes', ''),
        ('author', ''),
    ],
)
def test_misspelt_metainfo_is_named(task, key, meant, config, tmp_path):
    """A data set would ignore it, and take its own classes or colours."""
    cfg = config(task, tmp_path)
    data = cfg.train_dataloader.dataset
    data.metainfo = {key: ('one', 'two')}
    says = f'has {key}, which nothing reads; write {meant}'
    findings = Counter()
    try:
        consistency.check_classes(cfg, 'my.py', TRAIN)
    except UserError as error:
        findings[says in str(error)] += 1
    assert findings[True] == bool(meant)
    data.metainfo = {key: ('one', 'two'), 'classes': CLASSES, 'palette': [[0, 0, 0]] * 5}
    if task == 'det':
        consistency.check_classes(cfg, 'my.py', TRAIN)


def test_a_data_set_without_classes(config, tmp_path):
    """The evaluation would end in a KeyError after the training."""
    cfg = config('seg', tmp_path)
    cfg.train_dataloader.dataset.metainfo = dict(author='none')
    with pytest.raises(UserError, match='has no classes; write metainfo='):
        consistency.check_classes(cfg, 'my.py', TRAIN)


def test_reduce_zero_label_that_differs(config, tmp_path):
    """In the data set and its pipeline: mmseg would call the first label map broken."""
    cfg = config('seg', tmp_path)
    cfg.train_dataloader.dataset.reduce_zero_label = False
    with pytest.raises(UserError, match='=False, and its LoadAnnotations has True; set both'):
        consistency.check_classes(cfg, 'my.py', TRAIN)


def test_a_palette_of_another_length(config, tmp_path):
    """A config whose base has more classes: an empty palette is filled by mmseg."""
    cfg = config('seg', tmp_path)
    cfg.model.decode_head.num_classes = 2
    cfg.train_dataloader.dataset.metainfo.classes = ('background', 'polyp')
    with pytest.raises(UserError, match='write metainfo=dict.palette='):
        consistency.check_classes(cfg, 'my.py', TRAIN)
    cfg.train_dataloader.dataset.metainfo.palette = []
    consistency.check_classes(cfg, 'my.py', TRAIN)
