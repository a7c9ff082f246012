"""What the command line tools share: configs, data roots, and errors in one sentence."""

from __future__ import annotations

import argparse
import functools
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction

from . import configs, nests, reading
from ._install import pinned
from .archs import ArchError
from .checkpoint import CheckpointMismatchError
from .releases import first_with
from .runtime import UserError, setup
from .sources import load_from_file

CODEBASES = ('mmdet', 'mmseg', 'mmpretrain')
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def main_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Make a tool's ``main`` read files safely and print bad input as one sentence, with code 1.

    Every such tool takes ``--debug``, which prints the traceback as well.
    """

    @functools.wraps(main)
    def run() -> None:
        # mmengine imports pkg_resources; its warning says nothing to the user of a tool.
        warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
        debug = '--debug' in sys.argv
        sys.argv = [argument for argument in sys.argv if argument != '--debug']
        setup()
        try:
            main()
        except SystemExit as end:
            if end.code == 0 and {'-h', '--help'} & set(sys.argv):  # which was printed
                print('  --debug  print the traceback of an error')
            raise
        except (UserError, ArchError, CheckpointMismatchError, KeyError) as error:
            message = _sentence(error)
            if not message:
                raise
            if debug:
                traceback.print_exc()
            print(f'error: {message}', file=sys.stderr)
            sys.exit(1)

    return run


def _sentence(error: Exception) -> str:
    """Return what is told of an error; empty where it is no bad input."""
    if isinstance(error, CheckpointMismatchError):
        return f'{reading.last_read}: {error}'
    return _unregistered(str(error)) if isinstance(error, KeyError) else str(error)


def _unregistered(message: str) -> str:
    """Turn mmengine's error about a type that no one registered into one sentence."""
    match = re.search(r'(\w+) is not in the (mmdet|mmseg)::', message)
    if match is None:
        return ''
    name, package = match.groups()
    if name in ('PVT', 'PVTv2'):
        return (
            f'The config uses {name} without importing it; add '
            "custom_imports = dict(imports=['pvt_mm'], allow_failed_imports=False)."
        )
    version = import_module(package).__version__
    found = f'{package} {version}, which is installed, has no {name}'
    release, pin = first_with(package, name), pinned(package)
    if release and release.startswith('onedl-') and not pin.startswith('onedl-'):
        return f'{found}; {release}, of the maintained fork, has it: make install STACK=onedl.'
    if pin.endswith(f'=={version}'):
        return (
            f'{found}; check the name, or if another package has it, name that in '
            'custom_imports = dict(imports=[...]).'
        )
    if release:
        return f'{found}; {release} was the first to have it: pip install {pin}.'
    return f'{found}; the configs of pvt_mm are made for {pin}: pip install {pin}.'


def load_config(
    path: str,
    cfg_options: dict[str, Any] | None = None,
    data_root: str | None = None,
    training_options: Sequence[str] = (),
) -> Config:
    """Load a config, apply ``--option``, ``--cfg-options``, ``--data-root``, name its work dir.

    Args:
        path: A config file, or a name such as ``mmdet::retinanet/FILE.py``.
        cfg_options: Keys with dots, and their values. A bare ``data_root``, which mmengine would
            take and ignore, is treated as the argument of that name.
        data_root: Where the data set lies; replaces the config's own root everywhere.
        training_options: Names of files in ``configs/_base_/options``.

    Raises:
        UserError: Where the file is missing or is no config, it has several data roots, or there is
            no such option.
    """
    cfg = configs.load(path)
    for name in training_options:
        add_training_option(cfg, name)
    options = dict(cfg_options or {})
    data_root = data_root or options.pop('data_root', None)
    for key in options:
        _drop_none(cfg._cfg_dict, key.split('.')[:-1])
    if options:
        cfg.merge_from_dict(options)
    if data_root:
        set_data_root(cfg, data_root)
    if cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(path).stem)
    return cfg


def add_training_option(cfg: Config, name: str) -> None:
    """Merge an option of ``configs/_base_/options`` into a config.

    An option's file names what it changes ``KEY_NAME``, such as ``optim_wrapper_layer_decay``, so
    that it can stand among a leaf's bases, where mmengine refuses a key that another one sets.

    Raises:
        UserError: Where there is no such option.
    """
    files = {file.stem: file for file in (configs.BUNDLED / '_base_' / 'options').glob('*.py')}
    if name not in files:
        raise UserError(f'There is no option {name!r}; choose of {", ".join(sorted(files))}.')
    option = Config.fromfile(files[name])
    cfg.merge_from_dict({key.removesuffix(f'_{name}'): option[key] for key in option})


def _drop_none(node: Any, keys: list[str]) -> None:
    """Remove a None on the way to an option's key, into which mmengine cannot merge a dict."""
    for key in keys:
        if not isinstance(node, dict) or key not in node:
            return
        if node[key] is None:
            del node[key]
            return
        node = node[key]


def set_data_root(cfg: Config, root: str) -> None:
    """Point every data set and evaluator of a config at another root, in place.

    Raises:
        UserError: Where the config has no data root, or more than one.
    """
    old = {str(data['data_root']) for data in datasets(cfg) if data.get('data_root')}
    if len(old) != 1:
        raise UserError(
            f'--data-root replaces one root, but this config has {sorted(old) or "none"}; '
            'set each data set by --cfg-options, e.g. train_dataloader.dataset.data_root=DIR.'
        )
    before = old.pop().rstrip('/')
    after = root.rstrip('/') or '/'

    def moved(node: Any) -> Any:
        if isinstance(node, dict):
            for key in node:
                node[key] = moved(node[key])
        elif isinstance(node, (list, tuple)):
            return type(node)(moved(child) for child in node)
        elif isinstance(node, str) and (node == before or node.startswith(before + '/')):
            return after + node[len(before) :]
        return node

    moved(cfg._cfg_dict)


def datasets(cfg: Config, loaders: Sequence[str] = LOADERS) -> Iterator[ConfigDict]:
    """Yield the data sets of a config's loaders, out of their wrappers."""

    def inner(node: Any) -> Iterator[ConfigDict]:
        if isinstance(node, (list, tuple)):
            for child in node:
                yield from inner(child)
        elif 'dataset' in node:
            yield from inner(node['dataset'])
        elif 'datasets' in node:
            yield from inner(node['datasets'])
        else:
            yield node

    for loader in loaders:
        if cfg.get(loader):
            yield from inner(cfg[loader]['dataset'])


def check_data(cfg: Config, loaders: Sequence[str]) -> None:
    """Check that the annotations and image folders of a config's data sets are there.

    Raises:
        UserError: Naming what is missing, where it is expected and how to point elsewhere.
    """
    for data in datasets(cfg, loaders):
        root = Path(data.get('data_root') or '')
        prefix = data.get('data_prefix') or {}
        folders = [prefix] if isinstance(prefix, str) else prefix.values()
        places = [data.get('ann_file'), data.get('split'), *folders]
        for place in places:
            # URLs and paths of other storage are not ours to check.
            if (
                not isinstance(place, str)
                or not place
                or '://' in f'{data.get("data_root")}{place}'
            ):
                continue
            if not (root / place).exists():
                raise UserError(
                    f'The data set is expected at {root}, but {root / place} is missing; put the '
                    'data (or a link to it) there, or give its place with --data-root DIR.'
                )


def task_of(cfg: Config, codebases: Sequence[str] = ('mmdet', 'mmseg')) -> str:
    """Return the codebase that a config is written for.

    Args:
        cfg: A config.
        codebases: Those that the tool serves.

    Raises:
        UserError: Where it is another one, or not installed.
    """
    scope = cfg.get('default_scope')
    if scope not in codebases:
        served = f'{", ".join(codebases[:-1])} and {codebases[-1]}'
        raise UserError(
            f'The config has default_scope={scope!r}; this tool serves {served} configs.'
        )
    if scope == 'mmpretrain' and find_spec(scope) is None:
        raise UserError(
            "Classification needs mmpretrain and torchvision: pip install 'pvt-mm[classification]'."
        )
    return scope


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the argument that overrides keys of the config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override the config, e.g. model.backbone.compute_dtype=bfloat16',
    )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that train and test share."""
    parser.add_argument('--data-root', metavar='DIR', help='where the data set lies, if elsewhere')
    add_config_options(parser)
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='set by the launch scripts (default: none)',
    )
    parser.add_argument(
        '--fast-coco-eval',
        action='store_true',
        help="COCO scores by faster-coco-eval: pycocotools' figures in less time",
    )
    # PyTorch's older launcher passes it; newer ones set the variable.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


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
    for node in nests.dicts(cfg._cfg_dict['model']):
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
        if any('mask_head' in node for node in nests.dicts(cfg._cfg_dict['model'])):
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


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines of text with even columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)


def unique_names(paths: Sequence[str]) -> list[str]:
    """Return a name for each path, without folder and ending, numbered where it is taken."""
    names: list[str] = []
    for path in paths:
        stem = name = Path(path).stem.lstrip('.') or 'image'
        number = 1
        while name in names:
            number += 1
            name = f'{stem}_{number}'
        names.append(name)
    return names
