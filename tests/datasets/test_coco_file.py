"""COCO's annotation files: check, training and testing agree, and what can be is worked out."""

import copy
import json
import logging
import shutil

import numpy as np
import pytest
from conftest import load_tool
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import init_default_scope
from pycocotools import mask as mask_api

from pvt_mm.datasets import checks
from pvt_mm.datasets.coco_file import AT_START, Entries, Use
from pvt_mm.datasets.coco_values import run_total
from pvt_mm.datasets.consistency import check_classes
from pvt_mm.engine import build_runner
from pvt_mm.errors import DataError, UserError

tool = load_tool('fuzz_annotations')
BOTH = ('train_dataloader', 'val_dataloader')


class Made:
    """A data set of four images with eight objects, for training and validation."""

    def __init__(self, root):
        self.root, self.content = root, tool.valid_file()
        tool.make_images(root)
        self.write('good', self.content)

    def write(self, name, content):
        (self.root / f'{name}.json').write_text(json.dumps(content))

    def config(self, change=None, masks=False, train='bad', val='bad'):
        """Return the config for a changed copy of the file."""
        content = copy.deepcopy(self.content)
        if change:
            change(content)
        self.write('bad', content)
        init_default_scope('mmdet')
        return tool.make_config(self.root, masks, f'{train}.json', f'{val}.json')


@pytest.fixture
def made(tmp_path):
    return Made(tmp_path)


@pytest.fixture
def runs(monkeypatch):
    """Train or test: runs(cfg, train=True) -> the scores of a test."""
    with tool.quiet():
        logging.disable(logging.NOTSET)

        def run(cfg, train=True):
            tool.forget_runs()
            shutil.rmtree(cfg.work_dir, ignore_errors=True)
            cfg = copy.deepcopy(cfg)
            runner = build_runner(cfg, config='my.py', train=train)
            return runner.train() if train else runner.test()

        yield run


@pytest.fixture
def told(monkeypatch):
    """The lines that a run or a check logs besides mmengine's."""
    from pvt_mm.datasets import coco_readers, consistency

    lines = []
    for module in (coco_readers, consistency):
        monkeypatch.setattr(module, 'print_log', lambda text, **_: lines.append(text))
    return lines


def find(cfg, loaders=BOTH):
    findings, _ = checks.check_config(cfg, 'my.py', loaders)
    return findings


def each(key, value, of='annotations'):
    """Set a key of all entries; None as the class removes it."""

    def change(content):
        for entry in content[of]:
            entry.pop(key) if value is ABSENT else entry.update({key: value})

    return change


def one(key, value, of='annotations', index=2):
    def change(content):
        entry = content[of][index]
        entry.pop(key) if value is ABSENT else entry.update({key: value})

    return change


def top(key, value):
    def change(content):
        content.pop(key) if value is ABSENT else content.update({key: value})

    return change


ABSENT = object()
FLAT = [3, 5, 17, 5, 17, 17]
#: What is done to a valid file, and words of what is said. Those with True need masks.
REFUSED = {
    'width in text': (one('width', '48', 'images'), "image 3: width is '48'"),
    'width null': (one('width', None, 'images'), 'image 3: width is null'),
    'width -1': (one('width', -1, 'images'), 'image 3: width is -1'),
    'half a pixel': (one('height', 31.5, 'images'), 'image 3: height is 31.5'),
    'file_name null': (one('file_name', None, 'images'), 'image 3: file_name is null'),
    'file_name with NUL': (one('file_name', 'a\0b', 'images'), 'image 3: file_name is'),
    'half a character': (one('file_name', '\ud800', 'images'), "file_name is '\\ud800'"),
    'image id null': (one('id', None, 'images'), 'image null: id is null'),
    'image id list': (one('id', [3], 'images'), 'id is [3]'),
    'mixed image ids': (one('id', '3', 'images'), "id is '3', the first 1: one is text"),
    'image is text': (lambda c: c['images'].insert(0, 'x'), "it is 'x', not an object with keys"),
    'images a dict': (lambda c: top('images', {'1': c['images'][0]})(c), 'images is {'),
    'annotations a dict': (lambda c: top('annotations', {'1': {}})(c), "annotations is {'1': {}}"),
    'annotations null': (top('annotations', None), 'annotations is null, not a list'),
    'no annotations': (top('annotations', ABSENT), 'it has no annotations; a test without them'),
    'annotation is null': (lambda c: c['annotations'].append(None), 'it is null'),
    'no bbox': (one('bbox', ABSENT), 'annotation 3: it has no bbox'),
    'bbox in text': (one('bbox', '3 5 14 12'), "annotation 3: bbox is '3 5 14 12'"),
    'bbox of text': (one('bbox', ['3', 5, 14, 12]), 'annotation 3: bbox is'),
    'bbox nested': (one('bbox', [[3, 5, 14, 12]]), 'annotation 3: bbox is'),
    'bbox with NaN': (one('bbox', [3, 5, float('nan'), 12]), 'annotation 3: bbox is'),
    'bbox far out': (one('bbox', [3, 5, 1e300, 12]), 'annotation 3: bbox is'),
    'iscrowd in text': (one('iscrowd', '0'), "iscrowd is '0', not 0 or 1"),
    'ignore in text': (one('ignore', 'no'), "ignore is 'no', not 0 or 1"),
    'category_id list': (one('category_id', [1]), 'annotation 3: category_id is [1]'),
    'no image_id': (one('image_id', ABSENT), 'annotation 3: it has no image_id'),
    'huge id': (one('id', 10**30), 'id is 1000'),
    'id twice': (one('id', 1), 'annotation id given twice (annotation 1)'),
    'flat mask': (one('segmentation', FLAT), 'segmentation is [3, 5, 17', True),
    'mask in text': (one('segmentation', 'x'), "segmentation is 'x'", True),
    'no mask': (one('segmentation', ABSENT), 'it has no segmentation', True),
    'empty mask': (one('segmentation', []), 'segmentation has no polygon', True),
    'mask of two points': (one('segmentation', [[1, 2, 3, 4]]), 'has no polygon of 3 points', True),
    'mask far out': (one('segmentation', [[*FLAT[:5], 1e12]]), 'segmentation is [[', True),
    'runs of another size': (
        one('segmentation', {'size': [8, 8], 'counts': [64]}), 'is of 8x8, its image of 48x32', True
    ),
    'runs that do not fill': (
        one('segmentation', {'size': [32, 48], 'counts': [5]}), 'do not fill [32, 48]', True
    ),
    'runs too long': (
        one('segmentation', {'size': [32, 48], 'counts': 'o' * 20 + '1'}), 'do not fill', True
    ),
    'runs cut off': (
        one('segmentation', {'size': [32, 48], 'counts': 'ppp'}), "the counts 'ppp'", True
    ),
    'runs too few': (
        one('segmentation', {'size': [32, 48], 'counts': '11'}), 'do not fill [32, 48]', True
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', REFUSED)
def test_an_entry_that_a_reader_cannot_use_is_named_before_the_first_iteration(name, made, runs):
    """Check, training and test name the same entry, whether train or val reads it."""
    change, words, *masks = REFUSED[name]
    cfg = made.config(change, bool(masks))
    found = [finding for finding in find(cfg) if finding.kind in AT_START]
    assert any(words in f'{finding.kind} ({finding.detail})' for finding in found), found
    for train in (True, False):
        with pytest.raises(UserError) as error:
            runs(cfg, train)
        assert words in str(error.value) and 'bad.json: ' in str(error.value)
        assert 'check_dataset.py my.py says what is wrong' in str(error.value)


@pytest.mark.parametrize('text', ['', '{', '[]', '[' * 10**5, '{"x": ' + '[' * 10**5, 'null', '5'])
def test_a_file_that_is_no_json_of_coco_is_a_finding(text, made, runs):
    """Cut, of another kind, or nested beyond what Python reads."""
    cfg = made.config()
    (made.root / 'bad.json').write_text(text)
    assert 'data set that does not load' in {finding.kind for finding in find(cfg)}
    for train in (True, False):
        with pytest.raises(UserError, match=r'bad\.json'):
            runs(cfg, train)


# What is added


def score(cfg, runs):
    return runs(cfg, train=False)['coco/bbox_mAP']


@pytest.mark.parametrize('kind', ['CocoMetric', 'FastCocoMetric'])
@pytest.mark.parametrize('first', [0, -3, 0.5])
def test_annotation_ids_from_0_score_as_others(kind, first, made, runs, told):
    """Perfect detections have the AP 1, said once; pycocotools takes the id 0 for no match."""
    if kind == 'FastCocoMetric':
        pytest.importorskip('pvt_mm.evaluation.fast_coco')

    def renumber(content):
        for number, entry in enumerate(content['annotations']):
            entry['id'] = number + first

    cfg = made.config(renumber)
    cfg.test_evaluator.type = kind
    assert score(cfg, runs) == 1
    assert sum('annotation id below 1' in line for line in told) == 1
    (finding,) = [each for each in find(cfg, ['test_dataloader']) if 'id below' in each.kind]
    assert finding.detail.endswith(' of 8 objects')


@pytest.mark.parametrize('value', [ABSENT, None])
def test_iscrowd_is_added(value, made, runs, told):
    """pycocotools needs it: check, training and test say that 0 is taken."""
    cfg = made.config(each('iscrowd', value))
    assert score(cfg, runs) == 1
    assert sum('no iscrowd (8 of 8 objects): pvt_mm takes 0.' in line for line in told) == 1
    runs(cfg)
    kinds = [finding.kind for finding in find(cfg)]
    assert kinds.count('no iscrowd') == 1 and not set(kinds) & set(checks.STOPPING)


@pytest.mark.parametrize('value', [ABSENT, None, 0, -1, '168', float('nan'), [168]])
def test_area_is_worked_out(value, made, runs, told):
    """Where it is no positive number: all objects are trained on, and scored."""
    cfg = made.config(each('area', value))
    runs(cfg)
    assert sum('area worked out (8 of 8 objects)' in line for line in told) == 2, 'train, val'
    assert score(cfg, runs) == 1
    kinds = [finding.kind for finding in find(cfg)]
    assert kinds.count('area worked out') == 2 and 'box of zero area' not in kinds


def entries_of(content, **use):
    return Entries(content, 'a.json', 'images', tool.CLASSES, Use(**use))


@given(st.lists(st.tuples(st.floats(0, 48), st.floats(0, 32)), min_size=3, max_size=6))
@settings(max_examples=50, deadline=None)
def test_the_area_is_that_of_the_mask(points):
    """Of polygons and run lengths as pycocotools counts pixels; of the box where there is none."""
    polygon = [float(number) for point in points for number in point]
    (runs,) = mask_api.frPyObjects([polygon], 32, 48)
    whole = list(map(int, np.array(mask_api.area([runs]))))[0]
    for mask in ([polygon], dict(runs, counts=runs['counts'].decode()), None):
        content = tool.valid_file()
        content['annotations'][0].update(segmentation=mask, area=0)
        entries = entries_of(content)
        expected = whole if mask and whole else 14 * 12
        assert entries.content['annotations'][0]['area'] == expected


@given(st.binary(min_size=32 * 48, max_size=32 * 48), st.integers(0, 3), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_runs_are_those_of_pycocotools(pixels, smooth, step):
    """Of any mask, the text of its runs fills the image, and no longer with a letter less."""
    mask = np.frombuffer(pixels, np.uint8).reshape(32, 48) < 40
    mask = np.kron(mask[::step, ::step], np.ones((step, step), bool))[:32, :48]
    runs = mask_api.encode(np.asfortranarray(mask[:, : 48 - smooth].astype(np.uint8)))
    counts, size = runs['counts'].decode(), runs['size']
    assert run_total(counts) == size[0] * size[1]
    assert run_total(counts + '1') != size[0] * size[1]


# Objects used and left out


LEFT_OUT = {
    'ignore': (each('ignore', 1), '7 object marked ignore'),
    'crowd': (each('iscrowd', 1), '8 crowd region'),
    'outside': (each('bbox', [100, 5, 14, 12]), '8 box outside the image'),
    'flat': (each('bbox', [3, 5, 14, 0.5]), '8 box of zero area'),
}


@pytest.mark.parametrize('name', LEFT_OUT)
def test_a_training_without_an_object_to_learn_is_refused(name, made, runs):
    """Check and training say how many are left out, and why."""
    change, words = LEFT_OUT[name]
    cfg = made.config(change, val='good')
    words = words.replace('7', '8')
    (finding,) = [each for each in find(cfg) if each.kind in checks.STOPPING]
    assert finding.kind == 'no object to learn' and words in finding.detail
    with pytest.raises(UserError, match=f'no object to learn: 0 objects used, .*{words}'):
        runs(cfg)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (each('image_id', '1'), 'no image is left to train on: 0 objects used, 8 left out'),
        (each('category_id', 9), 'no image is left to train on: 0 objects used'),
        (top('annotations', []), 'no image is left to train on: 0 objects used'),
        (each('width', 7, 'images'), 'no image is left to train on: 0 objects used'),
    ],
)
def test_a_training_without_an_image_says_what_check_says(change, words, made, runs):
    """mmdet stops on an array of nothing."""
    cfg = made.config(change, val='good')
    (finding,) = [each for each in find(cfg) if each.kind in checks.STOPPING]
    assert finding.detail.startswith(words)
    with pytest.raises(UserError, match=words):
        runs(cfg)


def test_ids_of_two_types_are_explained(made):
    """Ids of images in numbers, and in annotations as text."""
    found = find(made.config(each('image_id', '1')))
    (first, *_) = [finding for finding in found if finding.kind == 'annotation of no image']
    assert first.detail.endswith('id is text in one place and a number in the other')


def test_the_summary_shows_objects_used_and_left_out(made, runs):
    """And warns of a class without objects, and where most are left out."""

    def change(content):
        for entry in content['annotations'][:5]:
            entry['bbox'] = [3, 5, 0, 0]
        for entry in content['annotations']:
            entry['category_id'] = 1

    cfg = made.config(change)
    cfg.log_level = 'INFO'
    runs(cfg)
    log = next((made.root / 'run').glob('*/*.log')).read_text(encoding='utf-8')
    text = ' '.join(word for word in log.split() if word not in '│|')
    assert '3 objects used, 5 left out (5 box of zero area)' in text
    assert 'the training data have no object of class dog: nothing of it is learnt.' in text
    assert 'most objects of the training data are left out' in text


def test_a_class_without_objects_is_found(made):
    """By its name; not where a file is learnt that has it."""
    cfg = made.config(each('category_id', 2), val='good')
    (finding,) = [each for each in find(cfg) if each.kind == 'class without objects']
    assert finding.detail == 'cat' and finding.file.endswith('bad.json')
    assert finding.kind in checks.HARMLESS


def test_no_object_to_score_is_told(made, runs, told):
    """A validation without objects gives -1, and training goes on."""
    cfg = made.config(top('annotations', []), train='good')
    runs(cfg)
    assert any('no object to score: pvt_mm gives a score of -1.' in line for line in told)
    assert 'no object to score' in {finding.kind for finding in find(cfg)}


# Categories


def test_two_categories_of_one_name_are_named(made, runs):
    """With ids and counts, and what to write."""

    def change(content):
        content['categories'].append(dict(id=7, name='cat'))
        content['annotations'][0]['category_id'] = 7

    cfg = made.config(change)
    words = "has 2 categories of the name 'cat': id 1 'cat' (4 objects), id 7 'cat' (1 objects); "
    for loaders in (BOTH, ['test_dataloader']):
        with pytest.raises(UserError) as error:
            check_classes(cfg, 'my.py', loaders)
        assert words + 'write category_id 1 in all their objects' in str(error.value)
        assert str(error.value).endswith('and remove category 7.')
    assert words in [each for each in find(cfg) if each.kind == 'classes that disagree'][0].detail


@pytest.mark.parametrize(
    ('twin', 'way_out'),
    [
        (dict(id=1, name='cat'), 'remove one of the two entries.'),
        (dict(id=1, name='cow'), 'give each an id of its own, also in the category_id'),
    ],
)
def test_two_categories_with_one_id_are_named(twin, way_out, made):
    """mmdet alone gives the id two labels."""
    cfg = made.config(lambda content: content['categories'].append(twin))
    with pytest.raises(UserError) as error:
        check_classes(cfg, 'my.py', BOTH)
    assert "2 categories with the id 1: id 1 'cat' (4 objects), id 1" in str(error.value)
    assert way_out in str(error.value)


def test_twins_of_no_class_are_no_matter(made):
    """Two categories that are not learnt may share a name."""
    twins = [dict(id=7, name='cow'), dict(id=8, name='cow')]
    check_classes(made.config(lambda content: content['categories'].extend(twins)), 'my.py', BOTH)


def test_classes_given_twice_are_refused(made):
    """In the config: there would be two labels for one name."""
    cfg = made.config()
    cfg.train_dataloader.dataset.metainfo.classes = ('cat', 'cat')
    with pytest.raises(UserError, match='name cat more than once'):
        check_classes(cfg, 'my.py', BOTH)


# Evaluators


def renamed(content):
    for image in content['images']:
        image['file_name'] = f'other_{image["id"]}.jpg'


def renumbered(content):
    for image in content['images']:
        image['id'] += 100
    for entry in content['annotations']:
        entry['image_id'] += 100


OTHER = {
    "train's": (None, 'bad.json, the file of train_dataloader, but val_dataloader reads'),
    'same ids, other names': (renamed, 'image 1 has the file_name other_1.jpg in the one, 1.jpg'),
    'other sizes': (each('width', 50, 'images'), 'image 1 has the width 50 in the one, 48 in'),
    'other ids': (renumbered, '4 of 4 images are not in it, as id 1'),
    'one image less': (lambda c: c['images'].pop(), '1 of 4 images are not in it, as id 4'),
    'other categories': (lambda c: c['categories'].reverse(), 'its categories in another order'),
    'broken': (one('bbox', ABSENT), 'incomplete entry (annotation 3: it has no bbox)'),
}


@pytest.mark.parametrize('name', OTHER)
def test_an_evaluator_of_other_images_is_refused(name, made, runs):
    """Before the first iteration, with what to write, which then gives the right score."""
    change, words = OTHER[name]
    cfg = made.config(change, train='bad' if name == "train's" else 'good', val='good')
    if name != "train's":  # the same images in a file of its own
        shutil.copy(made.root / 'good.json', made.root / 'val.json')
        for loader in ('val_dataloader', 'test_dataloader'):
            cfg[loader].dataset.ann_file = 'val.json'
    for key in ('val_evaluator', 'test_evaluator'):
        cfg[key].ann_file = str(made.root / 'bad.json')
    (finding,) = [each for each in find(cfg) if each.kind in checks.STOPPING]
    assert finding.kind == 'evaluator that reads another file' and words in finding.detail
    for train in (True, False):
        with pytest.raises(UserError) as error:
            runs(cfg, train)
        assert words.replace('val_d', 'val_d' if train else 'test_d') in str(error.value)
    if name != 'broken':
        fix = str(error.value).split("write test_evaluator.ann_file='")[1].rstrip("'.")
        cfg.test_evaluator.ann_file = fix
        assert score(cfg, runs) == 1


def test_an_evaluator_without_its_file_is_refused(made, runs):
    """A missing file, and none at all; of several evaluators, the one is named."""
    cfg = made.config()
    cfg.val_evaluator = [dict(cfg.val_evaluator), dict(cfg.val_evaluator, ann_file='none.json')]
    cfg.val_evaluator[1].prefix = 'second'
    with pytest.raises(UserError, match=r'val_evaluator\.1 of my\.py reads none\.json, which is m'):
        runs(cfg)
    cfg.val_evaluator[1].pop('ann_file')
    with pytest.raises(UserError, match=r'val_evaluator\.1 of my\.py has no ann_file; write val_'):
        runs(cfg)
    assert 'evaluator that reads another file' in {finding.kind for finding in find(cfg)}
    keys = ('img_id', 'ori_shape', 'instances')
    cfg.val_dataloader.dataset.pipeline[-1].meta_keys = keys
    runs(cfg)


@pytest.mark.parametrize(
    'wrong', [dict(metric='mAP'), dict(format_only=True), dict(best=1), dict(proposal_nums=3)]
)
def test_an_evaluator_with_a_wrong_argument_is_refused(wrong, made, runs):
    """mmdet would say so in a traceback; check says it too."""
    cfg = made.config()
    cfg.val_evaluator.update(wrong)
    (finding,) = [each for each in find(cfg) if each.kind in checks.STOPPING]
    assert finding.detail.startswith('val_evaluator of my.py cannot be built (')
    with pytest.raises(UserError, match=r'val_evaluator of my\.py cannot be built \('):
        runs(cfg)


def test_masks_of_categories_that_are_not_scored_are_no_matter(made, runs):
    """pycocotools reads those of the classes alone."""

    def change(content):
        content['categories'].append(dict(id=3, name='cow'))
        content['annotations'][2].update(category_id=3, segmentation=[])

    cfg = made.config(change, masks=True)
    assert runs(cfg, train=False)['coco/segm_mAP'] == 1
    assert not {finding.kind for finding in find(cfg)} & set(checks.STOPPING)


def test_an_evaluator_may_read_a_copy(made, runs, told):
    """Of the same images; more images than are given are told."""
    more = dict(made.content['images'][0], id=9)
    cfg = made.config(lambda content: content['images'].append(more), train='good')
    shutil.copy(made.root / 'good.json', made.root / 'val.json')
    cfg.test_dataloader.dataset.ann_file = 'val.json'
    assert score(cfg, runs) == 1
    assert any('has 5 images, 1 more than are scored' in line for line in told)


def test_an_evaluator_of_more_images_than_indices_is_told(made, runs, told):
    """mmdet scores all images of the file."""
    cfg = made.config()
    cfg.test_dataloader.dataset.indices = 2
    assert score(cfg, runs) < 1
    assert any('test_dataloader gives only those of its indices' in line for line in told)


def test_a_test_without_annotations_is_no_fault(made, runs):
    """format_only: nothing is found, and the predictions are written."""
    cfg = made.config(top('annotations', ABSENT), train='good', val='good')
    cfg.test_dataloader.dataset.ann_file = 'bad.json'
    prefix = str(made.root / 'out')
    cfg.test_evaluator.update(
        ann_file=str(made.root / 'bad.json'), format_only=True, outfile_prefix=prefix
    )
    assert find(cfg, ['test_dataloader']) == []
    assert runs(cfg, train=False) == {}
    assert json.loads((made.root / 'out.bbox.json').read_text()) == []
    cfg.test_evaluator.format_only = False
    with pytest.raises(UserError, match='it has no annotations; a test without them has format_'):
        runs(cfg, train=False)


# Files


def test_backslashes_in_file_names_are_named(made, runs):
    """The cause and the way out, where the image is found with the other stroke."""
    cfg = made.config(one('file_name', '..\\images\\3.jpg', 'images'))
    (finding,) = [each for each in find(cfg, ['train_dataloader']) if each.kind in checks.STOPPING]
    assert finding.kind == 'missing file'
    assert finding.detail == 'its name has \\; write / instead, and it is found'
    with pytest.raises(DataError, match='write / instead'):
        runs(cfg)


def test_a_data_set_without_its_folder_of_images(made, runs):
    """data_prefix without img: mmdet's KeyError names nothing."""
    cfg = made.config()
    cfg.train_dataloader.dataset.data_prefix = dict(img_path='images')
    assert 'data_prefix has no img' in find(cfg)[0].detail
    with pytest.raises(UserError, match='data_prefix has no img'):
        runs(cfg)


def test_runs_that_the_config_does_not_decode_are_left_out(made):
    """poly2mask=False: mmdet passes over run-length masks without a word."""
    cfg = made.config(masks=True, val='good')
    cfg.train_dataloader.dataset.pipeline[1].poly2mask = False
    kinds = [finding.kind for finding in find(cfg, ['train_dataloader'])]
    assert kinds.count('RLE mask, not decoded') == 2


def test_the_tool_ends_in_a_table_on_a_broken_file(
    small_config, run_tool, demo_data, tmp_path, capsys
):
    """check_dataset itself: exit code 1 and no traceback."""
    shutil.copytree(demo_data / 'coco', tmp_path / 'data')
    file = tmp_path / 'data/annotations/instances_train2017.json'
    content = json.loads(file.read_text())
    content['annotations'] = {str(entry['id']): entry for entry in content['annotations']}
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as end:
        run_tool('check_dataset', small_config('det'), '--data-root', tmp_path / 'data')
    assert end.value.code == 1
    assert 'data set that does not load' in capsys.readouterr().out


def test_a_slice_of_the_fuzz():
    """Of damaged files, check, training and test refuse the same, in a sentence."""
    counts, wrong = tool.run_cases(12, seed=0)
    assert wrong == []
    assert counts['check', 'refused'] and counts['check', 'well']


def test_the_fuzz_sees_a_fault(monkeypatch):
    """A reader that fails, and a check that is kinder than a training."""
    assert tool.faults({'check': 'well', 'train': 'KeyError: 1'}) == ['train: KeyError: 1']
    assert tool.faults({'check': 'well', 'train': 'refused'}) == ['check: well, train: refused']
    assert tool.faults({'check': 'refused', 'train': 'refused'}) == []
