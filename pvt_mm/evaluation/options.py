"""What the options of the tools change in a config's evaluation."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from mmengine.config import Config

from pvt_mm.config import CODEBASES, evaluators, task_of
from pvt_mm.errors import UserError


def use_fast_coco_eval(cfg: Config) -> None:
    """Compute a config's COCO scores by faster-coco-eval, which gives pycocotools' figures.

    Raises:
        UserError: Where the package is missing, or the config has no COCO scores.
    """
    if find_spec('faster_coco_eval') is None:
        raise UserError("--fast-coco-eval needs a package: pip install 'pvt-mm[fast-eval]'.")
    metrics = [
        metric
        for loader in ('val_dataloader', 'test_dataloader')
        for metric in evaluators(cfg, loader)
        if metric['type'] == 'CocoMetric'
    ]
    if not metrics:
        raise UserError('--fast-coco-eval: the config has no CocoMetric to make faster.')
    for metric in metrics:
        metric['type'] = 'FastCocoMetric'
    import_module('pvt_mm.evaluation.fast_coco')  # registers it; imports mmdet


def keep_predictions(cfg: Config, out: str) -> None:
    """Write a test's predictions: a folder of PNGs for mmseg, else a pickle.

    Raises:
        UserError: Where ``out`` is of the other kind.
    """
    task = task_of(cfg, CODEBASES)
    is_pickle = out.endswith(('.pkl', '.pickle'))
    if task == 'mmseg':
        if is_pickle:
            raise UserError(f'--out {out}: segmentation writes a folder of PNGs, so name a folder.')
        for evaluator in evaluators(cfg, 'test_dataloader'):
            evaluator.update(output_dir=out, keep_results=True)
        return
    if not is_pickle:
        raise UserError(f'--out {out}: this task writes one pickle, so end the name in .pkl.')
    dump = 'DumpDetResults' if task == 'mmdet' else 'DumpResults'
    cfg.test_evaluator = [*evaluators(cfg, 'test_dataloader'), dict(type=dump, out_file_path=out)]
