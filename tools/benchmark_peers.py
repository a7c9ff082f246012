"""The backbones that the benchmarks compare, with the same weights: pvt_mm's and its peers'."""

import importlib.util
from typing import Any

import torch
from complexity import pvt_class
from mmengine.registry import MODELS
from torch import Tensor, nn

from pvt_mm import PVT, PVTv2, convert_checkpoint
from pvt_mm.runtime import UserError

OURS = 'pvt_mm'
COMPILED = '-compiled'
PACKAGES = {OURS: 'pvt_mm', 'mmdet': 'mmdet', 'huggingface': 'transformers', 'timm': 'timm'}
ARCHS = (*PVT.ARCHS, *PVTv2.ARCHS)
#: What may stand beside pvt_mm: a peer as it is, or compiled by torch.compile.
PEERS = (*list(PACKAGES)[1:], *(f'{name}{COMPILED}' for name in PACKAGES))


def is_installed(side: str) -> bool:
    """Whether the package of a peer is there."""
    return importlib.util.find_spec(PACKAGES[side.removesuffix(COMPILED)]) is not None


def has_arch(side: str, arch: str) -> bool:
    """Whether a peer has an arch that takes images of any size."""
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


def build(side: str, arch: str) -> nn.Module:
    """Build one side with the weights that seed 0 draws for pvt_mm; no path is dropped.

    Raises:
        UserError: Where the peer is not installed or does not have the arch.
    """
    if not is_installed(side):
        package = PACKAGES[side.removesuffix(COMPILED)]
        raise UserError(f'The peer {side} needs a package: pip install {package}.')
    if not has_arch(side, arch):
        raise UserError(f'{side} has no {arch}; choose another --peers or --archs.')
    torch.manual_seed(0)
    model: nn.Module = pvt_class(arch)(arch)
    name = side.removesuffix(COMPILED)
    if name != OURS:
        weights = convert_checkpoint(model.state_dict(), to=name)
        model = _BUILDERS[name](arch, weights)
    return _compile(model) if side.endswith(COMPILED) else model


def _mmdet(arch: str, weights: dict[str, Tensor]) -> nn.Module:
    model = MODELS.build(dict(mmdet_config(arch), drop_path_rate=0.0))
    model.load_state_dict(weights)
    return model


def _huggingface(arch: str, weights: dict[str, Tensor]) -> nn.Module:
    from transformers import PvtV2Backbone, PvtV2Config

    settings = PVTv2.ARCHS[arch]
    config = PvtV2Config(
        depths=list(settings['depths']),
        hidden_sizes=list(settings['dims']),
        mlp_ratios=list(settings['mlp_ratios']),
        linear_attention=settings.get('linear', False),
        out_features=['stage1', 'stage2', 'stage3', 'stage4'],
    )
    model = PvtV2Backbone(config)
    model.load_state_dict({key.removeprefix('pvt_v2.'): v for key, v in weights.items()})
    return _FeatureMaps(model)


class _FeatureMaps(nn.Module):
    """Hugging Face's backbone, returning its features alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.model(x).feature_maps


def _timm(arch: str, weights: dict[str, Tensor]) -> nn.Module:
    import timm

    model = timm.create_model(f'pvt_v2_{arch}', pretrained=False, features_only=True)
    # Where only features are wanted, timm joins a stage's name and number.
    model.load_state_dict({key.replace('stages.', 'stages_', 1): v for key, v in weights.items()})
    return model


_BUILDERS = {'mmdet': _mmdet, 'huggingface': _huggingface, 'timm': _timm}


def _compile(model: nn.Module) -> nn.Module:
    """Compile for one size; without gradients the weights become constants of the program."""
    from torch._inductor import config

    config.freezing = True
    torch._dynamo.config.cache_size_limit = 256  # mmdet's blocks are compiled one by one
    torch._dynamo.reset()  # else a second size would be compiled for any size
    return torch.compile(model, dynamic=False)
