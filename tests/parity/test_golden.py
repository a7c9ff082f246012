"""The numbers are the reference implementation's own."""

import pytest
import torch
from reference import ARCHS, load_json, reference_backbone, rule_image

GOLDEN = load_json('golden.json')
CURVES = load_json('golden_training.json')['curves']


@pytest.mark.parametrize('arch', ARCHS)
def test_forward_equals_reference(arch):
    """Every stage equals the reference's to 1e-5 of its std, at all sizes and for a dim image."""
    model = reference_backbone(arch).eval()
    for case in GOLDEN[arch]:
        image = rule_image(case['seed'], case['input'], case.get('scale', 1.0))
        with torch.no_grad():
            outs = model(image)
        assert len(outs) == len(case['stages'])
        for out, stage in zip(outs, case['stages']):
            assert list(out.shape) == stage['shape']
            tolerance = 1e-5 * stage['std']
            values = torch.tensor(stage['value'])
            assert (out.flatten()[stage['index']] - values).abs().max() < tolerance
            assert abs(out.mean().item() - stage['mean']) < tolerance
            assert abs(out.std().item() - stage['std']) < tolerance


@pytest.mark.parametrize('arch', CURVES)
def test_training_follows_reference(arch):
    """Forward, backward and AdamW updates give the reference's losses to 1e-3 of each."""
    curve = CURVES[arch]
    model = reference_backbone(arch).eval()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for step, expected in enumerate(curve['loss']):
        outs = model(rule_image(curve['seed0'] + step, curve['shape']))
        loss = sum((out - 0.1 * i).square().mean() for i, out in enumerate(outs))
        assert loss.item() == pytest.approx(expected, rel=1e-3), f'step {step}'
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
