"""What the options of the tools change in a config."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from pvt_mm.checkpoint.loaders import load_from_file
from pvt_mm.config import CODEBASES, datasets, iter_dicts, task_of
from pvt_mm.errors import UserError


def check_checkpoint(path: str | None) -> None:
    """Check that a checkpoint file holds weights, before any time goes into the data.

    URLs and names of models are left to the loader.

    Raises:
        UserError: Where it does not.
    """
    if path and '://' not in path:
        load_from_file(path)


def check_pretrained(cfg: Config) -> None:
    """Check the files that a config's model is initialised from.

    Raises:
        UserError: Where one holds no weights.
    """
    for node in _pretrained(cfg):
        check_checkpoint(node['init_cfg']['checkpoint'])


def enable_auto_scale_lr(cfg: Config) -> None:
    """Turn on mmengine's scaling of the learning rate to the total batch.

    Raises:
        UserError: Where the config does not say which batch its learning rate is for.
    """
    if not cfg.get('auto_scale_lr', {}).get('base_batch_size'):
        raise UserError(
            '--auto-scale-lr needs the batch that the learning rate is for: set '
            '--cfg-options auto_scale_lr.base_batch_size=N.'
        )
    cfg.auto_scale_lr.enable = True


def add_checkpoint_hook(cfg: Config, whole: bool = False) -> None:
    """Add PVTCheckpointHook to a config that lacks it, so that any config's load_from works.

    Args:
        cfg: Config of a run, changed in place.
        whole: Refuse weights of a backbone alone.
    """
    others = [h for h in cfg.get('custom_hooks') or [] if h.get('type') != 'PVTCheckpointHook']
    cfg.custom_hooks = [*others, dict(type='PVTCheckpointHook', whole=whole)]


def add_tensorboard(cfg: Config) -> None:
    """Have mmengine's visualiser write the scalars of a config's training for TensorBoard too.

    Raises:
        UserError: Where tensorboard is not installed.
    """
    if find_spec('tensorboard') is None:
        raise UserError('--tensorboard needs a package: pip install tensorboard.')
    visualizer = cfg.get('visualizer') or ConfigDict(type='Visualizer')
    backends = list(visualizer.get('vis_backends') or [dict(type='LocalVisBackend')])
    if not any(backend['type'] == 'TensorboardVisBackend' for backend in backends):
        backends.append(dict(type='TensorboardVisBackend'))
    visualizer['vis_backends'] = backends
    cfg.visualizer = visualizer


def add_hook(cfg: Config, kind: str) -> None:
    """Add a hook to a config that has none of its type."""
    hooks = list(cfg.get('custom_hooks') or [])
    if not any(hook.get('type') == kind for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type=kind)]


def without_pretrained(cfg: Config) -> None:
    """Remove ``Pretrained`` initialisations from a model that a checkpoint will fill anyway."""
    for node in _pretrained(cfg):
        node['init_cfg'] = None


def _pretrained(cfg: Config) -> list[dict]:
    """Return the parts of a config's model that start from a checkpoint."""
    found = []
    for node in iter_dicts(cfg._cfg_dict['model']):
        init_cfg = node.get('init_cfg')
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            found.append(node)
    return found


def show_predictions(cfg: Config, folder: str) -> None:
    """Have the codebase's visualisation hook write pictures to a folder."""
    task = task_of(cfg, CODEBASES)
    if task == 'mmpretrain':
        cfg.default_hooks.visualization.update(enable=True, interval=1, out_dir=folder)
        return
    cfg.default_hooks.visualization.draw = True
    if task == 'mmdet':
        # mmdet takes the folder below its own dated one; an absolute path replaces that.
        cfg.default_hooks.visualization.test_out_dir = str(Path(folder).resolve())
    else:
        cfg.default_hooks.visualization.interval = 1  # mmseg's default draws one image in 50
        cfg.visualizer.save_dir = folder


def keep_predictions(cfg: Config, out: str) -> None:
    """Have the test keep its predictions: a folder of PNGs for mmseg, else a pickle.

    Raises:
        UserError: Where ``out`` is of the other kind.
    """
    task = task_of(cfg, CODEBASES)
    if task != 'mmseg':
        if not out.endswith(('.pkl', '.pickle')):
            raise UserError(f'--out {out}: this task writes one pickle, so end the name in .pkl.')
        dump = 'DumpDetResults' if task == 'mmdet' else 'DumpResults'
        cfg.test_evaluator = [*_evaluators(cfg.test_evaluator), dict(type=dump, out_file_path=out)]
    else:
        if out.endswith(('.pkl', '.pickle')):
            raise UserError(f'--out {out}: segmentation writes a folder of PNGs, so name a folder.')
        cfg.test_evaluator.update(output_dir=out, keep_results=True)


def _evaluators(evaluator: Any) -> list[Any]:
    return list(evaluator) if isinstance(evaluator, (list, tuple)) else [evaluator]


def use_fast_coco_eval(cfg: Config) -> None:
    """Have faster-coco-eval compute the COCO scores of a config, with pycocotools' results.

    Raises:
        UserError: Where the package is missing, or the config has no COCO scores.
    """
    if find_spec('faster_coco_eval') is None:
        raise UserError("--fast-coco-eval needs a package: pip install 'pvt-mm[fast-eval]'.")
    metrics = [
        metric
        for key in ('val_evaluator', 'test_evaluator')
        for metric in _evaluators(cfg.get(key))
        if metric and metric['type'] == 'CocoMetric'
    ]
    if not metrics:
        raise UserError('--fast-coco-eval: the config has no CocoMetric to make faster.')
    for metric in metrics:
        metric['type'] = 'FastCocoMetric'
    import_module('pvt_mm.fast_coco')  # it imports mmdet


def enable_tta(cfg: Config, task: str) -> None:
    """Wrap the model for test-time augmentation.

    Raises:
        UserError: For instance segmentation, which mmdet cannot merge, and classification.
    """
    if task == 'mmpretrain':
        raise UserError('--tta serves detection and segmentation; test this config without it.')
    if task == 'mmdet':
        if any('mask_head' in node for node in iter_dicts(cfg._cfg_dict['model'])):
            raise UserError(
                '--tta: mmdet merges boxes but not instance masks; test this config without --tta.'
            )
        cfg.setdefault(
            'tta_model',
            dict(
                type='DetTTAModel',
                tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
            ),
        )
        cfg.setdefault('tta_pipeline', _flip_pipeline(next(datasets(cfg, ['test_dataloader']))))
    next(datasets(cfg, ['test_dataloader'])).pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def _flip_pipeline(data: ConfigDict) -> list[dict]:
    """Replace a test pipeline's packing by packing the image plain and flipped."""
    *transforms, pack = data.pipeline
    meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    pack = dict(type=pack['type'], meta_keys=(*meta, 'flip', 'flip_direction'))
    flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
    return [*transforms, dict(type='TestTimeAug', transforms=[flips, [pack]])]
