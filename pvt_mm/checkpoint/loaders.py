"""Where mmengine gets checkpoints from: files, URLs, names of models; all of them read safely."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.fileio import get_file_backend, register_handler
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from pvt_mm.checkpoint import safe_load
from pvt_mm.errors import UserError

#: The start of a file's SHA-256 at the end of its name, as publishers of weights write it.
_HASH = re.compile(r'-([0-9a-f]{8,64})\.\w+$')


def register_safe_reading() -> None:
    """Have mmengine read every checkpoint, pickle and YAML file as data."""
    safe_load.allow_safe_globals()
    loaders: dict[str, Callable[..., dict[str, Any]]] = {
        '': load_from_file,
        'http://': load_from_url,
        'https://': load_from_url,
        r'(\S+\:)?s3://': load_from_storage,
        r'(\S+\:)?petrel://': load_from_storage,
        'pavi://': load_from_pavi,
        **{f'{scheme}://': load_from_name for scheme in _CATALOGUES},
    }
    for prefix, loader in loaders.items():
        CheckpointLoader.register_scheme(prefix, loader, force=True)
    register_handler(['pkl', 'pickle'])(safe_load.PlainPickleHandler)
    register_handler(['yaml', 'yml'])(safe_load.PlainYamlHandler)


# mmengine logs a loader's name from its tenth letter on.


def load_from_file(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a file.

    Raises:
        UserError: Where it is no checkpoint of weights.
    """
    checkpoint = safe_load.read_checkpoint(filename, map_location)
    safe_load.check_weights(checkpoint, filename)
    safe_load.drop_config(checkpoint)
    return checkpoint


def load_from_url(url: str, map_location: Any = None, progress: bool = True) -> dict[str, Any]:
    """Fetch a URL into torch.hub's cache, checked by the hash in its name if any, and read it.

    What cannot be read is not kept, so that half a file does not stay for the next run.

    Raises:
        UserError: Where it cannot be fetched, is not what its hash says, or is no checkpoint.
    """
    name = Path(urlparse(url).path).name
    if name in ('', '..'):
        raise UserError(f'{url} names no file; give the address of a checkpoint itself.')
    file = Path(torch.hub.get_dir()) / 'checkpoints' / name
    if file.is_file():
        _check_hash(file, 'remove it, and it is fetched again')
        return load_from_file(str(file), map_location)
    _download(url, file, progress)
    try:
        _check_hash(file, 'get the address from its publisher again')
        return load_from_file(str(file), map_location)
    except UserError as error:
        file.unlink(missing_ok=True)
        raise UserError(f'{error} It came from {url} and was not kept.') from error


def _download(url: str, file: Path, progress: bool) -> None:
    """Fetch a file; its name is there only once it is whole."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), progress=progress)
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(
            f'Could not fetch {url} ({error}); fetch it elsewhere and put it at {file}.'
        ) from error


def _check_hash(file: Path, way_out: str) -> None:
    """Check a file against the hash that its name ends in, if any."""
    told = _HASH.search(file.name)
    if told is None:
        return
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if not digest.startswith(told[1]):
        raise UserError(
            f'The checkpoint {file} is not the one of its name: its SHA-256 hash starts with '
            f'{digest[: len(told[1])]}; {way_out}.'
        )


def load_from_storage(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a file of S3 or Petrel, by mmengine's backend.

    Raises:
        UserError: Where it cannot be fetched or is no checkpoint.
    """
    try:
        backend = get_file_backend(filename, backend_args={'backend': 'petrel'})
        content = backend.get(filename)
    except Exception as error:  # the client's errors are its own
        raise UserError(
            f'Could not fetch {filename} ({str(error).rstrip(".")}); copy the file here.'
        ) from error
    with TemporaryDirectory() as folder:
        file = Path(folder) / Path(filename).name
        file.write_bytes(content)
        try:
            return load_from_file(str(file), map_location)
        except UserError as error:
            raise UserError(f'{error} It came from {filename}.') from error


def load_from_pavi(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Refuse a scheme whose client is not public.

    Raises:
        UserError: Always.
    """
    raise UserError(f'{filename} is of a store that is not read here; copy the file here.')


_CATALOGUES = {
    'torchvision': mmengine_checkpoint.get_torchvision_models,
    'modelzoo': mmengine_checkpoint.get_torchvision_models,
    'open-mmlab': mmengine_checkpoint.get_external_models,
    'openmmlab': mmengine_checkpoint.get_external_models,
    'mmcls': mmengine_checkpoint.get_mmcls_models,
}


def load_from_name(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a model that one of mmengine's catalogues names, such as ``torchvision://resnet50``.

    Raises:
        UserError: Where there is none of that name, or it cannot be fetched or read.
    """
    scheme, _, name = filename.partition('://')
    try:
        places = _CATALOGUES[scheme]()
    except ImportError as error:
        raise UserError(f'{filename} needs a package: pip install {scheme}.') from error
    if scheme.startswith('open'):
        name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
    if name not in places:
        near = ', '.join(get_close_matches(name, places)) or 'none is near'
        raise UserError(f'There is no model {name!r} in {scheme}://; those near it: {near}.')
    place = places[name]
    if '://' in place:
        checkpoint = load_from_url(place, map_location)
    else:
        checkpoint = load_from_file(
            str(Path(mmengine_checkpoint._get_mmengine_home()) / place), map_location
        )
    if scheme == 'mmcls':
        return mmengine_checkpoint._process_mmcls_checkpoint(checkpoint)
    return checkpoint
