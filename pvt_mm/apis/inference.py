"""A trained detector or segmentor on single images.

mmdet's DetInferencer and MMSegInferencer each serve one codebase, and run a model whose weights did
not fit. Predictor serves both, refuses such weights, and gives masks as JSON.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import _load_checkpoint_to_model

from pvt_mm.config import datasets, give_preprocessor, task_of
from pvt_mm.datasets.guard import image_problem
from pvt_mm.engine.checkpoint_hook import named_for, require_fit
from pvt_mm.engine.options import without_pretrained
from pvt_mm.engine.runtime import setup
from pvt_mm.errors import UserError, naming_file
from pvt_mm.files import IMAGE_SUFFIXES


class Predictor:
    """Apply a config's model and test pipeline to image files.

    Args:
        cfg: Config of a detector or segmentor.
        checkpoint: Weights; a file or URL.
        device: Such as ``'cpu'`` or ``'cuda:0'``; by default the first GPU, else the CPU.
        whole: Refuse weights of a backbone alone: heads would be random.

    Raises:
        UserError: Where the checkpoint cannot be read, or the config is of neither codebase.
        CheckpointMismatchError: Where the weights do not fit the model.
    """

    def __init__(
        self, cfg: Config, checkpoint: str, device: str | None = None, whole: bool = True
    ) -> None:
        cfg.launcher = 'none'  # a config that a distributed training has dumped names another
        setup(cfg)
        self.task = task_of(cfg)
        init_default_scope(self.task)
        without_pretrained(cfg)
        give_preprocessor(cfg)
        model = MODELS.build(cfg.model)
        loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
        with naming_file(checkpoint):
            weights = named_for(model, loaded)
            check = require_fit(model, weights, whole)
            _load_checkpoint_to_model(model, {'state_dict': weights}, logger='current')
        check.remove()
        device = device or ('cuda:0' if torch.cuda.is_available() else 'cpu')
        self.model = model.to(device).eval()
        data = next(datasets(cfg, ['test_dataloader']))
        self.dataset_meta = DATASETS.build(dict(data, lazy_init=True, pipeline=[])).metainfo
        self.classes: list[str] = list(self.dataset_meta['classes'])
        steps = [step for step in data['pipeline'] if step['type'] != 'LoadAnnotations']
        self.pipeline = Compose(steps)
        visualizer = dict(cfg.visualizer, vis_backends=None, name=f'predictor_{id(self)}')
        self.visualizer = VISUALIZERS.build(visualizer)
        self.visualizer.dataset_meta = self.dataset_meta

    @torch.inference_mode()
    def __call__(self, image: str | Path) -> Any:
        """Return mmdet's ``DetDataSample`` or mmseg's ``SegDataSample`` of an image file.

        Raises:
            UserError: Where the file is missing or no image.
        """
        return self.model.test_step(self.load(image))[0]

    def load(self, image: str | Path) -> dict[str, list]:
        """Return an image file as a batch of one from the test pipeline.

        Raises:
            UserError: Where the file is missing or no image.
        """
        read_pixels(image)
        data = self.pipeline(dict(img_path=str(image), img_id=0))
        return {key: [value] for key, value in data.items()}

    def draw(self, image: str | Path, result: Any, out_file: Path, score_thr: float = 0.3) -> None:
        """Write an image with its result drawn over it.

        Args:
            image: The image file that the result is of.
            result: What calling the predictor returned.
            out_file: The picture to write; its folder exists.
            score_thr: Boxes below this score are not drawn.
        """
        pixels = read_pixels(image)
        options = {'pred_score_thr': score_thr} if self.task == 'mmdet' else {}
        self.visualizer.add_datasample(
            Path(image).stem, pixels, result.cpu(), draw_gt=False, out_file=str(out_file), **options
        )

    def as_json(self, result: Any, score_thr: float = 0.3) -> dict[str, Any]:
        """Return a result as plain lists and numbers.

        Detection: ``objects``, best first, each with class, label, score, ``bbox`` (x1, y1, x2, y2
        in pixels) and, for instances, ``mask`` in COCO's run-length encoding. Segmentation:
        ``segments``, largest first, each with class, label, ``pixels`` and ``mask``.
        """
        if self.task == 'mmdet':
            return {'objects': self._objects(result.pred_instances.cpu(), score_thr)}
        return {'segments': self._segments(result.pred_sem_seg.data[0].cpu().numpy())}

    def _objects(self, instances: Any, score_thr: float) -> list[dict[str, Any]]:
        objects = []
        for i in instances.scores.argsort(descending=True).tolist():
            score = float(instances.scores[i])
            if score < score_thr:
                break
            label = int(instances.labels[i])
            found = {
                'class': self.classes[label],
                'label': label,
                'score': round(score, 4),
                'bbox': [round(side, 2) for side in instances.bboxes[i].tolist()],
            }
            if 'masks' in instances:
                found['mask'] = _rle(np.asarray(instances.masks[i]))
            objects.append(found)
        return objects

    def _segments(self, labels: np.ndarray) -> list[dict[str, Any]]:
        values, counts = np.unique(labels, return_counts=True)
        return [
            {
                'class': self.classes[int(values[i])],
                'label': int(values[i]),
                'pixels': int(counts[i]),
                'mask': _rle(labels == values[i]),
            }
            for i in np.argsort(-counts)
        ]

    def summary(self, report: dict[str, Any]) -> str:
        """Return one line on what ``as_json`` found."""
        if self.task == 'mmdet':
            names = [found['class'] for found in report['objects']]
            counts = {name: names.count(name) for name in dict.fromkeys(names)}
            return ', '.join(f'{n} {name}' for name, n in counts.items()) or 'nothing found'
        total = sum(segment['pixels'] for segment in report['segments'])
        return ', '.join(
            f'{segment["class"]} {segment["pixels"] / total:.0%}'
            for segment in report['segments'][:5]
        )


def find_images(places: Iterable[str | Path]) -> list[str]:
    """Return image files: those named, and those in the folders and patterns named.

    Args:
        places: Files, folders (without their subfolders), and patterns such as ``'shots/*.jpg'`` or
            ``'shots/**'``. Folders and patterns give, in order, what ends as images do.

    Raises:
        UserError: Where a folder or pattern has no image.
    """
    found: list[str] = []
    for place in map(str, places):
        path = Path(place)
        if path.is_dir():
            found += _images_among(path.iterdir(), f'The folder {place}')
        elif glob.has_magic(place) and not path.exists():
            names = glob.glob(place, recursive=True)
            found += _images_among(map(Path, names), f'The pattern {place}')
        else:
            found.append(place)
    return found


def _images_among(paths: Iterable[Path], place: str) -> list[str]:
    images = [path for path in sorted(paths) if path.suffix.lower() in IMAGE_SUFFIXES]
    files = [str(path) for path in images if path.is_file()]
    if not files:
        raise UserError(f'{place} has no image (a file that ends in {", ".join(IMAGE_SUFFIXES)}).')
    return files


def read_pixels(image: str | Path) -> np.ndarray:
    """Read an image file as RGB.

    Raises:
        UserError: Where it is missing or no image.
    """
    if not Path(image).is_file():
        raise UserError(f'There is no image {image}; check the path.')
    try:
        pixels = mmcv.imread(str(image))
    except Exception:  # OpenCV's own, on an empty file and others
        pixels = None
    if pixels is None:
        reason = (image_problem(str(image)) or ('', 'convert it to PNG or JPEG'))[1]
        raise UserError(f'{image} is no image that OpenCV can read: {reason}.')
    return mmcv.bgr2rgb(pixels)


def _rle(mask: np.ndarray) -> dict[str, Any]:
    """Return a mask of shape (H, W) in COCO's compressed run-length encoding."""
    from pycocotools import mask as coco_mask  # comes with mmdet; segmentation may lack it

    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {'size': encoded['size'], 'counts': encoded['counts'].decode('ascii')}
