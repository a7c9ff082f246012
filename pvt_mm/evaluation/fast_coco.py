"""COCO scores by faster-coco-eval, in C++: pycocotools' figures in less time."""

from __future__ import annotations

from typing import Any

from faster_coco_eval import COCOeval_faster
from mmdet.evaluation.metrics import CocoMetric, coco_metric
from mmengine.registry import METRICS

from pvt_mm.errors import UserError

#: COCO's AP is that of the best 100 detections of a class in an image.
AP_DETECTIONS = 100


class FastCOCOeval(COCOeval_faster):
    """faster-coco-eval with pycocotools' AP.

    It computes AP at the largest of ``maxDets``, pycocotools at 100. mmdet sets 100, 300 and 1000:
    with more than 100 boxes of a class in an image, the figures would differ.
    """

    def __init__(self, ground_truth: Any, detections: Any, iou_type: str) -> None:
        super().__init__(ground_truth, detections, iou_type, print_function=print)

    def evaluate(self) -> None:
        """Match detections and annotations.

        Raises:
            UserError: Where 100 detections are not among the numbers evaluated.
        """
        if AP_DETECTIONS not in self.params.maxDets:
            raise UserError(
                f'COCO scores the best {AP_DETECTIONS} detections, but proposal_nums '
                f'is {tuple(self.params.maxDets)}; add {AP_DETECTIONS} to it.'
            )
        super().evaluate()

    def summarize(self) -> None:
        """Compute the twelve figures, and AP at 100 detections."""
        super().summarize()
        self.stats[0] = self._summarize(1, maxDets=AP_DETECTIONS)


@METRICS.register_module()
class FastCocoMetric(CocoMetric):
    """mmdet's COCO metric, with the same arguments and results, counted by faster-coco-eval."""

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute the scores of all images."""
        self.use_mp_eval = False  # mmdet's own faster class
        slow = coco_metric.COCOeval
        coco_metric.COCOeval = FastCOCOeval  # mmdet asks for it by this name and no other way
        try:
            return super().compute_metrics(results)
        finally:
            coco_metric.COCOeval = slow
