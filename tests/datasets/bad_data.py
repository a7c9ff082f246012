"""Small data sets with one thing wrong an image: COCO's format and mmseg's label maps."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from pvt_mm.datasets.coco_file import LEFT_OUT

WIDTH, HEIGHT = 64, 48
CLASSES = ('zero', 'one', 'two', 'three', 'four')
BOX = [10, 8, 20, 16]
RNG = np.random.RandomState(0)


def picture(mode='RGB', size=(WIDTH, HEIGHT)):
    """A smooth picture, so that its JPEG is cut in the middle of its content, not of its header."""
    coarse = RNG.randint(0, 255, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.BICUBIC).convert(mode)


def turned(path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    picture().save(path, exif=exif)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def transparent(path, alpha=0):
    image = picture('RGBA')
    image.putalpha(alpha)
    image.save(path, format='PNG')


def wide(path):
    Image.fromarray(RNG.randint(0, 65535, (HEIGHT, WIDTH)).astype(np.uint16)).save(path)


def rle(height=HEIGHT):
    x, y, w, h = BOX
    mask = np.zeros((height, WIDTH), np.uint8, order='F')
    mask[y : y + h, x : x + w] = 1
    encoded = coco_mask.encode(mask)
    return {'size': encoded['size'], 'counts': encoded['counts'].decode()}


class Sample:
    """An image with its entry and its one object in an annotation file."""

    def __init__(self, root, number):
        self.folder = root / 'train2017'
        self.image = dict(id=number, file_name=f'{number:03}.jpg', width=WIDTH, height=HEIGHT)
        x, y, w, h = BOX
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        self.object = dict(
            id=number,
            image_id=number,
            category_id=1,
            bbox=list(BOX),
            area=w * h,
            iscrowd=0,
            segmentation=outline,
        )
        self.images, self.objects = [self.image], [self.object]
        picture().save(self.path)

    @property
    def path(self):
        return self.folder / self.image['file_name']

    def rename(self, name):
        new = self.folder / name
        new.parent.mkdir(parents=True, exist_ok=True)
        self.path.rename(new)
        self.image['file_name'] = name


def _directory(s):
    s.path.unlink()
    s.path.mkdir()


def _crowd(s):
    s.object.update(iscrowd=1, segmentation=rle())


def _twice(s):
    s.objects.append(dict(s.object))


def _id_twice(s):
    s.images.insert(0, dict(s.image, file_name='000.jpg'))


def _small(s):
    picture(size=(20, 20)).save(s.path)
    s.image.update(width=20, height=20)
    s.object['bbox'] = [2, 2, 9, 9]


def _wide(s):
    s.image['file_name'] = s.image['file_name'].replace('.jpg', '.png')
    wide(s.path)


KEPT = 'image without objects, kept'
#: What is done to a sample, and the kinds that are to be found for its file.
COCO = {
    'clean': (lambda s: None, []),
    'missing': (lambda s: s.path.unlink(), ['missing file']),
    'name of 300': (lambda s: s.image.update(file_name='x' * 300), ['path too long']),
    'directory': (_directory, ['unreadable file']),
    'text': (lambda s: s.path.write_text('hello'), ['unreadable image']),
    'empty': (lambda s: s.path.write_bytes(b''), ['unreadable image']),
    'cut': (lambda s: cut(s.path), ['truncated image']),
    'size': (lambda s: s.image.update(width=WIDTH + 7), ['image of another size']),
    'rle size': (
        lambda s: s.object.update(segmentation=rle(HEIGHT + 7)),
        ['RLE mask', 'broken annotation'],
    ),
    'no mask': (lambda s: s.object.pop('segmentation'), ['broken annotation']),
    'no box': (lambda s: s.object.pop('bbox'), ['incomplete entry', 'image without objects']),
    'box of 3': (lambda s: s.object['bbox'].pop(), ['invalid entry', 'image without objects']),
    'flat mask': (
        lambda s: s.object.update(segmentation=s.object['segmentation'][0]),
        ['invalid entry', 'image without objects'],
    ),
    'width in text': (lambda s: s.image.update(width=str(WIDTH)), ['invalid entry']),
    'no width': (lambda s: s.image.pop('width'), ['incomplete entry']),
    'object twice': (_twice, ['annotation id given twice']),
    'image twice': (_id_twice, ['image id given twice']),
    'no area': (lambda s: s.object.update(bbox=[9, 9, 0, 5]), ['box of zero area', KEPT]),
    'area 0': (lambda s: s.object.update(area=0), []),
    'outside': (lambda s: s.object.update(bbox=[90, 9, 5, 5]), ['box outside the image', KEPT]),
    'partly': (lambda s: s.object.update(bbox=[60, 9, 30, 9]), ['box partly outside']),
    'ignore': (lambda s: s.object.update(ignore=1), ['object marked ignore', KEPT]),
    'category': (
        lambda s: s.object.update(category_id=999),
        ['unknown category', 'image without objects'],
    ),
    'orphan': (lambda s: s.object.update(image_id=999), ['image without objects']),
    'two points': (
        lambda s: s.object.update(segmentation=[[1, 2, 3, 4]]),
        ['mask without polygon', KEPT],
    ),
    'no object': (lambda s: s.objects.clear(), ['image without objects']),
    'small': (_small, ['image below min_size']),
    'crowd': (_crowd, ['crowd region', 'RLE mask']),
    'rle': (lambda s: s.object.update(segmentation=rle()), ['RLE mask']),
    'gray': (lambda s: picture('L').save(s.path), ['grayscale image']),
    'cmyk': (lambda s: picture('CMYK').save(s.path), ['CMYK image']),
    'alpha': (lambda s: transparent(s.path), ['image with transparency']),
    'opaque': (lambda s: transparent(s.path, 255), []),
    '16 bit': (_wide, ['16-bit image', 'grayscale image']),
    'exif 180': (lambda s: turned(s.path, 3), ['EXIF-rotated image']),
    'exif 90': (lambda s: turned(s.path, 6), ['EXIF-rotated image', 'image of another size']),
    'non-ascii': (lambda s: s.rename('bild_ü_図.jpg'), ['non-ASCII path']),
    'long': (lambda s: s.rename('d' * 200 + '/' + 'e' * 100 + '.jpg'), ['very long path']),
}  # fmt: skip


#: Kinds of an object that is not learnt.
NOT_LEARNT = {*LEFT_OUT, 'incomplete entry', 'invalid entry', 'image without objects', KEPT}
NOT_LEARNT.add('image below min_size')


def coco_set(root, names):
    """Write a data set with a sample for each name; return (file, kind) of all to be found."""
    (root / 'train2017').mkdir(parents=True)
    (root / 'annotations').mkdir()
    file = root / 'annotations/instances_train2017.json'
    images, objects, expected = [], [], []
    for number, name in enumerate(names, 1):
        sample = Sample(root, number)
        plant, kinds = COCO[name]
        plant(sample)
        images += sample.images
        objects += sample.objects
        expected += [(str(sample.path), kind) for kind in kinds]
        if name == 'orphan':
            expected.append((str(file), 'annotation of no image'))
        if name == 'area 0':
            expected.append((str(file), 'area worked out'))
    if any(not NOT_LEARNT & set(COCO[name][1]) for name in names):
        expected.append((str(file), 'class without objects'))  # all are of the first class
    categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)]
    file.write_text(json.dumps(dict(images=images, annotations=objects, categories=categories)))
    return sorted(expected)


def labels(mode=np.uint8):
    """A label map of background (1) and the first class (2); 0 is ignored."""
    made = np.ones((HEIGHT, WIDTH), mode)
    made[8:24, 10:30] = 2
    return made


def _map(function):
    return lambda image, label_map: function(label_map)


def _save(values, format='PNG'):
    return _map(lambda path: Image.fromarray(values).save(path, format=format))


def _palette(path):
    coloured = Image.fromarray(labels()).convert('P')
    coloured.putdata(labels().ravel().tolist())
    coloured.save(path)


SIZE, COLOUR, UNKNOWN = (
    'label map of another size',
    'label map in colour',
    'unknown id in a label map',
)
#: What is done to an image and its label map; the kinds to be found, of the image and of the map.
SEGMENTATION = {
    'clean': (lambda image, label_map: None, [], []),
    'image cut': (lambda image, label_map: cut(image), ['truncated image'], []),
    'map missing': (_map(Path.unlink), [], ['missing file']),
    'map cut': (_map(cut), [], ['truncated image']),
    'map text': (_map(lambda path: path.write_text('hello')), [], ['unreadable image']),
    'map size': (_save(labels()[:-8]), [], [SIZE]),
    'map rgb': (_save(np.dstack([labels()] * 3)), [], [COLOUR]),
    'map id': (_save(labels() + np.uint8(5)), [], [UNKNOWN]),
    'map 16 bit': (_save(labels(np.uint16)), [], []),
    'map id 258': (_save(labels(np.uint16) + np.uint16(256)), [], [UNKNOWN]),
    'map palette': (_map(_palette), [], []),
    'map rgba': (_save(np.dstack([labels()] * 3 + [labels() * 0])), [], [COLOUR]),
    'map jpeg': (_save(labels(), 'JPEG'), [], ['JPEG label map']),
    'map half': (_save(labels(np.float32) * 1.5, 'TIFF'), [], [UNKNOWN]),
    'map nan': (_save(labels(np.float32) * np.nan, 'TIFF'), [], [UNKNOWN]),
    'map -254': (_save(labels(np.int32) - 255, 'TIFF'), [], [UNKNOWN]),
    'map -1': (_save(labels(np.int32) * 3 - 4, 'TIFF'), [], []),
    'map ignored': (_save(labels() * np.uint8(0)), [], ['label map without labels']),
    'image missing': (lambda image, label_map: image.unlink(), [], ['label map without image']),
    'gray': (lambda image, label_map: picture('L').save(image), ['grayscale image'], []),
    'cmyk': (lambda image, label_map: picture('CMYK').save(image), ['CMYK image'], []),
    'exif 180': (lambda image, label_map: turned(image, 3), ['EXIF-rotated image'], []),
    'exif 90': (lambda image, label_map: turned(image, 6), ['EXIF-rotated image'], [SIZE]),
}


def all_labels():
    """A label map in which every class occurs."""
    made = labels()
    made[0, : len(CLASSES) + 1] = range(1, len(CLASSES) + 2)
    return made


def segmentation_set(root, names):
    """Write a data set with an image for each name; return (file, kind) of all to be found."""
    images, maps = root / 'images/training', root / 'annotations/training'
    images.mkdir(parents=True)
    maps.mkdir(parents=True)
    expected = []
    for number, name in enumerate(names, 1):
        image, label_map = images / f'{number:03}.jpg', maps / f'{number:03}.png'
        picture().save(image)
        Image.fromarray(all_labels()).save(label_map)
        plant, of_image, of_map = SEGMENTATION[name]
        plant(image, label_map)
        expected += [(str(image), kind) for kind in of_image]
        expected += [(str(label_map), kind) for kind in of_map]
    return sorted(expected)
