"""The same numbers as Hugging Face's own PVT and PVTv2, from their weights."""

import pytest
import torch
from reference import V1, backbone_class, official_weights, rule_image
from torch import nn

from pvt_mm import convert_checkpoint

pytest.importorskip('transformers')

from huggingface import CONFIGS, build


def v1_features(model, image):
    """Return the four stages of a PvtModel, run without its class token as a backbone is."""
    last = model.encoder.patch_embeddings[3]
    last.position_embeddings = nn.Parameter(last.position_embeddings[:, 1:])
    last.cls_token = None
    states = model(image, output_hidden_states=True).hidden_states[:-1]  # the last is normed
    ends = torch.tensor(model.config.depths).cumsum(0) - 1
    for stage, end in enumerate(ends):
        stride = 4 * 2**stage
        size = (image.shape[2] // stride, image.shape[3] // stride)
        yield states[end].transpose(1, 2).unflatten(2, size)  # (B, C, H, W)


@torch.no_grad()
@pytest.mark.parametrize(
    ('arch', 'classifier'),
    [('tiny', False), ('tiny', True), ('b0', False), ('b0', True), ('b2_li', False)],
)
def test_features_equal_hugging_face(arch, classifier):
    """Weights with and without the model's prefix load whole, and all four stages are equal.

    PVT at 224 x 224, the one size that Hugging Face's position embeddings allow.
    """
    theirs = build(arch, classifier)
    ours = backbone_class(arch)(arch).eval()
    ours.load_state_dict(theirs.state_dict())
    if arch in V1:
        image = rule_image(5, (1, 3, 224, 224))
        expected = v1_features(theirs.pvt if classifier else theirs, image)
    else:
        image = rule_image(5, (1, 3, 64, 96))
        model = theirs.pvt_v2 if classifier else theirs
        expected = model.encoder(image, output_hidden_states=True).hidden_states
    for out, other in zip(ours(image), expected, strict=True):
        assert (out - other).abs().max() < 1e-4 * max(1, other.std())


@pytest.mark.parametrize('arch', CONFIGS)
def test_hugging_face_takes_what_we_write(arch):
    """Official weights converted for Hugging Face load there strictly, classifier and all."""
    weights = {k: v.to('meta') for k, v in official_weights(arch, classification=True).items()}
    model = build(arch, classifier=True, device='meta')
    model.load_state_dict(convert_checkpoint(weights, to='huggingface'), strict=True)
    assert convert_checkpoint(model.state_dict(), to='official').keys() == weights.keys()


def test_backbone_class_gives_the_same_keys():
    """PvtV2Backbone's state dict, which has no prefix, is recognised and loads whole."""
    theirs = build('b0')
    assert not any(key.startswith('pvt_v2.') for key in theirs.state_dict())
    ours = backbone_class('b0')('b0')
    ours.load_state_dict(theirs.state_dict())
    weight = theirs.encoder.layers[2].blocks[1].attention.proj.weight
    assert torch.equal(ours.stages[2].blocks[1].attn.proj.weight, weight)
