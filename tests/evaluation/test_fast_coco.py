"""faster-coco-eval gives pycocotools' figures: as a class, in mmdet's metric, and by the flag."""

import contextlib
import copy
import io
import json
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_coco import made_up
from mmengine.config import Config

faster_coco_eval = pytest.importorskip('faster_coco_eval')

from mmdet.datasets.api_wrappers import COCO, COCOeval  # noqa: E402
from mmdet.evaluation.metrics import CocoMetric  # noqa: E402
from pycocotools import mask  # noqa: E402

from pvt_mm.errors import UserError  # noqa: E402
from pvt_mm.evaluation import options  # noqa: E402
from pvt_mm.evaluation.fast_coco import FastCOCOeval, FastCocoMetric  # noqa: E402
from pvt_mm.evaluation.options import use_fast_coco_eval  # noqa: E402


def figures(make, dataset, results, kind='bbox', max_detections=(100, 300, 1000)):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(dataset)
        truth.createIndex()
        evaluation = make(truth, truth.loadRes(copy.deepcopy(results)), kind)
        evaluation.params.maxDets = list(max_detections)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.array(evaluation.stats)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 6), st.integers(1, 100), st.integers(1, 12), st.integers(0, 10**6))
def test_all_figures_up_to_100_detections(images, detections, classes, seed):
    """Whatever the boxes, classes, crowds and scores, the twelve figures are pycocotools'."""
    dataset, results = made_up(images, detections, classes, seed)
    expected = figures(COCOeval, dataset, results)
    np.testing.assert_allclose(figures(FastCOCOeval, dataset, results), expected, atol=1e-12)


def test_ap_of_300_boxes_of_a_class_is_put_right():
    """The package itself counts all 300 for the AP; pycocotools, and we, the best 100."""
    dataset, results = made_up(6, 300, classes=1)
    expected = figures(COCOeval, dataset, results)
    plain = figures(faster_coco_eval.COCOeval_faster, dataset, results)
    assert abs(plain[0] - expected[0]) > 1e-4, 'the correction would be of no use'
    np.testing.assert_allclose(plain[1:], expected[1:], atol=1e-12)
    np.testing.assert_allclose(figures(FastCOCOeval, dataset, results), expected, atol=1e-12)


def test_masks_too():
    """Instance masks, polygons and run lengths, give the same twelve figures."""
    dataset, results = made_up(4, 40, classes=3)
    for item in (*dataset['annotations'], *results):
        x, y, w, h = item.pop('bbox')
        item['segmentation'] = [[x, y, x + w, y + h / 3, x + w / 2, y + h]]
    for result in results:
        result['segmentation'] = mask.merge(mask.frPyObjects(result['segmentation'], 480, 640))
    expected = figures(COCOeval, dataset, results, 'segm')
    assert expected[0] > 0.01
    np.testing.assert_allclose(
        figures(FastCOCOeval, dataset, results, 'segm'), expected, atol=1e-12
    )


def test_without_100_it_is_refused():
    """There is no AP to give where no number of detections is 100."""
    with pytest.raises(UserError, match=r'proposal_nums is \(300, 1000\); add 100'):
        figures(FastCOCOeval, *made_up(1, 5), max_detections=(300, 1000))


def test_metric_gives_the_same_scores(tmp_path):
    """mmdet's metric, class by class too, with one evaluation or the other."""
    dataset, results = made_up(5, 60, classes=4)
    (tmp_path / 'truth.json').write_text(json.dumps(dataset))
    scores = []
    for kind in (CocoMetric, FastCocoMetric):
        metric = kind(str(tmp_path / 'truth.json'), metric='bbox', classwise=True)
        metric.dataset_meta = dict(classes=tuple('1234'))
        for image in dataset['images']:
            found = [result for result in results if result['image_id'] == image['id']]
            boxes = np.array([result['bbox'] for result in found])
            boxes[:, 2:] += boxes[:, :2]
            labels = np.array([result['category_id'] - 1 for result in found])
            prediction = dict(
                img_id=image['id'],
                bboxes=boxes,
                labels=labels,
                scores=np.array([result['score'] for result in found]),
            )
            metric.results.append((dict(width=640, height=480, img_id=image['id']), prediction))
        scores.append(metric.evaluate(len(dataset['images'])))
    assert scores[0] == scores[1] and scores[0]['coco/bbox_mAP'] > 0.01
    assert '3_precision' in ' '.join(scores[0])


def test_the_flag(trained, run_tool, tmp_path):
    """tools/test.py --fast-coco-eval evaluates by it, to the scores that the training had."""
    config, data, trained_in, checkpoint = trained('det')
    evaluate = mock.patch.object(
        FastCOCOeval, 'evaluate', autospec=True, side_effect=FastCOCOeval.evaluate
    )
    with evaluate as spy:
        run_tool('test', config, checkpoint, *data, '--work-dir', tmp_path, '--fast-coco-eval')
    assert spy.call_count == 1
    scores = []
    for file in (next(trained_in.glob('*/vis_data/scalars.json')), next(tmp_path.glob('*/*.json'))):
        last = json.loads(file.read_text().splitlines()[-1])
        scores.append({key: value for key, value in last.items() if 'mAP' in key})
    assert scores[0] == scores[1] and len(scores[0]) == 6


def test_what_the_flag_refuses(monkeypatch):
    """A config without COCO scores, and a machine without the package."""
    with pytest.raises(UserError, match='has no CocoMetric'):
        use_fast_coco_eval(Config(dict(val_evaluator=dict(type='IoUMetric'))))
    monkeypatch.setattr(options, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'pvt-mm\[fast-eval\]'"):
        use_fast_coco_eval(Config(dict(val_evaluator=dict(type='CocoMetric'))))


def test_the_flag_finds_all_evaluators():
    """Both loops', alone or in a list, and no other metric."""
    other = dict(type='DumpDetResults')
    cfg = Config(dict(
        val_evaluator=dict(type='CocoMetric'), test_evaluator=[other, dict(type='CocoMetric')]
    ))  # fmt: skip
    use_fast_coco_eval(cfg)
    assert cfg.val_evaluator.type == cfg.test_evaluator[1].type == 'FastCocoMetric'
    assert cfg.test_evaluator[0] == other
