"""The backbones that the benchmarks compare, with the same weights: pvt_mm's and its peers'."""

import contextlib
import functools
import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pvt_mm import PVT, PVTv2, convert_checkpoint
from pvt_mm.apis.complexity import pvt_class
from pvt_mm.errors import UserError

OURS = 'pvt_mm'
COMPILED = '-compiled'
PACKAGES = {OURS: 'pvt_mm', 'mmdet': 'mmdet', 'huggingface': 'transformers', 'timm': 'timm'}
ARCHS = (*PVT.ARCHS, *PVTv2.ARCHS)
#: What may stand beside pvt_mm: a peer as it is, or compiled by torch.compile.
PEERS = (*list(PACKAGES)[1:], *(f'{name}{COMPILED}' for name in PACKAGES))


def is_installed(side: str) -> bool:
    """Tell whether the package of a peer is there."""
    return importlib.util.find_spec(PACKAGES[side.removesuffix(COMPILED)]) is not None


def has_arch(side: str, arch: str) -> bool:
    """Tell whether a peer has an arch that takes images of any size."""
    name = side.removesuffix(COMPILED)
    if name == 'mmdet':
        return arch != 'b2_li'
    # timm has no first version, and Hugging Face's takes 224 x 224 alone.
    return name == OURS or arch in PVTv2.ARCHS


def mmdet_config(arch: str) -> dict[str, Any]:
    """Return mmdet's own backbone as its own configs set it up, for all published archs."""
    settings = pvt_class(arch).ARCHS[arch]
    if arch in PVT.ARCHS:
        return dict(type='mmdet.PyramidVisionTransformer', num_layers=list(settings['depths']))
    return dict(
        type='mmdet.PyramidVisionTransformerV2',
        embed_dims=settings['dims'][0],
        num_layers=list(settings['depths']),
        mlp_ratios=settings['mlp_ratios'],
    )


def settings_of(package: str, arch: str) -> dict[str, Any]:
    """Return what a package's class takes to build an arch; no path is dropped."""
    if package == OURS:
        return dict(type=pvt_class(arch).__name__, arch=arch)
    if package == 'mmdet':
        return dict(mmdet_config(arch), drop_path_rate=0.0)
    if package == 'timm':
        return dict(model_name=f'pvt_v2_{arch}', pretrained=False, features_only=True)
    settings = PVTv2.ARCHS[arch]
    return dict(
        depths=list(settings['depths']),
        hidden_sizes=list(settings['dims']),
        mlp_ratios=list(settings['mlp_ratios']),
        linear_attention=settings.get('linear', False),
        out_features=['stage1', 'stage2', 'stage3', 'stage4'],
    )


@functools.lru_cache(maxsize=1)  # all sides of a case ask in turn
def _drawn(arch: str) -> dict[str, torch.Tensor]:
    """Return the weights that seed 0 draws for pvt_mm."""
    torch.manual_seed(0)
    return pvt_class(arch)(arch).state_dict()


def weights_of(package: str, arch: str) -> dict[str, torch.Tensor]:
    """Return the weights that seed 0 draws for pvt_mm, in a package's names."""
    weights = _drawn(arch)
    if package == OURS:
        return weights
    weights = convert_checkpoint(weights, to=package)
    if package == 'timm':  # where only features are wanted, it joins a stage's name and number
        return {key.replace('stages.', 'stages_', 1): v for key, v in weights.items()}
    return {key.removeprefix('pvt_v2.'): v for key, v in weights.items()}


class Side:
    """A side's model in a process of its own, for use with ``with``.

    Args:
        side: ``OURS`` or one of ``PEERS``.
        arch: The arch.
        **work: The ``shape``, ``dtype``, ``mode`` and ``device`` of ``benchmark_side.Subject``.

    Raises:
        UserError: Where the peer is not installed or does not have the arch, or its process ends.
    """

    def __init__(self, side: str, arch: str, **work: Any) -> None:
        package = side.removesuffix(COMPILED)
        if not is_installed(side):
            raise UserError(f'The peer {side} needs a package: pip install {PACKAGES[package]}.')
        if not has_arch(side, arch):
            raise UserError(f'{side} has no {arch}; choose another --peers or --archs.')
        self.name = side
        subject = dict(
            package=package,
            settings=settings_of(package, arch),
            weights=weights_of(package, arch),
            compiled=side.endswith(COMPILED),
            **work,
        )
        command = [sys.executable, str(Path(__file__).with_name('benchmark_side.py'))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin and self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        with self._alive():
            self._send(subject)

    def __enter__(self) -> 'Side':
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, request: str) -> Any:
        """Return what a method of ``benchmark_side.Subject`` returns.

        Raises:
            UserError: Where the process has ended.
        """
        with self._alive():
            self._send(request)
            return pickle.load(self.replies)

    def _send(self, message: Any) -> None:
        pickle.dump(message, self.requests)
        self.requests.flush()

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        """Name the side where its process ends instead of listening or answering."""
        try:
            yield
        except (BrokenPipeError, EOFError) as error:
            raise UserError(f'The process of {self.name} broke off; see above for why.') from error

    def cpu_seconds(self) -> float:
        """Return the CPU time that the process has used; 0 where Linux does not tell."""
        try:
            fields = Path(f'/proc/{self.process.pid}/stat').read_text().rpartition(')')[2].split()
        except OSError:
            return 0.0
        return sum(map(int, fields[11:13])) / os.sysconf('SC_CLK_TCK')  # user and system
