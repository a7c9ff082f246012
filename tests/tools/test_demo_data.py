"""The embedded data set: COCO and ADE20K layouts, read with the tools that will read them."""

import hashlib
import json

import cv2
import numpy as np
import pytest
from conftest import load_tool
from reference import REPO

COCO = pytest.importorskip('pycocotools.coco').COCO
pytest.importorskip('sklearn')

TRAIN, VAL = 6, 4
ADE = {'train': 'training', 'val': 'validation'}


tool = load_tool('make_demo_data')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A small data set."""
    out = tmp_path_factory.mktemp('demo') / 'data'
    assert tool.make_demo_data(out, seed=3, train=TRAIN, val=VAL)
    return out


@pytest.fixture(scope='module', params=['train', 'val'])
def split(request, data):
    """A split's name, its COCO annotations and the data set's folder."""
    return request.param, COCO(str(annotation_file(data, request.param))), data


def annotation_file(data, split):
    return data / 'coco' / 'annotations' / f'instances_{split}2017.json'


def picture(data, split, image):
    return cv2.imread(str(data / 'coco' / f'{split}2017' / image['file_name']))


def labels(data, split, image):
    path = data / 'ade' / 'annotations' / ADE[split] / f'ADE_{split}_{image["id"]:08d}.png'
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def digests(data):
    """The content of every file, by its place."""
    files = sorted(path for path in data.rglob('*') if path.is_file())
    return {
        str(path.relative_to(data)): hashlib.sha256(path.read_bytes()).digest() for path in files
    }


def test_images_are_there_in_the_size_that_the_annotations_say(split):
    """Every image exists, is 120 to 200 pixels a side and holds at least one object."""
    name, coco, data = split
    assert len(coco.imgs) == {'train': TRAIN, 'val': VAL}[name]
    for image in coco.imgs.values():
        assert picture(data, name, image).shape == (image['height'], image['width'], 3)
        assert (
            120
            <= min(image['height'], image['width'])
            <= max(image['height'], image['width'])
            <= 200
        )
        assert coco.getAnnIds(imgIds=image['id'])


def test_categories_are_the_configs_classes(split):
    """The demo configs name the classes in the order of the category ids."""
    from mmengine.config import Config

    names = tuple(category['name'] for category in split[1].loadCats(sorted(split[1].cats)))
    for config, before in (
        ('demo_retinanet_pvt_t', ()),
        ('demo_mask_rcnn_pvt_v2_b0', ()),
        ('demo_fpn_pvt_t', ('background',)),
    ):
        cfg = Config.fromfile(REPO / 'configs' / f'{config}.py')
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            assert loader.dataset.metainfo.classes == before + names
            assert len(loader.dataset.metainfo.palette) == len(before + names)


def test_area_and_box_are_those_of_the_polygons(split):
    """The polygons' mask has the annotated area; the box is their extent, inside the image."""
    _, coco, _ = split
    for entry in coco.anns.values():
        image = coco.imgs[entry['image_id']]
        assert coco.annToMask(entry).sum() == entry['area'] > 0
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in entry['segmentation']])
        x, y, width, height = entry['bbox']
        np.testing.assert_allclose(points.min(0), (x, y), atol=0.011)
        np.testing.assert_allclose(points.max(0), (x + width, y + height), atol=0.021)
        assert points.min() >= 0
        assert (points <= (image['width'], image['height'])).all()
        assert entry['iscrowd'] == 0


def test_polygons_leave_out_what_is_hidden(split):
    """Masks of one image share no more than a seam: hidden parts are not annotated."""
    _, coco, _ = split
    for image_id in coco.imgs:
        masks = [coco.annToMask(entry) for entry in coco.loadAnns(coco.getAnnIds(imgIds=image_id))]
        for i, one in enumerate(masks):
            for other in masks[:i]:
                assert (one & other).sum() <= 0.05 * min(one.sum(), other.sum())


def test_label_maps_are_the_instances_painted_in_order(split):
    """A pixel's label is its object's class + 1; elsewhere 1, or 0 on the seams of objects."""
    name, coco, data = split
    for image in coco.imgs.values():
        expected = np.ones((image['height'], image['width']), dtype=np.uint8)
        covered = np.zeros(expected.shape, dtype=np.uint8)
        for entry in coco.loadAnns(coco.getAnnIds(imgIds=image['id'])):
            mask = coco.annToMask(entry)
            expected[mask == 1] = entry['category_id'] + 1
            covered |= mask
        found = labels(data, name, image)
        ignored = found == 0
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found[~ignored], expected[~ignored])
        assert not (ignored & (covered == 1)).any()
        assert ignored.mean() < 0.03


def test_both_layouts_hold_the_same_pictures(split):
    """The ADE20K folders have the COCO images, byte for byte."""
    name, coco, data = split
    for image in coco.imgs.values():
        ade = data / 'ade' / 'images' / ADE[name] / f'ADE_{name}_{image["id"]:08d}.jpg'
        assert ade.read_bytes() == (data / 'coco' / f'{name}2017' / image['file_name']).read_bytes()


def test_training_and_validation_share_no_digit_and_no_background(data):
    """No scan is in both splits, and no crop of a photograph in one touches a crop in the other."""
    contents = [json.loads(annotation_file(data, name).read_text()) for name in ('train', 'val')]
    scans = [{entry['digit_sample'] for entry in content['annotations']} for content in contents]
    assert scans[0] and scans[1] and not scans[0] & scans[1]
    crops = [[image['background'] for image in content['images']] for content in contents]
    for train in crops[0]:
        for val in crops[1]:
            if train['photo'] == val['photo']:
                assert not overlap(train['crop'], val['crop'])
    # The same for every picture there could be.
    sources = tool.load_sources()
    for category in range(len(tool.CLASSES)):
        assert not set(sources['train'].samples[category]) & set(sources['val'].samples[category])
    assert sources['train'].columns[1] <= sources['val'].columns[0]


def overlap(one, other):
    """Whether two (x, y, width, height) rectangles share a pixel."""
    return all(one[i] < other[i] + other[i + 2] and other[i] < one[i] + one[i + 2] for i in (0, 1))


def test_annotated_scans_are_of_their_class(data):
    """Each object's digit is, in scikit-learn's own labels, the digit of its category."""
    from sklearn.datasets import load_digits

    target = load_digits().target
    for name in ('train', 'val'):
        for entry in json.loads(annotation_file(data, name).read_text())['annotations']:
            assert target[entry['digit_sample']] == entry['category_id'] - 1


def test_a_seed_gives_the_same_bytes_and_another_seed_others(data, tmp_path):
    """Two runs with one seed agree in every file; another seed changes every picture."""
    tool.make_demo_data(tmp_path / 'same', seed=3, train=TRAIN, val=VAL)
    assert digests(tmp_path / 'same') == digests(data)
    tool.make_demo_data(tmp_path / 'other', seed=4, train=TRAIN, val=VAL)
    here, there = digests(data), digests(tmp_path / 'other')
    pictures = [name for name in here if name.endswith('.jpg')]
    assert len(pictures) == 2 * (TRAIN + VAL)
    assert not [name for name in pictures if here[name] == there[name]]


def test_a_picture_does_not_depend_on_how_many_there_are(data, tmp_path):
    """Fewer pictures of a seed are the first of more."""
    tool.make_demo_data(tmp_path / 'few', seed=3, train=2, val=1)
    few, many = digests(tmp_path / 'few'), digests(data)
    pictures = [name for name in few if name.endswith(('.jpg', '.png'))]
    assert pictures and all(few[name] == many[name] for name in pictures)


def test_a_second_run_does_nothing_and_other_arguments_make_it_anew(tmp_path):
    """What is finished stays; other arguments or an interrupted run lead to a fresh set."""
    out = tmp_path / 'data'
    assert tool.make_demo_data(out, train=1, val=1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob('*')}
    assert not tool.make_demo_data(out, train=1, val=1)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob('*')}
    assert tool.make_demo_data(out, train=2, val=1)
    assert len(list((out / 'coco' / 'train2017').iterdir())) == 2
    stamp = json.loads((out / tool.STAMP).read_text())
    (out / tool.STAMP).write_text(json.dumps({**stamp, 'complete': False}))
    assert tool.make_demo_data(out, train=2, val=1)


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    """The tool refuses, in a sentence, to write into a folder that it did not make."""
    (tmp_path / 'mine.txt').write_text('keep me')
    assert tool.main(['--out', str(tmp_path)]) == 1
    assert 'did not make' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']


@pytest.mark.parametrize('argument', ['--train=0', '--val=-1', '--train=many'])
def test_a_bad_count_is_refused(argument, tmp_path):
    """Counts below one and words end in argparse's own error."""
    with pytest.raises(SystemExit) as error:
        tool.main(['--out', str(tmp_path / 'data'), argument])
    assert error.value.code == 2
    assert not (tmp_path / 'data').exists()


def test_mmseg_reads_the_label_maps(data):
    """The demo config's data set gives 255 for ignored, 0 for background, 1 and up for digits."""
    datasets = pytest.importorskip('mmseg.datasets')
    from mmengine.config import Config
    from mmengine.registry import DATASETS

    assert datasets.BaseSegDataset
    cfg = Config.fromfile(REPO / 'configs' / 'demo_fpn_pvt_t.py').train_dataloader.dataset
    cfg.data_root = str(data / 'ade')
    cfg.pipeline = cfg.pipeline[:2]
    cfg._scope_ = 'mmseg'
    dataset = DATASETS.build(cfg)
    assert len(dataset) == TRAIN
    for item in dataset:
        raw = cv2.imread(item['seg_map_path'], cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(
            item['gt_seg_map'], np.where(raw == 0, 255, raw.astype(int) - 1)
        )
