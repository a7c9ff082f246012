"""Where mmengine gets checkpoints from: files, URLs, names of models. All are read as data."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from mmengine.fileio import register_handler
from mmengine.model import PretrainedInit as MMEnginePretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from pvt_mm.checkpoint import safe_load
from pvt_mm.checkpoint.find import unwrap
from pvt_mm.config import nearest
from pvt_mm.errors import CheckpointMismatchError, UserError, naming_file

#: The start of a file's SHA-256 at the end of its name, as publishers of weights write it.
_HASH = re.compile(r'-([0-9a-f]{8,64})\.\w+$')
#: Schemes whose names of models mmengine knows the places of.
_CATALOGUES = {
    'torchvision': mmengine_checkpoint.get_torchvision_models,
    'modelzoo': mmengine_checkpoint.get_torchvision_models,
    'open-mmlab': mmengine_checkpoint.get_external_models,
    'openmmlab': mmengine_checkpoint.get_external_models,
}


def register_safe_reading() -> None:
    """Have mmengine read every checkpoint, pickle and YAML file as data."""
    safe_load.allow_safe_globals()
    loaders: dict[str, Callable[..., dict[str, Any]]] = {
        '': load_from_file,
        'http://': load_from_url,
        'https://': load_from_url,
        **{f'{scheme}://': load_from_name for scheme in _CATALOGUES},
    }
    for prefix, loader in [*CheckpointLoader._schemes.items()]:
        if loader.__module__.startswith('mmengine.'):
            safe_loader = loaders.get(prefix, load_from_elsewhere)
            CheckpointLoader.register_scheme(prefix, safe_loader, force=True)
    register_handler(['pkl', 'pickle'])(safe_load.PlainPickleHandler)
    register_handler(['yaml', 'yml'])(safe_load.PlainYamlHandler)
    WEIGHT_INITIALIZERS.register_module(name='Pretrained', module=PretrainedInit, force=True)


class PretrainedInit(MMEnginePretrainedInit):
    """mmengine's initialisation from a checkpoint; an error names the file."""

    def __call__(self, module: nn.Module) -> None:
        """Load the checkpoint into a module.

        Raises:
            CheckpointMismatchError: Where it does not fit, or has nothing under ``prefix``.
        """
        with naming_file(self.checkpoint):
            try:
                super().__call__(module)
            except AssertionError as error:
                if 'not in the pretrained model' not in str(error):
                    raise
                keys = list(unwrap(CheckpointLoader.load_checkpoint(self.checkpoint, 'cpu')))
                raise CheckpointMismatchError(
                    f'The weights have no keys under {self.prefix!r}, the prefix of init_cfg, but '
                    f'such as {keys[0]}; without a prefix, a PVT is found by its keys.'
                ) from error


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
    """Fetch a URL into torch.hub's cache, and read it from there.

    A hash in its name is checked. A file that cannot be read is not kept for the next run.

    Raises:
        UserError: Where it cannot be fetched, has another hash, or is no checkpoint.
    """
    name = Path(urlparse(url).path).name
    if name in ('', '..'):
        raise UserError(f'{url} names no file; give the address of a checkpoint itself.')
    file = Path(torch.hub.get_dir()) / 'checkpoints' / name
    if file.is_file():
        _check_hash(file, 'remove it, and it is fetched again')
        return load_from_file(str(file), map_location)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # The file gets its name once it is whole.
        torch.hub.download_url_to_file(url, str(file), progress=progress)
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(
            f'Could not fetch {url} ({error}); fetch it elsewhere and put it at {file}.'
        ) from error
    try:
        _check_hash(file, 'get the address from its publisher again')
        return load_from_file(str(file), map_location)
    except UserError as error:
        file.unlink(missing_ok=True)
        raise UserError(f'{error} It came from {url} and was not kept.') from error


def _check_hash(file: Path, remedy: str) -> None:
    """Check a file against the hash that its name ends in, if any."""
    expected = _HASH.search(file.name)
    if expected is None:
        return
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if not digest.startswith(expected[1]):
        raise UserError(
            f'The checkpoint {file} is not the one of its name: its SHA-256 hash starts with '
            f'{digest[: len(expected[1])]}; {remedy}.'
        )


def load_from_name(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a model that mmengine knows by name, such as ``torchvision://resnet50``.

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
        hint = nearest(name, places) or 'no name is like it.'
        raise UserError(f'There is no model {name!r} in {scheme}://; {hint}')
    if '://' in places[name]:
        return load_from_url(places[name], map_location)
    file = Path(mmengine_checkpoint._get_mmengine_home()) / places[name]
    return load_from_file(str(file), map_location)


def load_from_elsewhere(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Refuse a scheme: mmengine's own loader of it would run code in the file.

    Raises:
        UserError: Always.
    """
    scheme = filename.partition('://')[0]
    raise UserError(f'{filename}: {scheme}:// is an unsupported scheme; copy the file here.')
