"""Which images inference takes, what it says of others, and which configs Predictor takes."""

import cv2
import numpy as np
import pytest

from pvt_mm.apis.inference import Predictor, find_images, read_pixels
from pvt_mm.config import load_config
from pvt_mm.errors import UserError


@pytest.fixture
def shots(tmp_path, monkeypatch):
    """A folder with images, other files and a folder inside."""
    monkeypatch.chdir(tmp_path)
    for name in ('b.jpg', 'a.PNG', 'notes.txt', 'in/c.tiff', 'in/d.jpg.part', 'x[1].jpg'):
        path = tmp_path / 'shots' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / 'shots/folder.jpg').mkdir()


@pytest.mark.parametrize(
    ('places', 'found'),
    [
        (['shots'], ['shots/a.PNG', 'shots/b.jpg', 'shots/x[1].jpg']),
        (['shots/'], ['shots/a.PNG', 'shots/b.jpg', 'shots/x[1].jpg']),
        (['shots/*.jpg'], ['shots/b.jpg', 'shots/x[1].jpg']),
        (['shots/**'], ['shots/a.PNG', 'shots/b.jpg', 'shots/in/c.tiff', 'shots/x[1].jpg']),
        (['shots/?.*'], ['shots/a.PNG', 'shots/b.jpg']),
        (['shots/x[1].jpg'], ['shots/x[1].jpg']),
        (['shots/notes.txt', 'none.jpg'], ['shots/notes.txt', 'none.jpg']),
        (['shots/in', 'shots/b.jpg'], ['shots/in/c.tiff', 'shots/b.jpg']),
    ],
)
def test_files_folders_and_patterns(places, found, shots):
    """In order; a named file is taken as it is, so that its own error is seen."""
    assert find_images(places) == found


@pytest.mark.parametrize('place', ['shots/*.bmp', 'shots/*.txt', 'shots/folder.jpg', 'none/**'])
def test_a_place_without_images_is_refused(place, shots):
    """With the endings that are looked for."""
    with pytest.raises(UserError, match=r'has no image \(a file that ends in .bmp, .jpeg, '):
        find_images([place])


@pytest.mark.parametrize(
    ('content', 'says'),
    [
        (b'', 'the file is empty'),
        (b'<html>', 'it is a web page'),
        (cv2.imencode('.tiff', np.zeros((4, 4, 3), np.float32))[1].tobytes(), 'of float32'),
        (cv2.imencode('.tiff', np.zeros((4, 4), np.float32))[1].tobytes(), 'of float32'),
    ],
)
def test_why_a_file_cannot_be_read(content, says, tmp_path):
    """The same reasons as in training."""
    (tmp_path / 'a.jpg').write_bytes(content)
    with pytest.raises(UserError, match=f'a.jpg is no image that OpenCV can read: .*{says}'):
        read_pixels(tmp_path / 'a.jpg')


def test_the_config_may_be_of_a_distributed_training_with_its_preprocessor_beside(
    trained, demo_data
):
    """Inference is one process, and normalises images as the training did."""
    first = trained('det')
    image = sorted((demo_data / 'coco/val2017').iterdir())[0]
    plain, dumped = (load_config(str(first.config)) for _ in range(2))
    dumped.launcher = 'pytorch'
    dumped.data_preprocessor = dumped.model.pop('data_preprocessor')
    expected, result = (
        Predictor(cfg, str(first.checkpoint), 'cpu')(image).pred_instances
        for cfg in (plain, dumped)
    )
    assert len(expected) > 0 and result.scores.tolist() == expected.scores.tolist()
