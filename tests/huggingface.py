"""Hugging Face's own PVT and PVTv2, for the tests that compare with them."""

import torch
import transformers
from reference import V1
from torch import nn

CONFIGS = {
    'tiny': dict(),
    'b0': dict(),
    'b2_li': dict(depths=[3, 4, 6, 3], hidden_sizes=[64, 128, 320, 512], linear_attention=True),
}


def use_reference_eps(model):
    """Set the reference's eps, which is ours; Hugging Face has 1e-6 everywhere."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            inner = 'attention' in name or 'patch_embedding' in name
            module.eps = 1e-5 if inner else 1e-6


def build(arch, classifier=False, device='cpu'):
    """Build Hugging Face's class with random weights that tell every tensor from the next."""
    if arch in V1:
        config = transformers.PvtConfig(**CONFIGS[arch])
        cls = transformers.PvtForImageClassification if classifier else transformers.PvtModel
    else:
        config = transformers.PvtV2Config(**CONFIGS[arch], num_labels=1000)
        plain = transformers.PvtV2Backbone
        cls = transformers.PvtV2ForImageClassification if classifier else plain
    with torch.device('meta'):  # its own initialisation takes seconds
        model = cls(config).eval()
    use_reference_eps(model)
    if device == 'meta':
        return model
    model.to_empty(device=device)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        offset = 1 if 'norm' in name and name.endswith('weight') else 0
        parameter.data.copy_(offset + scale * noise)
    return model
