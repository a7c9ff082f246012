"""Find, load, walk and retarget configs."""

from __future__ import annotations

import difflib
import glob
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.utils import import_modules_from_strings

from pvt_mm.errors import UserError

CODEBASES = ('mmdet', 'mmseg', 'mmpretrain')
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def load_config(
    path: str,
    cfg_options: dict[str, Any] | None = None,
    data_root: str | None = None,
    training_options: Sequence[str] = (),
) -> Config:
    """Load a config, apply the options of a command line, and name its work dir.

    Args:
        path: A config file, or a name such as ``mmdet::retinanet/FILE.py``.
        cfg_options: Keys with dots, and their values. A bare ``data_root``, which mmengine would
            ignore, is taken as the argument of that name.
        data_root: Where the data set lies; it replaces the config's own root everywhere.
        training_options: Names of files in ``configs/_base_/options``.

    Raises:
        UserError: Where the file is missing or no config, it has several data roots, or an option
            does not exist.
    """
    cfg = read_config(path)
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
    give_preprocessor(cfg)
    if cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(path).stem)
    return cfg


def give_preprocessor(cfg: Config) -> None:
    """Give a model the ``data_preprocessor`` that stands beside it, as mmengine's Runner does.

    Inference and test-time augmentation build the model themselves, and would leave it out.
    """
    beside = cfg.get('data_preprocessor')
    if beside and isinstance(cfg.get('model'), dict):
        cfg.model.setdefault('data_preprocessor', beside)


def add_training_option(cfg: Config, name: str) -> None:
    """Merge an option of ``configs/_base_/options`` into a config.

    The file of an option calls the key that it changes ``KEY_NAME``, such as
    ``optim_wrapper_layer_decay``. So it can be a base of a config: mmengine refuses two bases that
    set the same key.

    Raises:
        UserError: Where there is no such option.
    """
    files = {file.stem: file for file in (BUNDLED / '_base_' / 'options').glob('*.py')}
    if name not in files:
        raise UserError(f'There is no option {name!r}; choose of {", ".join(sorted(files))}.')
    option = Config.fromfile(files[name])
    cfg.merge_from_dict({key.removesuffix(f'_{name}'): option[key] for key in option})


def _drop_none(node: Any, keys: list[str]) -> None:
    """Remove a None above an option's key: mmengine cannot merge a dict into it."""
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

    def replace_root(node: Any) -> Any:
        if isinstance(node, dict):
            for key in node:
                node[key] = replace_root(node[key])
        elif isinstance(node, (list, tuple)):
            return type(node)(replace_root(child) for child in node)
        elif isinstance(node, str) and (node == before or node.startswith(before + '/')):
            return after + node[len(before) :]
        return node

    replace_root(cfg._cfg_dict)


def datasets(cfg: Config, loaders: Sequence[str] = LOADERS) -> Iterator[ConfigDict]:
    """Yield the data sets of a config's loaders, without wrappers."""

    def unwrap(node: Any) -> Iterator[ConfigDict]:
        if isinstance(node, (list, tuple)):
            for child in node:
                yield from unwrap(child)
        elif 'dataset' in node:
            yield from unwrap(node['dataset'])
        elif 'datasets' in node:
            yield from unwrap(node['datasets'])
        else:
            yield node

    for loader in loaders:
        if cfg.get(loader):
            yield from unwrap(cfg[loader]['dataset'])


def evaluators(cfg: Config, loader: str) -> list[Any]:
    """Return the evaluators of a loader's split, such as ``val_dataloader``."""
    found = cfg.get(loader.replace('dataloader', 'evaluator')) or []
    return list(found) if isinstance(found, (list, tuple)) else [found]


def is_format_only(cfg: Config, loader: str) -> bool:
    """Tell whether a loader's split is predicted and not scored."""
    found = evaluators(cfg, loader)
    return bool(found) and all(evaluator.get('format_only') for evaluator in found)


def type_name(node: Mapping[str, Any]) -> str:
    """Return the class name of a part of a config, scope and module left out.

    It is ``ResNet`` for ``'mmdet.ResNet'``, and for the class itself.
    """
    kind = node.get('type', '')
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


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


#: The configs that pvt_mm carries.
BUNDLED = Path(__file__).parent / '.mim' / 'configs' / 'pvt'


def read_config(name: str | Path, import_custom_modules: bool = True) -> Config:
    """Load a config by its path or its ``PACKAGE::DIR/FILE.py`` name.

    Raises:
        UserError: Where there is none, with similar names, or it does not load.
    """
    file = find_config(str(name))
    try:
        cfg = Config.fromfile(file, import_custom_modules=False)
    except Exception as error:  # it is a program
        reason = f'{type(error).__name__}: {error}'.splitlines()[0].rstrip('.')
        if isinstance(error, (SyntaxError, KeyError, TypeError, ImportError, OSError)):
            reason = reason.partition(': ')[2]
        raise UserError(f'The config {name} does not load: {reason}.') from error
    refuse_old_config(cfg)
    if import_custom_modules:
        _import_custom_modules(cfg, str(name), file.resolve().parent)
    return cfg


def _import_custom_modules(cfg: Config, name: str, folder: Path) -> None:
    """Import the modules of ``custom_imports``.

    Raises:
        UserError: Naming the module that fails, and why.
    """
    custom = cfg.get('custom_imports') or {}
    imports = custom.get('imports') or []
    for module in [imports] if isinstance(imports, str) else imports:
        try:
            import_modules_from_strings(module, custom.get('allow_failed_imports', False))
        except Exception as error:  # it is a program too
            raise UserError(
                f'The config {name} does not load: {_import_fault(module, error, folder)}.'
            ) from error


def _import_fault(module: str, error: Exception, folder: Path) -> str:
    """Say why a module of ``custom_imports`` cannot be imported."""
    cause = error.__context__ if isinstance(error, ImportError) and error.__context__ else error
    missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
    if missing is None:
        return f'its module {module} fails ({type(cause).__name__}: {cause})'
    if missing != module and not module.startswith(f'{missing}.'):
        return f'its module {module} needs {missing}, which is not installed'
    places = [folder, *folder.parents][:3]
    path = Path(*missing.split('.'))
    found = next((p for p in places if (p / path).is_dir() or (p / f'{path}.py').is_file()), None)
    where = f'{found}, where it lies' if found else 'the folder that holds it'
    way = f'set PYTHONPATH={found or "FOLDER"}'
    return f"its custom_imports name {module}, but Python's path lacks {where}: {way}"


# Configs of mmdet 2.x and mmseg 0.x

#: What only those have at the top, and what is written today; then what only those of today have.
_OLD_KEYS = {
    'checkpoint_config': 'default_hooks.checkpoint',
    'data': 'train_dataloader, val_dataloader, test_dataloader',
    'log_config': 'default_hooks.logger',
    'lr_config': 'param_scheduler',
    'optimizer_config': 'optim_wrapper.clip_grad',
    'runner': 'train_cfg',
    'total_epochs': 'train_cfg.max_epochs',
}
_NEW_KEYS = ('default_scope', 'optim_wrapper', *LOADERS)
#: Folders that are named otherwise than their detector or head.
_FOLDERS = {
    'hybridtaskcascade': 'htc',
    'iterativedecode': 'knet',
    'knowledgedistillationsinglestagedetector': 'ld',
    'lraspp': 'mobilenet_v3',
    'point': 'point_rend',
    'setrmla': 'setr',
    'setrup': 'setr',
    'singlestagedetector': 'ssd',
    'tridentfasterrcnn': 'tridentnet',
    'yolov3': 'yolo',
    'aspp': 'deeplabv3',
    'da': 'danet',
    'depthwiseseparableaspp': 'deeplabv3plus',
    'fpn': 'sem_fpn',
    'nl': 'nonlocal_net',
    'segmentermasktransformer': 'segmenter',
    'uper': 'upernet',
}


def refuse_old_config(cfg: Config) -> None:
    """Refuse a config of mmdet 2.x or mmseg 0.x, which no Runner of today reads.

    Raises:
        UserError: Naming a config of today with the same head to begin from.
    """
    marks = old_keys(cfg)
    if marks and not any(key in cfg for key in _NEW_KEYS):
        near = _nearest_of_today(cfg)
        raise UserError(
            f'{cfg.filename or "The config"} is of mmdet 2.x or mmseg 0.x ({", ".join(marks)}), '
            f'which their versions 3.x and 1.x do not read; '
            f'{f"begin from {near}" if near else "begin from a config of today"}, and set there '
            'what you had changed.'
        )


def old_keys(cfg: Config) -> dict[str, str]:
    """Return the keys of a config that only mmdet 2.x and mmseg 0.x read, and what to write today.

    In a config of today they change nothing, and nobody says so.
    """
    found = {key: new for key, new in _OLD_KEYS.items() if key in cfg}
    data = cfg.get('data')
    if not isinstance(data, dict) or {'samples_per_gpu', 'train', 'val', 'test'}.isdisjoint(data):
        found.pop('data', None)  # a variable of one's own
    return found


def _nearest_of_today(cfg: Config) -> str:
    """Return the config of today whose head is that of an old one, '' where none is known.

    One for a PVT is among those of this package, if it has that head.
    """
    model = cfg.get('model') or {}
    head = model.get('decode_head')
    head = head[-1] if isinstance(head, (list, tuple)) and head else head
    name = _type(head or model)
    key = _letters(name.removesuffix('Head') if head else name)
    stem = Path(cfg.filename or name).stem
    backbone = _letters(_type(model.get('backbone')))
    if 'pvt' in backbone or 'pyramidvision' in backbone:
        own = [f'pvt_mm::pvt/{file}' for file in config_names(BUNDLED)]
        own = [name for name in own if _letters(Path(name).stem).startswith(key)]
        if key and own:
            return _most_similar(stem, own)
    package = 'mmseg' if head else 'mmdet'
    if importlib.util.find_spec(package) is None:
        return ''
    root = config_folder(package)
    folders = {_letters(folder.name): folder for folder in root.iterdir() if folder.is_dir()}
    folder = folders.get(_letters(_FOLDERS.get(key, key))) or folders.get(f'{key}net')
    if folder is None:
        return ''
    names = config_names(folder)
    return _most_similar(stem, [f'{package}::{folder.name}/{file}' for file in names])


def _type(part: Any) -> str:
    return type_name(part) if isinstance(part, dict) else ''


def _letters(name: str) -> str:
    return ''.join(filter(str.isalnum, name)).lower()


def _most_similar(stem: str, names: Sequence[str]) -> str:
    """Return the name whose file is most similar, the shortest of equal ones; '' of none."""

    def distance(name: str) -> tuple[float, int]:
        matcher = difflib.SequenceMatcher(None, _letters(stem), _letters(Path(name).stem), False)
        return -matcher.ratio(), len(name)

    return min(names, key=distance, default='')


def find_config(name: str) -> Path:
    """Return the file of a config named by its path or as ``PACKAGE::DIR/FILE.py``.

    Raises:
        UserError: Where there is none, with similar names.
    """
    package, is_named, path = name.rpartition('::')
    folder = config_folder(package) if is_named else Path()
    file = folder / path
    if file.is_file():
        return file
    if is_named:
        known = [f'{package}::{other}' for other in config_names(folder)]
        fallback = f'see {folder}.'
    else:
        fallback = 'check the path.'
        known = [
            os.path.relpath(other) if other.is_relative_to(Path.cwd()) else str(other)
            for place in (BUNDLED.resolve(), file.parent.resolve())
            for other in sorted(place.glob('*.py'))
        ]
    hint = nearest(file.stem, known, key=lambda other: Path(other).stem)
    raise UserError(f'There is no config {name}; {hint or fallback}')


def config_folder(package: str) -> Path:
    """Return the folder of an installed package's configs.

    Raises:
        UserError: Where it is not installed, or has none.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    for place in (spec.submodule_search_locations if spec else None) or ():
        folder = Path(place) / '.mim' / 'configs'
        if folder.is_dir():
            return folder
    raise UserError(f'No installed package {package} carries configs; choose mmdet or mmseg.')


def config_names(folder: Path) -> list[str]:
    """Return the relative paths of the configs in a folder, without bases."""
    paths = map(Path, glob.glob('**/*.py', root_dir=folder, recursive=True))  # follows links
    return sorted(path.as_posix() for path in paths if '_base_' not in path.parts)


def nearest(wanted: str, names: Iterable[str], key: Callable[[str], str] = str) -> str:
    """Return a question with the names most similar to a missing one; '' if none is similar.

    Args:
        wanted: The missing name; it may be the beginning of a name.
        names: Those that exist.
        key: The part of a name that is compared.
    """
    matcher = difflib.SequenceMatcher(b=wanted, autojunk=False)

    def similarity(name: str) -> float:
        ratios = []
        for text in (key(name), key(name)[: len(wanted)]):
            matcher.set_seq1(text)
            ratios.append(matcher.ratio())
        return max(ratios)

    ranked = sorted((-similarity(name), len(name), name) for name in set(names))[:3]
    near = [name for minus_ratio, _, name in ranked if minus_ratio < -0.6]
    return f'did you mean {" or ".join(near)}?' if near else ''


def iter_dicts(node: Any) -> Iterator[dict]:
    """Yield every dict among nested dicts, lists and tuples; a shared one only once."""
    seen: dict[int, dict] = {}  # keeps them alive, so that ids stay unique

    def walk(node: Any) -> Iterator[dict]:
        if isinstance(node, dict):
            if id(node) in seen:
                return
            seen[id(node)] = node
            yield node
            node = list(node.values())
        if isinstance(node, (list, tuple)):
            for child in node:
                yield from walk(child)

    return walk(node)
