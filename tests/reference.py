"""What several tests need: the archs, small stand-ins, and weights and inputs drawn by rule."""

import functools
import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from mmengine.registry import HOOKS
from mmengine.runner.checkpoint import _load_checkpoint_to_model

from pvt_mm import PVT, PVTv2

DATA = Path(__file__).parent / 'data'
REPO = Path(__file__).parent.parent
V1 = tuple(PVT.ARCHS)
V2 = tuple(PVTv2.ARCHS)
ARCHS = V1 + V2
#: Formats of weights, and each arch with those that it is published in.
FORMATS = ('official', 'timm', 'huggingface', 'mmdet', 'pvt_mm')
PAIRS = [
    (arch, fmt)
    for arch in ARCHS
    for fmt in FORMATS
    if not (fmt == 'timm' and arch in V1) and not (fmt == 'mmdet' and arch == 'b2_li')
]

#: One block per stage and narrow, but with every part that the published archs have.
SMALL = {
    'dims': (16, 32, 40, 64),
    'depths': (1, 2, 1, 1),
    'num_heads': (1, 2, 5, 8),
    'mlp_ratios': (2, 2, 2, 2),
    'sr_ratios': (8, 4, 2, 1),
}
#: Every variant, small: name -> backbone class and arguments.
VARIANTS = {
    'v1': (PVT, {'arch': SMALL}),
    'v1_avg': (PVT, {'arch': SMALL, 'sr_mode': 'avg'}),
    'v1_max': (PVT, {'arch': SMALL, 'sr_mode': 'max'}),
    'v2': (PVTv2, {'arch': SMALL}),
    'v2_li': (PVTv2, {'arch': {**SMALL, 'linear': True}}),
}


def small(variant, **kwargs):
    """Build a small backbone of a variant, with the same weights each time."""
    torch.manual_seed(0)
    cls, arguments = VARIANTS[variant]
    return cls(**arguments, **kwargs)


def backbone_class(arch):
    return PVT if arch in V1 else PVTv2


@functools.cache
def load_json(name):
    return json.loads((DATA / name).read_text())


def official_weights(arch, classification=False):
    """Draw the official checkpoint of an arch by the rule that golden.json was made with."""
    weights = {}
    for key, shape in load_json('checkpoint_keys.json')[arch]['official'].items():
        if key.startswith(('head.', 'norm.')) or key == 'cls_token':
            if classification:
                weights[key] = torch.zeros(shape)
            continue
        noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
        if key.startswith('pos_embed'):
            value = 0.5 * noise
        elif key.endswith('bias'):
            value = 0.02 * noise
        elif len(shape) == 1:
            value = 1 + 0.1 * noise
        else:
            value = noise / np.sqrt(np.prod(shape[1:]))
        weights[key] = torch.from_numpy(value.astype('float32'))
    return weights


def rule_image(seed, shape, scale=1.0):
    noise = np.random.RandomState(seed).standard_normal(shape).astype('float32')
    return torch.from_numpy(noise * np.float32(scale))


def reference_backbone(arch, **kwargs):
    """Build a published arch with the weights of the rule."""
    model = backbone_class(arch)(arch, **kwargs)
    model.load_state_dict(official_weights(arch))
    return model


def load_from(model, weights, strict=True):
    """Load as Runner.load_checkpoint does, with the hook of every recipe."""
    checkpoint = {'model': dict(weights)}
    hook = HOOKS.build(dict(type='PVTCheckpointHook'))
    hook.after_load_checkpoint(SimpleNamespace(model=model), checkpoint)
    _load_checkpoint_to_model(model, checkpoint, strict=strict)
