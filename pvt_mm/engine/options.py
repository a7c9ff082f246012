"""What the options of the tools change in a config."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config, ConfigDict

from pvt_mm.checkpoint.loaders import load_from_file
from pvt_mm.config import CODEBASES, datasets, iter_dicts, task_of, type_name
from pvt_mm.errors import UserError

# Weights


def check_checkpoint(path: str | None) -> None:
    """Check that a checkpoint file holds weights, before time is spent on the data.

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
    for part in _pretrained_parts(cfg):
        check_checkpoint(part['init_cfg']['checkpoint'])


def without_pretrained(cfg: Config) -> None:
    """Remove the ``Pretrained`` initialisations of a model whose weights come from a checkpoint."""
    for part in _pretrained_parts(cfg):
        part['init_cfg'] = None


def _pretrained_parts(cfg: Config) -> list[dict]:
    """Return the parts of a config's model that are initialised from a checkpoint."""
    found = []
    for part in iter_dicts(cfg._cfg_dict['model']):
        init_cfg = part.get('init_cfg')
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            found.append(part)
    return found


# Hooks


def add_checkpoint_hook(cfg: Config, whole: bool = False) -> None:
    """Add PVTCheckpointHook, so that ``load_from`` of any config takes any published weights.

    Args:
        cfg: Config of a run, changed in place.
        whole: Refuse weights of a backbone alone.
    """
    hooks = cfg.get('custom_hooks') or []
    others = [hook for hook in hooks if hook.get('type') != 'PVTCheckpointHook']
    cfg.custom_hooks = [*others, dict(type='PVTCheckpointHook', whole=whole)]


def add_hook(cfg: Config, hook_type: str) -> None:
    """Add a hook to a config that has none of its type."""
    hooks = list(cfg.get('custom_hooks') or [])
    if not any(hook.get('type') == hook_type for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type=hook_type)]


# Training


def enable_amp(cfg: Config) -> None:
    """Train in mixed precision; without CUDA, ``runtime.setup`` turns that into bf16.

    Raises:
        UserError: Where the config has an optimiser wrapper of another kind.
    """
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if type_name(dict(type=kind)) not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UserError(
            f'--amp sets optim_wrapper.type=AmpOptimWrapper, but the config has {kind}; leave out '
            '--amp, or the type.'
        )
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def enable_auto_scale_lr(cfg: Config) -> None:
    """Scale the learning rate to the total batch, as mmengine does.

    Raises:
        UserError: Where the config does not say which batch its learning rate is for.
    """
    if not cfg.get('auto_scale_lr', {}).get('base_batch_size'):
        raise UserError(
            '--auto-scale-lr needs the batch that the learning rate is for: set '
            '--cfg-options auto_scale_lr.base_batch_size=N.'
        )
    cfg.auto_scale_lr.enable = True


def add_tensorboard(cfg: Config) -> None:
    """Write a training's scalars for TensorBoard too.

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


# Testing


def show_predictions(cfg: Config, folder: str) -> None:
    """Have the codebase's visualisation hook write pictures to a folder.

    Raises:
        UserError: Where the config has no such hook.
    """
    task = task_of(cfg, CODEBASES)
    if not (cfg.get('default_hooks') or {}).get('visualization'):
        hook = dict(mmdet='DetVisualizationHook', mmseg='SegVisualizationHook')
        raise UserError(
            '--show-dir needs the hook that draws: set default_hooks.visualization='
            f"dict(type='{hook.get(task, 'VisualizationHook')}') in the config."
        )
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


def enable_tta(cfg: Config) -> None:
    """Wrap the model for test-time augmentation.

    Raises:
        UserError: For instance segmentation, which mmdet cannot merge, and classification.
    """
    task = task_of(cfg, CODEBASES)
    if task == 'mmpretrain':
        raise UserError('--tta serves detection and segmentation; test this config without it.')
    if task == 'mmdet':
        if any('mask_head' in part for part in iter_dicts(cfg._cfg_dict['model'])):
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
