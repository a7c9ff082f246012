"""What the command line tools share: configs, data roots, and errors in one sentence."""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction

from ._install import pinned
from .archs import ArchError
from .checkpoint import CheckpointMismatchError
from .runtime import UserError

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def main_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Make a tool's ``main`` print bad input as one sentence and exit with code 1."""

    @functools.wraps(main)
    def run() -> None:
        # mmengine imports pkg_resources; its warning says nothing to the user of a tool.
        warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
        try:
            main()
        except (UserError, CheckpointMismatchError, ArchError) as error:
            message = str(error)
        except KeyError as error:
            message = _unregistered(str(error))
            if not message:
                raise
        else:
            return
        print(f'error: {message}', file=sys.stderr)
        sys.exit(1)

    return run


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
    found = f'{package} {import_module(package).__version__}, which is installed, has no {name}'
    pin = pinned(package)
    if pin.endswith(f'=={import_module(package).__version__}'):
        return (
            f'{found}; check the name, or if another package has it, name that in '
            'custom_imports = dict(imports=[...]).'
        )
    return f'{found}; the configs of pvt_mm are made for {pin}: pip install {pin}.'


def load_config(
    path: str, cfg_options: dict[str, Any] | None = None, data_root: str | None = None
) -> Config:
    """Load a config, apply ``--cfg-options`` and ``--data-root``, and name its work dir.

    Args:
        path: A config file.
        cfg_options: Keys with dots, and their values. A bare ``data_root``, which mmengine would
            take and ignore, is treated as the argument of that name.
        data_root: Where the data set lies; replaces the config's own root everywhere.

    Raises:
        UserError: Where the file is missing or is no config, or it has several data roots.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f'There is no config {path}; {_nearest(file)}')
    try:
        cfg = Config.fromfile(file)
    except (SyntaxError, KeyError, TypeError, ImportError, OSError) as error:
        raise UserError(f'The config {path} does not load: {error}.') from error
    options = dict(cfg_options or {})
    data_root = data_root or options.pop('data_root', None)
    for key in options:
        _drop_none(cfg._cfg_dict, key.split('.')[:-1])
    if options:
        cfg.merge_from_dict(options)
    if data_root:
        set_data_root(cfg, data_root)
    if cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / file.stem)
    return cfg


def _drop_none(node: Any, keys: list[str]) -> None:
    """Remove a None on the way to an option's key, into which mmengine cannot merge a dict."""
    for key in keys:
        if not isinstance(node, dict) or key not in node:
            return
        if node[key] is None:
            del node[key]
            return
        node = node[key]


def _nearest(file: Path) -> str:
    """Name the configs, of the same folder or of pvt_mm, that come near one that is not there."""
    bundled = Path(__file__).parent / '.mim' / 'configs' / 'pvt'
    found = {
        path.name: os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
        for folder in (bundled.resolve(), file.parent.resolve())
        for path in folder.glob('*.py')
    }
    near = difflib.get_close_matches(f'{file.stem}.py', found, n=3)
    if not near:
        return 'check the path.'
    return f'did you mean {" or ".join(found[name] for name in near)}?'


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
        places = [data.get('ann_file'), *(data.get('data_prefix') or {}).values()]
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


def task_of(cfg: Config) -> str:
    """Return ``'mmdet'`` or ``'mmseg'``, the codebase that a config is written for.

    Raises:
        UserError: Where it is neither.
    """
    scope = cfg.get('default_scope')
    if scope not in ('mmdet', 'mmseg'):
        raise UserError(
            f'The config has default_scope={scope!r}; this tool serves mmdet and mmseg configs.'
        )
    return scope


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that train and test share."""
    parser.add_argument('--data-root', metavar='DIR', help='where the data set lies, if elsewhere')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override the config, e.g. train_dataloader.batch_size=4',
    )
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='set by the launch scripts (default: none)',
    )
    # PyTorch's older launcher passes it; newer ones set the variable.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def check_checkpoint(path: str | None) -> None:
    """Check that a checkpoint file can be read; URLs are left to the loader.

    Raises:
        UserError: Where the file is missing or empty.
    """
    if not path or '://' in path:
        return
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f'There is no checkpoint {path}; check the path.')
    if not file.stat().st_size:
        raise UserError(f'The checkpoint {path} is empty; copy it again.')


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


def add_checkpoint_hook(cfg: Config) -> None:
    """Add PVTCheckpointHook to a config that lacks it, so that any config's load_from works."""
    hooks = list(cfg.get('custom_hooks') or [])
    if not any(hook.get('type') == 'PVTCheckpointHook' for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type='PVTCheckpointHook')]


def add_hook(cfg: Config, kind: str) -> None:
    """Add a hook to a config that has none of its type."""
    hooks = list(cfg.get('custom_hooks') or [])
    if not any(hook.get('type') == kind for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type=kind)]


def without_pretrained(cfg: Config) -> None:
    """Remove ``Pretrained`` initialisations from a model that a checkpoint will fill anyway."""
    for node in _dicts(cfg._cfg_dict['model']):
        init_cfg = node.get('init_cfg')
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            node['init_cfg'] = None


def show_predictions(cfg: Config, folder: str) -> None:
    """Have mmdet's or mmseg's visualisation hook write pictures to a folder."""
    cfg.default_hooks.visualization.draw = True
    if task_of(cfg) == 'mmdet':
        # mmdet takes the folder below its own dated one; an absolute path replaces that.
        cfg.default_hooks.visualization.test_out_dir = str(Path(folder).resolve())
    else:
        cfg.default_hooks.visualization.interval = 1  # mmseg's default draws one image in 50
        cfg.visualizer.save_dir = folder


def keep_predictions(cfg: Config, out: str) -> None:
    """Have the test keep its predictions: a pickle for mmdet, a folder of PNGs for mmseg.

    Raises:
        UserError: Where ``out`` is of the other kind.
    """
    if task_of(cfg) == 'mmdet':
        if not out.endswith(('.pkl', '.pickle')):
            raise UserError(f'--out {out}: detection writes one pickle, so end the name in .pkl.')
        evaluator = cfg.test_evaluator
        evaluators = list(evaluator) if isinstance(evaluator, (list, tuple)) else [evaluator]
        cfg.test_evaluator = [*evaluators, dict(type='DumpDetResults', out_file_path=out)]
    else:
        if out.endswith(('.pkl', '.pickle')):
            raise UserError(f'--out {out}: segmentation writes a folder of PNGs, so name a folder.')
        cfg.test_evaluator.update(output_dir=out, keep_results=True)


def enable_tta(cfg: Config, task: str) -> None:
    """Wrap the model for test-time augmentation.

    Raises:
        UserError: For instance segmentation, which mmdet cannot merge.
    """
    if task == 'mmdet':
        if any('mask_head' in node for node in _dicts(cfg._cfg_dict['model'])):
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


def _dicts(node: Any) -> Iterator[dict]:
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from _dicts(child)


def _flip_pipeline(data: ConfigDict) -> list[dict]:
    """Replace a test pipeline's packing by packing the image plain and flipped."""
    *transforms, pack = data.pipeline
    meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    pack = dict(type=pack['type'], meta_keys=(*meta, 'flip', 'flip_direction'))
    flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
    return [*transforms, dict(type='TestTimeAug', transforms=[flips, [pack]])]


def unique_names(paths: Sequence[str]) -> list[str]:
    """Return a file stem for each path, numbered where it is taken."""
    names: list[str] = []
    for path in paths:
        stem = name = Path(path).stem
        number = 1
        while name in names:
            number += 1
            name = f'{stem}_{number}'
        names.append(name)
    return names
