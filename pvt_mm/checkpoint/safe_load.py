"""Read untrusted files without running code in them: checkpoints, pickles, YAML."""

from __future__ import annotations

import argparse
import codecs
import collections
import io
import pickle
import re
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from mmengine.fileio.handlers import PickleHandler, YamlHandler
from mmengine.logging import HistoryBuffer
from mmengine.structures import InstanceData
from mmengine.utils import digit_version
from torch import Tensor

from pvt_mm.checkpoint.find import unwrap
from pvt_mm.errors import UserError

# What a file may name


def _statistics(owner: Any, name: str) -> Any:
    """Stand in for ``getattr``: mmengine's log buffers name four attributes in a checkpoint.

    The real one would let a file get from any object to any function.
    """
    if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f'it may not read {name} of {owner!r}')


def safe_globals() -> list[Any]:
    """Return what a training checkpoint names besides tensors, for torch's allow-list.

    NumPy 1 and 2 have the same functions in different modules. A file written under one may be
    read under the other, so both names are registered.
    """
    array = np.empty(1)
    dtypes = {type(np.dtype(kind)) for kind in ('f4', 'f8', 'i4', 'i8', 'u1', 'b1')}
    functions: dict[str, Any] = {
        'multiarray._reconstruct': array.__reduce__()[0],
        'multiarray.scalar': np.float64(0).__reduce__()[0],
        'numeric._frombuffer': array.__reduce_ex__(5)[0],
    }
    both = [
        (function, f'numpy.{core}.{name}')
        for name, function in functions.items()
        for core in ('core', '_core')
    ]
    # The counter holds the milestones of MultiStepLR.
    others = [argparse.Namespace, collections.Counter, HistoryBuffer, np.ndarray, np.dtype]
    return [(_statistics, 'builtins.getattr'), *others, *dtypes, *both]


def takes_safe_globals() -> bool:
    """Tell whether torch's allow-list takes names, as it does from PyTorch 2.6 on."""
    return digit_version(torch.__version__.split('+')[0]) >= digit_version('2.6.0')


def allow_safe_globals() -> None:
    """Have torch's own reader take training checkpoints, where it has an allow-list."""
    if takes_safe_globals():
        torch.serialization.add_safe_globals(safe_globals())


def _load_bytes(content: bytes) -> Any:
    """Stand in for torch's function of that name, which would load anything."""
    return torch.load(io.BytesIO(content), weights_only=True)


def _plain_globals() -> dict[str, Any]:
    """Return everything that ``PlainUnpickler`` lets a file name."""
    functions = (
        torch._utils._rebuild_tensor,
        torch._utils._rebuild_tensor_v2,
        torch._utils._rebuild_parameter,
    )
    classes = (
        bytearray, complex, set, collections.OrderedDict, InstanceData,
        torch.Size, torch.device, torch.nn.Parameter,
    )  # fmt: skip
    allowed = (
        *functions, *classes, *safe_globals(),
        (codecs.encode, '_codecs.encode'),  # bytes, in older protocols
        (_load_bytes, 'torch.storage._load_from_bytes'),
    )  # fmt: skip
    named = {}
    for item in allowed:
        pair = isinstance(item, tuple)
        function, name = item if pair else (item, f'{item.__module__}.{item.__name__}')
        named[name] = function
    return named


_PLAIN = _plain_globals()
#: Objects whose attributes a file may set; classes and functions are not among them.
_BUILDABLE = (
    argparse.Namespace, collections.OrderedDict, HistoryBuffer, InstanceData, np.dtype, np.ndarray,
)  # fmt: skip


# Python's unpickler: the one in C would let a file set attributes of classes.
_Unpickler: Any = pickle._Unpickler


class PlainUnpickler(_Unpickler):
    """Unpickle numbers, text, containers, NumPy arrays and tensors; refuse all else."""

    dispatch = dict(_Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up among those allowed; nothing is imported."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if module == 'torch' and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if f'{module}.{name}' not in _PLAIN:
            raise pickle.UnpicklingError(f'GLOBAL {module}.{name} is not allowed')
        return _PLAIN[f'{module}.{name}']

    def load_build(self) -> None:
        """Set an object's state, where it is an object that may have one."""
        if not isinstance(self.stack[-2], _BUILDABLE):
            raise pickle.UnpicklingError(f'it may not change {self.stack[-2]!r}')
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def _plain_load(file: Any, **kwargs: Any) -> Any:
    return PlainUnpickler(file, **kwargs).load()


#: What torch.load takes in the place of pickle.
_plain_pickle = SimpleNamespace(__name__='plain_pickle', Unpickler=PlainUnpickler, load=_plain_load)


# Checkpoints


def find_checkpoint(path: str | Path) -> Path:
    """Return the path of a checkpoint file.

    Raises:
        UserError: Where it is missing or empty.
    """
    file = Path(path).expanduser()
    try:
        if file.is_dir():
            raise UserError(f'The checkpoint {file} is a folder; name a file in it.')
        if not file.is_file():
            raise UserError(f'There is no checkpoint {file}; check the path.')
        if file.stat().st_size == 0:
            raise UserError(f'The checkpoint {file} is empty; download or copy it again.')
    except OSError as error:
        raise UserError(f'The checkpoint {file} cannot be read: {error.strerror}.') from error
    return file


def read_checkpoint(path: str | Path, map_location: Any = 'cpu') -> dict[str, Any]:
    """Read a checkpoint file without running code that it may hold.

    Args:
        path: A ``.pth`` or ``.safetensors`` file.
        map_location: As in ``torch.load``.

    Raises:
        UserError: Where the file is missing, damaged or no checkpoint, or would run code.
    """
    file = find_checkpoint(path)
    read: Callable[[Path, Any], Any] = _read_pickled
    if file.suffix == '.safetensors':
        read = _read_safetensors
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the errors below say more
            checkpoint = read(file, map_location)
    except ImportError as error:
        raise UserError(f'Reading {file} needs a package: pip install safetensors.') from error
    except Exception as error:  # on a damaged file, readers raise nearly anything
        raise UserError(f'The checkpoint {file} {_complaint(error, file)}') from error
    if not isinstance(checkpoint, dict):
        raise UserError(
            f'The checkpoint {file} holds a {type(checkpoint).__name__}, not a dict of tensors.'
        )
    return checkpoint


def _read_pickled(file: Path, map_location: Any) -> Any:
    allow_safe_globals()  # other packages may have cleared the list
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        if takes_safe_globals():
            raise
    # Older PyTorch has no allow-list: training checkpoints need the unpickler above.
    return torch.load(
        file, map_location=map_location, weights_only=False, pickle_module=_plain_pickle
    )


def _read_safetensors(file: Path, map_location: Any) -> dict[str, Any]:
    from safetensors.torch import load_file

    device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
    return load_file(file, device=str(device))


def _complaint(error: Exception, file: Path) -> str:
    """Say what is wrong with a file, by its first bytes or its reader's error."""
    if isinstance(error, PermissionError):
        return f'cannot be read: {error.strerror}.'
    refusal = _refusal(error)
    if refusal:
        return f'was refused: {refusal}; get a file that holds weights alone.'
    with file.open('rb') as content:
        start = content.read(64).lstrip().lower()
    if start.startswith(b'<'):
        return 'is a web page, no checkpoint: the download failed; get it again.'
    if start.startswith(b'version https://git-lfs'):
        return 'is a pointer of Git LFS, no checkpoint; fetch the file itself with git lfs pull.'
    reason = str(error).strip().splitlines() or [type(error).__name__]
    told = reason[0].split('. ')[0].rstrip('.')
    if isinstance(error, pickle.UnpicklingError):
        told = 'it is no file of PyTorch'
    return f'is damaged or no checkpoint ({told}); get it again.'


def _refusal(error: Exception) -> str:
    """Return what a pickle asked for and was refused; '' for other errors."""
    if not isinstance(error, pickle.UnpicklingError):
        return ''
    message = str(error)
    # The second wording is that of PyTorch 2.1.
    named = re.search(r'(?:GLOBAL|Unsupported class) (\S+)', message)
    if named:
        return f'it asks for {named[1]}'
    if 'Can only' in message or 'unrecognized function' in message:
        return 'it asks for what is no data'
    forbidden = re.search(r'it may not .*', message)
    return forbidden[0].split('. ')[0].rstrip('.') if forbidden else ''


def check_weights(checkpoint: Mapping[str, Any], file: str | Path) -> None:
    """Check that a checkpoint holds weights, and only numbers.

    Raises:
        UserError: Where it holds no tensors, or some that are NaN.
    """
    weights = unwrap(checkpoint)
    tensors = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
    if not tensors:
        names = ', '.join(list(weights)[:3]) or 'none'
        raise UserError(f'The checkpoint {file} holds no weights; its entries: {names}.')
    plain = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    with_nan = [
        key
        for key, tensor in tensors.items()
        if tensor.dtype in plain and tensor.layout == torch.strided and tensor.isnan().any()
    ]
    if with_nan:
        raise UserError(
            f'The checkpoint {file} holds NaN in {len(with_nan)} of {len(tensors)} tensors, such '
            f'as {with_nan[0]}: its training diverged; take an earlier one.'
        )


def drop_config(checkpoint: Mapping[str, Any]) -> None:
    """Remove, in place, the configs that a checkpoint embeds.

    They are Python code, which mmengine's resume and inferencers would run.
    """
    hub = checkpoint.get('message_hub')
    places = [checkpoint.get('meta'), hub.get('runtime_info') if isinstance(hub, dict) else None]
    for place in places:
        if isinstance(place, dict):
            for key in ('config', 'cfg'):
                place.pop(key, None)


# Annotations and other data


class PlainPickleHandler(PickleHandler):
    """Read pickles of mmdet's annotations, proposals and image sizes as plain data."""

    def load_from_fileobj(self, file: Any, **kwargs: Any) -> Any:
        """Read a pickle from an open file.

        Raises:
            UserError: Where it is damaged or asks for more than data.
        """
        try:
            return _plain_load(file, **kwargs)
        except Exception as error:  # on a damaged pickle, readers raise nearly anything
            reason = _refusal(error) or 'it is damaged or no pickle'
            raise UserError(
                f'A pickle among the annotations was refused: {reason}; it may hold numbers, text, '
                'NumPy arrays and tensors.'
            ) from error


class _PlainLoader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):  # type: ignore[misc]
    """YAML's safe loader, with the tuples that mmengine writes."""


_PlainLoader.add_constructor(
    'tag:yaml.org,2002:python/tuple',
    lambda loader, node: tuple(loader.construct_sequence(node)),
)


class PlainYamlHandler(YamlHandler):
    """Read YAML as plain data; mmengine's own reader calls any function that a file names."""

    def load_from_fileobj(self, file: Any, **kwargs: Any) -> Any:
        """Read YAML from an open file.

        Raises:
            UserError: Where it is damaged or asks for more than data.
        """
        try:
            return yaml.load(file, Loader=_PlainLoader)
        except yaml.YAMLError as error:
            reason = getattr(error, 'problem', None) or 'it is no YAML'
            raise UserError(f'A YAML file was refused: {reason}.') from error
