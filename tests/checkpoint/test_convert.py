"""Weights arrive whole, in any format, loaded in any way, or are refused in a sentence."""

import copy

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from reference import ARCHS, SMALL, V1, load_json, official_weights, small
from torch import nn

from pvt_mm import PVT, CheckpointMismatchError, PVTv2, convert_checkpoint
from pvt_mm.checkpoint.atoms import recognise_arch, to_atoms
from pvt_mm.checkpoint.convert import bare_backbone
from pvt_mm.checkpoint.find import unwrap
from pvt_mm.checkpoint.key_maps import detect_format

KEYS = load_json('checkpoint_keys.json')
FORMATS = ('official', 'timm', 'huggingface', 'mmdet', 'pvt_mm')
IMAGE = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))


class Detector(nn.Module):
    """A stand-in for mmdet's detectors: a backbone under its usual name, and a head."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(4, 4)


def random_weights(arch, fmt='official'):
    generator = torch.Generator().manual_seed(3)
    return {k: torch.randn(s, generator=generator) for k, s in KEYS[arch][fmt].items()}


def expressible(arch, fmt):
    return not (fmt == 'timm' and arch in V1) and not (fmt == 'mmdet' and arch == 'b2_li')


def features(model):
    with torch.no_grad():
        return model.eval()(IMAGE)


# Conversion


@pytest.mark.parametrize(('arch', 'fmt'), [(a, f) for a in KEYS for f in KEYS[a]])
def test_written_keys_and_shapes_are_the_published_ones(arch, fmt):
    """Converted official weights have exactly the names and shapes of that format's files."""
    converted = convert_checkpoint(random_weights(arch), to=fmt, arch=arch)
    assert {k: list(v.shape) for k, v in converted.items()} == KEYS[arch][fmt]


@pytest.mark.parametrize('arch', ARCHS)
def test_there_and_back_is_bit_for_bit(arch):
    """Every pair of formats returns the same backbone tensors; all but one keep the classifier."""
    weights = random_weights(arch)
    plain = bare_backbone(weights)
    for fmt in FORMATS:
        if not expressible(arch, fmt):
            continue
        there = convert_checkpoint(weights, to=fmt)
        for other in FORMATS:
            if not expressible(arch, other):
                continue
            back = bare_backbone(convert_checkpoint(there, to=other))
            assert back.keys() == plain.keys()
            assert all(torch.equal(back[key], plain[key]) for key in plain), (fmt, other)
        if fmt != 'mmdet':
            back = convert_checkpoint(there, to='official')
            assert back.keys() == weights.keys()
            assert all(torch.equal(back[key], weights[key]) for key in weights), fmt


@pytest.mark.parametrize('arch', ARCHS)
def test_arch_is_recognised_in_every_format(arch):
    """Depths and widths name the arch, whatever the format."""
    for fmt in FORMATS:
        if expressible(arch, fmt):
            converted = convert_checkpoint(random_weights(arch), to=fmt)
            found = detect_format(list(converted))
            assert found.name == fmt
            assert recognise_arch(to_atoms(converted, found)).name == arch


def test_what_cannot_be_converted_is_refused():
    """Unknown formats, archs, inexpressible weights and foreign weights are each named."""
    tiny, linear = random_weights('tiny'), random_weights('b2_li')
    with pytest.raises(ValueError, match="no format 'keras'; choose one of pvt_mm, official"):
        convert_checkpoint(tiny, to='keras')
    with pytest.raises(ValueError, match='timm has only PVTv2'):
        convert_checkpoint(tiny, to='timm')
    with pytest.raises(ValueError, match='no linear attention'):
        convert_checkpoint(linear, to='mmdet')
    with pytest.raises(CheckpointMismatchError, match="PVT tiny .* not of 'small'"):
        convert_checkpoint(tiny, arch='small')
    with pytest.raises(CheckpointMismatchError, match='no PVT backbone'):
        convert_checkpoint({'conv1.weight': torch.zeros(1)})


def test_a_whole_detector_keeps_its_other_parts():
    """Only what stands under backbone. is renamed."""
    weights = {f'backbone.{k}': v for k, v in official_weights('b0').items()}
    head = {'bbox_head.weight': torch.ones(2)}
    converted = convert_checkpoint({'state_dict': weights | head}, to='mmdet')
    assert torch.equal(converted['bbox_head.weight'], torch.ones(2))
    assert 'backbone.layers.0.0.projection.weight' in converted


def test_unwrap_finds_the_weights_in_any_wrapper():
    """state_dict, model, state_dict_ema and module. prefixes are taken off; EMA weights win."""
    tensor, other = torch.ones(1), torch.zeros(1)
    for checkpoint in (
        {'a': tensor},
        {'model': {'module.a': tensor}},
        {'state_dict': {'a': tensor}, 'meta': {}},
        {'state_dict_ema': {'a': tensor}, 'state_dict': {'a': other}},
        {
            'x': {
                'y': {'_orig_mod.a': tensor},
                'optimizer': {'state': {0: {'a': other, 'b': other}}},
            }
        },
        {'model': {}, 'net': {'a': tensor}},
    ):
        assert unwrap(checkpoint) == {'a': tensor}
    endless = {}
    endless['model'] = endless
    assert unwrap(endless) == endless, 'a pickle may hold itself'


# Ways to load


def as_state_dict(model, weights, path):
    model.load_state_dict(weights)


def as_pretrained(model, weights, path):
    torch.save({'model': weights}, path)
    model.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model.init_weights()


def as_checkpoint_file(model, weights, path):
    torch.save({'state_dict': weights}, path)
    load_checkpoint(model, str(path), strict=True)


def inside_detector(model, weights, path):
    whole = {f'backbone.{k}': v for k, v in weights.items()} | {'head.bias': torch.ones(4)}
    torch.save(whole, path)
    detector = Detector(model)
    load_checkpoint(detector, str(path))
    assert (detector.head.bias == 1).all()


def detector_into_backbone(model, weights, path):
    whole = {f'backbone.{k}': v for k, v in weights.items()} | {'bbox_head.x': torch.ones(1)}
    model.load_state_dict(whole)


WAYS = (
    as_state_dict, as_pretrained, as_checkpoint_file, inside_detector, detector_into_backbone
)  # fmt: skip


@pytest.mark.parametrize('way', WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(
    ('arch', 'fmt'), [(a, f) for a in ('tiny', 'b0', 'b2_li') for f in FORMATS if expressible(a, f)]
)
def test_every_format_arrives_in_every_way(arch, fmt, way, tmp_path):
    """All tensors arrive, and the features are those of the official format."""
    weights = official_weights(arch, classification=True)
    cls = PVT if arch in V1 else PVTv2
    expected = cls(arch)
    expected.load_state_dict(weights)
    model = cls(arch)
    way(model, convert_checkpoint(weights, to=fmt), tmp_path / 'weights.pth')
    for out, other in zip(features(model), features(expected)):
        torch.testing.assert_close(out, other, rtol=0, atol=1e-6)


def test_the_log_says_what_was_loaded_and_dropped(caplog):
    """One line: N of N tensors, arch and format, and what classification alone has."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        PVT('tiny').load_state_dict(official_weights('tiny', classification=True))
    finally:
        logger.removeHandler(caplog.handler)
    (line,) = [record.getMessage() for record in caplog.records]
    assert '156 of 156 backbone tensors from weights of tiny in official format' in line
    assert 'class slot of the position embedding, cls_token, final norm, head' in line


def test_hook_prefixes_bare_weights_for_load_from():
    """Published ImageNet weights given to a whole model reach its backbone."""
    hook = HOOKS.build(dict(type='PVTCheckpointHook'))
    detector = Detector(PVTv2('b0'))
    runner = type('Runner', (), {'model': detector})()
    checkpoint = {'model': official_weights('b0', classification=True), 'meta': {'config': 'x'}}
    hook.after_load_checkpoint(runner, checkpoint)
    _load_checkpoint_to_model(detector, checkpoint)
    weight = detector.backbone.stages[0].patch_embed.proj.weight
    assert torch.equal(weight, official_weights('b0')['patch_embed1.proj.weight'])
    assert 'config' not in checkpoint['meta'], 'mmengine would run it as Python'


def test_hook_leaves_whole_models_and_foreign_weights_alone():
    """A detector's own checkpoint passes through; so do weights without any PVT in them."""
    hook = HOOKS.build(dict(type='PVTCheckpointHook'))
    detector = Detector(small('v2'))
    runner = type('Runner', (), {'model': detector})()
    for weights in (detector.state_dict(), {'conv1.weight': torch.ones(1)}):
        checkpoint = {'state_dict': dict(weights)}
        hook.after_load_checkpoint(runner, checkpoint)
        assert checkpoint['state_dict'].keys() == weights.keys()


# Other sizes, other stages


def test_positions_of_another_pretraining_size_are_resized():
    """Weights of 224 in a model of 256 give what the model of 224 gives on a 256 image."""
    at_224, at_256 = PVT('tiny'), PVT('tiny', pretrain_img_size=256)
    at_224.load_state_dict(official_weights('tiny'))
    at_256.load_state_dict(official_weights('tiny'))
    image = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        for out, other in zip(at_224.eval()(image), at_256.eval()(image)):
            torch.testing.assert_close(out, other, rtol=0, atol=1e-5)


def test_positions_of_a_rectangle_keep_their_aspect():
    """A flat embedding that is no square takes the model's aspect; without one it is refused."""
    model = PVT(SMALL, pretrain_img_size=(64, 128))
    flat = {k: v.flatten(1, 2) if v.ndim == 4 and 'pos' in k else v for k, v in
            convert_checkpoint(model.state_dict(), to='pvt_mm').items()}  # fmt: skip
    other = PVT(SMALL, pretrain_img_size=(64, 128))
    other.load_state_dict(flat)
    assert torch.equal(other.stages[0].pos_embed, model.stages[0].pos_embed)
    with pytest.raises(CheckpointMismatchError, match='no square'):
        PVT(SMALL, pretrain_img_size=(64, 96)).load_state_dict(flat)


def test_fewer_stages_take_their_part_of_whole_weights():
    """Stages that out_indices leaves out are dropped from the weights."""
    model = PVT('tiny', out_indices=(0, 1))
    weights = official_weights('tiny')
    model.load_state_dict(weights)
    second = model.stages[1].patch_embed.proj.weight
    assert torch.equal(second, weights['patch_embed2.proj.weight'])


# What does not fit


def without(weights, part):
    return {key: value for key, value in weights.items() if part not in key}


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize(
    ('weights', 'message'),
    [
        (lambda: official_weights('small'), r'PVT tiny \(.*they hold PVT small \(.*156 of 156'),
        (lambda: official_weights('b0'), 'they hold PVTv2 b0 .* tensors fit; .*stages.0'),
        (lambda: without(official_weights('tiny'), 'fc1'), '140 of 156.*fc1.weight is missing'),
        (lambda: {'conv1.weight': torch.ones(1)}, 'they hold no PVT backbone, and 0 of 156'),
        (dict, 'no PVT backbone'),
    ],
    ids=['deeper', 'other version', 'missing', 'foreign', 'empty'],
)
def test_weights_that_do_not_fit_are_refused(weights, message, strict):
    """Strict or not, the error names both archs, how many fit, and the first that do not."""
    with pytest.raises(CheckpointMismatchError, match=message):
        PVT('tiny').load_state_dict(weights(), strict=strict)
    with pytest.raises(CheckpointMismatchError):
        _load_checkpoint_to_model(PVT('tiny'), {'state_dict': weights()}, strict=strict)


def test_a_model_with_nothing_for_its_backbone_is_refused():
    """Weights of a head alone do not pass for a detector's, even when not strict."""
    detector = Detector(small('v1'))
    with pytest.raises(CheckpointMismatchError, match='no PVT backbone'):
        detector.load_state_dict({'head.bias': torch.ones(4)}, strict=False)


def test_a_refused_load_changes_nothing():
    """The backbone keeps the weights that it had."""
    model = small('v1')
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointMismatchError):
        model.load_state_dict(official_weights('tiny'))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_unknown_keys_are_reported_by_a_strict_load():
    """A key that no format knows is not swallowed."""
    weights = small('v2').state_dict() | {'stages.0.extra': torch.ones(1)}
    with pytest.raises(RuntimeError, match='Unexpected key.*stages.0.extra'):
        small('v2').load_state_dict(weights)


def test_allow_partial_takes_what_fits():
    """Tensors that fit are taken, the others keep their values, nothing raises."""
    weights = official_weights('tiny')
    for part in (without(weights, 'fc1'), official_weights('small'), {'other.weight': weights}):
        model = PVT('tiny', allow_partial=True)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict({k: v for k, v in part.items() if k != 'other.weight'})
        after = model.state_dict()
        plain = convert_checkpoint(part) if 'other.weight' not in part else {}
        for key, value in after.items():
            assert torch.equal(value, plain.get(key, before[key])), key
    detector = Detector(small('v1', allow_partial=True))
    detector.load_state_dict({'head.bias': torch.ones(4)}, strict=False)
    assert (detector.head.bias == 1).all()


@pytest.mark.parametrize(
    ('mode', 'channels'), [('sum', 1), ('sum', 2), ('sum', 6), ('repeat', 6), ('repeat', 9)]
)
def test_first_convolution_adapts_to_other_channels(mode, channels):
    """Features of a gray image are the same as with three channels; other tensors are untouched."""
    rgb = small('v2').eval()
    other = small('v2', in_channels=channels, adapt_in_channels=mode).eval()
    other.load_state_dict(rgb.state_dict())
    gray = IMAGE[:, :1]
    with torch.no_grad():
        outs = zip(rgb(gray.expand(-1, 3, -1, -1)), other(gray.expand(-1, channels, -1, -1)))
    for out, expected in outs:
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)


def test_repeated_channels_keep_their_order_and_size():
    """Four channels are red, green, blue, red at three quarters of their weights."""
    rgb = small('v2').state_dict()
    model = small('v2', in_channels=4, adapt_in_channels='repeat')
    model.load_state_dict(rgb)
    expected = rgb['stages.0.patch_embed.proj.weight'][:, [0, 1, 2, 0]] * 0.75
    assert torch.equal(model.stages[0].patch_embed.proj.weight, expected)


def test_other_channels_are_refused_with_the_way_out():
    """Without the argument, the error names it; a mode that does not exist is refused as well."""
    with pytest.raises(CheckpointMismatchError, match="adapt_in_channels='sum' or 'repeat'"):
        small('v2', in_channels=4).load_state_dict(small('v2').state_dict())
    with pytest.raises(ValueError, match="no adapt_in_channels='mean'"):
        small('v2', adapt_in_channels='mean')
