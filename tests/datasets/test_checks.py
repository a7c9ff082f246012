"""The check of a data set finds what was planted, file by file, and says what training does."""

import json
import math
import shutil
from collections import Counter

import pytest
from bad_data import CLASSES, COCO, HEIGHT, SEGMENTATION, WIDTH, coco_set, segmentation_set
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import DATASETS, init_default_scope
from reference import REPO

from pvt_mm.config import task_of
from pvt_mm.datasets import checks, label_maps
from pvt_mm.datasets.coco_file import Entries, Use
from pvt_mm.errors import UserError

STOPPING, HARMLESS = checks.STOPPING, checks.HARMLESS
TRAIN = ['train_dataloader']
SETS = {'ins': (COCO, coco_set), 'seg': (SEGMENTATION, segmentation_set)}


def with_all_classes(demo, root):
    """Copy the demo's training data, and make an object one of the fifth class, which has none."""
    shutil.copytree(demo, root)
    file = root / 'annotations/instances_train2017.json'
    content = json.loads(file.read_text())
    content['annotations'][0]['category_id'] = 5
    file.write_text(json.dumps(content))
    return root


def found(cfg):
    findings, _ = checks.check_config(cfg, 'config.py', TRAIN)
    return findings


@pytest.mark.parametrize('task', ['ins', 'seg'])
def test_everything_planted_is_found_and_nothing_else(task, config, tmp_path):
    """Each kind, at each file, as often as it was planted."""
    kinds, make = SETS[task]
    expected = Counter(make(tmp_path, list(kinds)))
    seen = Counter((finding.file, finding.kind) for finding in found(config(task, tmp_path)))
    assert not seen - expected and not expected - seen


def test_every_kind_is_planted():
    """No kind is listed that the tests never met."""
    met = {kind for _, kinds in COCO.values() for kind in kinds}
    met |= {kind for _, *both in SEGMENTATION.values() for kinds in both for kind in kinds}
    elsewhere = {
        *('annotation of no image', 'class without objects', 'area worked out', 'no iscrowd'),
        *('annotation id below 1', 'no object to score', 'no object to learn'),
        *('RLE mask, not decoded', 'data set that does not load', 'classes that disagree'),
        'evaluator that reads another file',
    }
    elsewhere |= label_maps.KINDS  # in test_label_maps.py
    assert met | elsewhere == {*STOPPING, *HARMLESS}


def test_the_page_has_the_table():
    """docs/data.md says of each kind what the tool says."""
    page = (REPO / 'docs/data.md').read_text()
    rows = [line for line in page.splitlines() if line.startswith('| ') and 'kind |' not in line]
    assert rows == [f'| {kind} | {does} |' for kind, does in {**STOPPING, **HARMLESS}.items()]


@pytest.mark.parametrize('task', ['ins', 'seg'])
def test_a_clean_data_set_reports_nothing(
    task, small_config, run_tool, demo_data, tmp_path, capsys
):
    """Exit code 0, and all images read once though val and test are the same."""
    root = tmp_path / 'data'  # the few images of the demo lack a class
    if task == 'ins':
        root = with_all_classes(demo_data / 'coco', root)
    else:
        segmentation_set(root, ['clean'] * 8)
        for kind in ('images', 'annotations'):
            (root / kind / 'validation').symlink_to(root / kind / 'training')
    with pytest.raises(SystemExit) as end:
        run_tool('check_dataset', small_config(task), '--data-root', root)
    assert end.value.code == 0
    count = 16 if task == 'seg' else 8
    assert capsys.readouterr().out == f'Nothing found in {count} images.\n'


@pytest.mark.parametrize(('names', 'code'), [(['gray'] * 12, 0), (['gray', 'cut'], 1)])
def test_the_tool_prints_a_table_and_its_exit_code_tells(
    names, code, small_config, run_tool, tmp_path, capsys
):
    """0 where training goes on, 1 where it stops; long lists of harmless files are cut."""
    coco_set(tmp_path / 'data', names)
    arguments = (small_config('ins'), '--data-root', tmp_path / 'data', '--split', 'train')
    with pytest.raises(SystemExit) as end:
        run_tool('check_dataset', *arguments)
    assert end.value.code == code
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if line.startswith('grayscale image  ')]
    count = str(names.count('gray'))
    assert row.endswith(f'  {HARMLESS["grayscale image"]}')
    assert row.split()[2:4] == [count, count]
    if code:
        assert f'truncated image:\n  {tmp_path / "data/train2017/002.jpg"}  (' in out
        assert 'Training would stop: 1 of 3 findings.' in out
    else:
        assert '  ... and 2 more; --all lists them' in out
        assert 'Training would not stop on any of these 13 findings.' in out


# What the table says is what mmdet and mmseg do: here without any guard


def dataset(cfg):
    """Build the training set with its whole pipeline, as a Runner does."""
    init_default_scope(task_of(cfg))
    # Serialised, each would collect garbage first, for half a second.
    return DATASETS.build(dict(cfg.train_dataloader.dataset, serialize_data=False))


@pytest.mark.parametrize('name', COCO)
def test_mmdet_does_what_the_table_says(name, config, tmp_path):
    """Left out, kept with its object, ignored, or stopped by some error of its own."""
    coco_set(tmp_path, [name, 'clean'])
    kinds = COCO[name][1]
    if any(kind in STOPPING for kind in kinds):
        # mmdet itself does not see sizes: it trains, until boxes outside give an infinite loss.
        if 'image of another size' not in kinds:
            with pytest.raises(Exception):  # noqa: B017
                train = dataset(config('ins', tmp_path))
                [train[index] for index in range(len(train))]
        return
    train = dataset(config('ins', tmp_path))
    sample = train[0]
    effects = {HARMLESS[kind] for kind in kinds}
    if 'leaves the image out (filter_cfg)' in effects:
        assert len(train) == 1
        return
    assert len(train) == 2
    assert sample['inputs'].dtype.is_floating_point is False and sample['inputs'].shape[0] == 3
    labels = sample['data_samples'].gt_instances.labels.tolist()
    if any(effect.startswith('leaves the object out') for effect in effects):
        assert labels == []
    elif 'crowd region' in kinds:
        assert labels == [] and len(sample['data_samples'].ignored_instances.labels) == 1
    elif name == 'area 0':
        assert labels == [], 'without the area that is worked out'
    else:
        assert labels == [0]
    if name == 'partly':
        height, width = sample['data_samples'].img_shape
        assert sample['data_samples'].gt_instances.bboxes.tensor[0, 2] == width
    if name == 'gray':
        blue, green, red = sample['inputs']
        assert (blue == green).all() and (green == red).all()


@pytest.mark.parametrize('name', SEGMENTATION)
def test_mmseg_does_what_the_table_says(name, config, tmp_path):
    """Loads, or stops; what it loads of another size or with unknown ids, a guard must stop."""
    segmentation_set(tmp_path, [name, 'clean'])
    train = dataset(config('seg', tmp_path))
    kinds = Counter(kind for kinds in SEGMENTATION[name][1:] for kind in kinds)
    silent = {'label map of another size', 'label map in colour', 'unknown id in a label map'}
    if set(kinds) & set(STOPPING) - silent:
        with pytest.raises(Exception):  # noqa: B017
            train[0]
        return
    assert len(train) == 2 - kinds['label map without image']
    sample = train[0]
    labels = sample['data_samples'].gt_sem_seg.data.unique().tolist()
    if name == 'map id':
        assert max(label for label in labels if label != 255) >= 6
    elif name == 'map id 258':
        assert set(labels) <= {0, 1, 255}, '257 and 258 have become 1 and 2'
    elif name == 'map -254':
        assert labels == [1, 2], '-254 and -253 have become 2 and 3'
    elif name == 'map half':
        assert labels == [0, 2], '1.5 and 3 have become 1 and 3'
    elif 'rgb' not in name:
        assert set(labels) <= {*range(6), 255}
    if name == 'map ignored':
        assert labels == [255]


side = st.one_of(
    st.integers(-80, 80), st.floats(-1, 2), st.sampled_from([float('nan'), float('inf'), 0, 1])
)


@settings(max_examples=300, deadline=None)
@given(
    box=st.tuples(side, side, side, side),
    area=st.sampled_from([-1, 0, 1e-9, 50, float('nan')]),
    category=st.integers(0, 6),
    crowd=st.booleans(),
)
def test_objects_are_left_out_as_by_mmdet(box, area, category, crowd):
    """Of any box, area and category, the check says left out where mmdet leaves out."""
    from mmdet.datasets import CocoDataset

    init_default_scope('mmdet')
    plain = CocoDataset(
        ann_file='x.json', data_prefix=dict(img=''), metainfo=dict(classes=CLASSES), lazy_init=True
    )
    plain.cat_ids = [1, 2, 3, 4, 5]
    plain.cat2label = {number: number - 1 for number in plain.cat_ids}
    image = dict(id=1, img_id=1, file_name='x.jpg', width=WIDTH, height=HEIGHT)
    entry = dict(id=1, image_id=1, bbox=list(box), area=area, category_id=category, iscrowd=crowd)
    content = dict(
        images=[image],
        annotations=[entry],
        categories=[dict(id=number, name=name) for number, name in enumerate(CLASSES, 1)],
    )
    entries = Entries(content, 'x.json', '', CLASSES, Use())
    if entries.stopping():
        assert not all(map(math.isfinite, box))
        return
    assert entry['area'] == (area if area in (1e-9, 50) else max(box[2], 0) * max(box[3], 0))
    taken = plain.parse_data_info(dict(raw_img_info=image, raw_ann_info=[entry]))['instances']
    left_out = [finding for finding in entries.found if 'leaves the' in HARMLESS[finding.kind]]
    assert bool(taken) != bool(left_out)
    assert entries.census.used.total() == (bool(taken) and not crowd)


# Annotation files and configs


@pytest.mark.parametrize('content', ['', '{', '[]', '{"images": []}'])
def test_a_broken_annotation_file_is_reported(content, config, tmp_path):
    """Cut, or of another format."""
    coco_set(tmp_path, ['clean'])
    file = tmp_path / 'annotations/instances_train2017.json'
    file.write_text(content)
    kinds = {finding.kind for finding in found(config('det', tmp_path))}
    assert kinds == {'data set that does not load', 'classes that disagree'}


def test_a_data_set_of_which_nothing_is_left_is_reported(config, tmp_path):
    """mmdet would stop on an array of nothing."""
    coco_set(tmp_path, ['no object'])
    findings = found(config('det', tmp_path))
    (finding,) = [each for each in findings if each.kind in STOPPING]
    assert finding.detail == 'no image is left to train on: 0 objects used'


def test_masks_matter_where_they_are_learnt(config, tmp_path):
    """A detector without masks trains on objects that have none."""
    coco_set(tmp_path, ['no mask', 'rle size', 'two points'])
    findings = found(config('det', tmp_path))
    assert {finding.kind for finding in findings} == {'RLE mask', 'class without objects'}


def test_wrapped_data_sets_are_checked(config, tmp_path):
    """Data sets inside RepeatDataset and ConcatDataset."""
    expected = coco_set(tmp_path, ['gray', 'cut'])
    cfg = config('det', tmp_path)
    both = dict(type='ConcatDataset', datasets=[cfg.train_dataloader.dataset])
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=both)
    assert sorted((finding.file, finding.kind) for finding in found(cfg)) == expected


def test_other_formats_are_refused(config, tmp_path):
    """A VOC config is told that it is not read, rather than that it is clean."""
    cfg = config('det', tmp_path)
    cfg.train_dataloader.dataset.update(type='VOCDataset', data_root='VOC2007')
    with pytest.raises(UserError, match='VOCDataset is another kind'):
        found(cfg)


def test_a_root_in_other_letters_is_no_finding(config, tmp_path):
    """Only what stands below the root is told, for every file would be otherwise."""
    coco_set(tmp_path / 'données', ['clean'])
    kinds = [finding.kind for finding in found(config('det', tmp_path / 'données'))]
    assert kinds == ['class without objects']
