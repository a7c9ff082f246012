"""PVT's class token, the head, and the ImageNet recipes; mmpretrain is not needed for these."""

import copy
import functools
import importlib.util
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from recipes import CLASSIFIERS, PUBLISHED, load, parts_of
from reference import (
    REPO,
    SMALL,
    V1,
    backbone_class,
    load_from,
    load_json,
    official_weights,
    rule_image,
)
from torch import nn

from pvt_mm import PVT, CheckpointMismatchError, PVTv2, convert_checkpoint
from pvt_mm.models.classification import PVTHead

OFFICIAL = load_json('official_classification.json')
RECIPE = OFFICIAL['recipe']


class Classifier(nn.Module):
    """A stand-in for mmpretrain's ImageClassifier: the same parts under the same names."""

    def __init__(self, backbone, num_classes=1000):
        super().__init__()
        self.backbone = backbone
        self.head = PVTHead(num_classes, backbone.out_channels[-1])

    def forward(self, image):
        return self.head(self.backbone(image))


def classifier(arch, **kwargs):
    options = dict(with_cls_token=True) if arch in V1 else {}
    return Classifier(backbone_class(arch)(arch, out_indices=(3,), **options), **kwargs).eval()


def random_weights(arch):
    """Weights of the rule, the classifier's drawn too."""
    generator = torch.Generator().manual_seed(11)
    weights = official_weights(arch, classification=True)
    for key in weights:
        if key.startswith(('head.', 'norm.')) or key == 'cls_token':
            weights[key] = torch.randn(weights[key].shape, generator=generator)
    return weights


# The published top-1 path


@torch.no_grad()
@pytest.mark.parametrize('arch', ['tiny', 'b0', 'b2_li'])
def test_logits_equal_hugging_face(arch):
    """Class token, its position, final norm and head of a published checkpoint all count."""
    huggingface = pytest.importorskip('huggingface', reason='needs transformers')
    theirs = huggingface.build(arch, classifier=True)
    ours = classifier(arch)
    load_from(ours, theirs.state_dict())
    image = rule_image(5, (2, 3, 224, 224))
    expected = theirs(image).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(image), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('arch', ['tiny', 'b0'])
def test_official_weights_load_whole(arch):
    """Not a tensor of an official file is left over, and none of the model keeps its own."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    model, weights = classifier(arch), random_weights(arch)
    try:
        load_from(model, weights)
    finally:
        logger.removeHandler(handler)
    assert any('in official format; dropped nothing.' in line for line in lines)
    back = convert_checkpoint(model.backbone.state_dict(), to='official')
    back |= {f'head.{key}': value for key, value in model.head.state_dict().items()}
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], value) for key, value in weights.items())


def test_a_head_of_other_classes_is_left_alone(capsys):
    """Fine-tuning: the backbone arrives whole, the head keeps its draw, and a warning says so."""
    model, weights = classifier('b0', num_classes=7), random_weights('b0')
    before = model.head.weight.detach().clone()
    load_from(model, weights, strict=False)
    assert torch.equal(model.head.weight, before)
    back = convert_checkpoint(model.backbone.state_dict(), to='official')
    assert all(torch.equal(value, weights[key]) for key, value in back.items())
    assert 'size mismatch for head.weight' in capsys.readouterr().out


def test_a_trained_classifier_reaches_a_detector():
    """Its backbone loads into a plain PVT, and its own format has everything."""
    model = classifier('tiny')
    load_from(model, random_weights('tiny'))
    plain = PVT('tiny')
    plain.load_state_dict(model.state_dict())
    weight = model.backbone.stages[3].pos_embed
    assert torch.equal(plain.stages[3].pos_embed, weight)
    written = convert_checkpoint(random_weights('tiny'), to='pvt_mm')
    again = classifier('tiny')
    load_from(again, written)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def test_weights_without_a_class_token_are_refused():
    """A detector's backbone is no classifier; the error names what is missing."""
    model = PVT('tiny', out_indices=(3,), with_cls_token=True)
    weights = convert_checkpoint(official_weights('tiny'), to='mmdet')
    with pytest.raises(CheckpointMismatchError, match='156 of 160 .*cls_token is missing'):
        model.load_state_dict(weights)


def test_the_head_takes_its_part_of_a_file():
    """load_published finds it in every format; a file without a classifier is an error."""
    weights, head = random_weights('b0'), PVTHead(1000, 256)
    for fmt in ('official', 'timm', 'huggingface', 'pvt_mm'):
        head.init_weights()
        head.load_published({'model': convert_checkpoint(weights, to=fmt)})
        assert torch.equal(head.weight, weights['head.weight'])
        assert torch.equal(head.bias, weights['head.bias'])
    with pytest.raises(RuntimeError, match='Missing key'):
        head.load_published(official_weights('b0'))


# The class token


def last_stage(model, tokens):
    """The last stage by the formulas of the paper, on (B, H*W, C) of a 2 x 3 grid of patches."""
    stage = model.stages[3]
    position = stage.pos_embed.permute(0, 3, 1, 2)
    position = F.interpolate(position, (2, 3), mode='bilinear').flatten(2).transpose(1, 2)
    token = (stage.cls_token + stage.cls_position).expand(len(tokens), -1, -1)
    x = torch.cat([token, tokens + position], 1)
    for block in stage.blocks:
        y = block.norm1(x)
        q, k, v = block.attn.q(y), *block.attn.kv(y).chunk(2, -1)
        q, k, v = (t.unflatten(2, (block.attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + block.attn.proj((scores @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    return stage.final_norm(x)[:, 0]


@torch.no_grad()
def test_class_token_on_another_image_size():
    """The map's positions are resized, the class token's is not; other outputs stay maps."""
    model = PVT(SMALL, out_indices=(2, 3), with_cls_token=True).eval()
    for parameter in model.stages[3].parameters():
        parameter.normal_(std=0.3)
    third, out = model(rule_image(3, (2, 3, 64, 96)))
    assert (third.shape, out.shape) == ((2, 40, 4, 6), (2, 64))
    tokens = model.stages[3].patch_embed(third.permute(0, 2, 3, 1)).flatten(1, 2)
    torch.testing.assert_close(out, last_stage(model, tokens), rtol=0, atol=1e-5)
    assert model.stages[3].final_norm.eps == 1e-6


def test_plain_backbones_pay_nothing():
    """Without a class token: the same keys, and no class of it in the model."""
    plain = PVT(SMALL)
    keys = set(PVT(SMALL, with_cls_token=True).state_dict()) - set(plain.state_dict())
    names = ('cls_token', 'cls_position', 'final_norm.weight', 'final_norm.bias')
    assert keys == {f'stages.3.{name}' for name in names}
    assert {type(stage).__name__ for stage in plain.stages} == {'Stage'}


@pytest.mark.parametrize('with_cp', [False, True])
def test_every_parameter_learns(with_cp):
    """Gradients reach the token, its position and the head, recomputed or not."""
    model = Classifier(PVT(SMALL, out_indices=(3,), with_cls_token=True, with_cp=with_cp), 5)
    F.cross_entropy(model(rule_image(1, (2, 3, 64, 64))), torch.tensor([0, 3])).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_init_weights_draws_the_token():
    """It is not left at zero, and not the same twice."""
    stage = PVT(SMALL, with_cls_token=True).stages[3]
    drawn = stage.cls_token.detach().clone()
    stage.init_position()
    assert 0.01 < stage.cls_token.std() < 0.03 and not torch.equal(stage.cls_token, drawn)
    assert 0.01 < stage.cls_position.std() < 0.03


def test_what_has_no_class_token_is_refused():
    with pytest.raises(ValueError, match=r'needs the last stage, but out_indices=\(0, 1\)'):
        PVT('tiny', out_indices=(0, 1), with_cls_token=True)
    with pytest.raises(ValueError, match='needs a last sr_ratio of 1, not 2'):
        PVT({**SMALL, 'sr_ratios': (8, 4, 2, 2)}, with_cls_token=True)


# The head


class Sample(dict):
    """A data sample with the few methods of mmpretrain's that the head uses."""

    gt_score = property(lambda self: self['gt_score'])
    gt_label = property(lambda self: self['gt_label'])

    def set_pred_score(self, value):
        self['score'] = value
        return self

    def set_pred_label(self, value):
        self['label'] = value
        return self


def test_the_head_averages_maps_and_takes_vectors():
    head = PVTHead(3, 8)
    features = torch.randn(2, 8, 4, 5)
    expected = features.flatten(2).mean(2) @ head.weight.T + head.bias
    torch.testing.assert_close(head((None, features)), expected)
    torch.testing.assert_close(head((features[:, :, 0, 0],)), head((features[:, :, :1, :1],)))
    assert head.pre_logits((features,)).shape == (2, 8)


def test_loss_smooths_labels_and_mixed_labels():
    """Cross entropy with 0.1 spread over 4 classes, of whole labels and of shares."""
    head = PVTHead(4, 8, label_smoothing=0.1)
    features = (torch.randn(2, 8),)
    logs = head(features).log_softmax(1)
    whole = [Sample(gt_label=torch.tensor([1])), Sample(gt_label=torch.tensor([2]))]
    target = F.one_hot(torch.tensor([1, 2]), 4) * 0.9 + 0.025
    torch.testing.assert_close(head.loss(features, whole)['loss'], -(target * logs).sum(1).mean())
    shares = torch.tensor([[0.3, 0.7, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    mixed = [Sample(gt_score=share) for share in shares]
    expected = -((shares * 0.9 + 0.025) * logs).sum(1).mean()
    torch.testing.assert_close(head.loss(features, mixed)['loss'], expected)


def test_predictions_are_written_into_the_samples():
    head, features = PVTHead(4, 8), (torch.randn(2, 8),)
    samples = [Sample(), Sample()]
    assert head.predict(features, samples) == samples
    torch.testing.assert_close(samples[1]['score'], head(features).softmax(1)[1])
    assert samples[1]['label'] == head(features)[1].argmax()


# The recipes


def test_there_is_a_recipe_for_every_arch():
    archs = {parts_of(name)[2] for name in CLASSIFIERS}
    assert archs == {*PVT.ARCHS, *PVTv2.ARCHS} and len(CLASSIFIERS) == len(archs)


@functools.cache
def built(name):
    cfg = load(name)
    with torch.device('meta'):
        return Classifier(MODELS.build(copy.deepcopy(cfg.model.backbone))), cfg


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_recipe_builds_the_published_model(name):
    """From random weights, as large as published, with the reference's drop path and clipping."""
    _, kind, arch = parts_of(name)
    model, cfg = built(name)
    backbone = cfg.model.backbone
    assert (backbone.type, backbone.arch, backbone.init_cfg) == (kind, arch, None)
    assert backbone.get('with_cls_token', False) is (kind == 'PVT')
    assert backbone.drop_path_rate == OFFICIAL['drop_path_rate'][arch]
    clip = cfg.optim_wrapper.get('clip_grad')
    assert (clip and clip.max_norm) == OFFICIAL['clip_grad'][arch]
    assert cfg.model.head.in_channels == model.backbone.out_channels[-1]
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED['params_millions'][arch], abs=0.06)
    with torch.device('meta'):
        assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_recipe_is_the_references():
    """Optimiser, schedule, augmentation and image sizes of its classification code."""
    cfg = load('pvt_s_8xb128_in1k.py')
    loader, pipeline = cfg.train_dataloader, cfg.train_dataloader.dataset.pipeline
    assert loader.batch_size == RECIPE['batch_size']
    total = RECIPE['batch_size'] * RECIPE['gpus']
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=total)
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.type.lower() == RECIPE['optimizer']
    assert optimizer.lr == RECIPE['lr_for_512'] * total / 512
    assert optimizer.weight_decay == RECIPE['weight_decay']
    assert (cfg.optim_wrapper.type == 'AmpOptimWrapper') is RECIPE['mixed_precision']
    assert cfg.train_cfg.max_epochs == RECIPE['epochs']
    warmup, cosine = cfg.param_scheduler
    assert (warmup.type, warmup.end) == ('LinearLR', RECIPE['warmup_epochs'])
    assert warmup.start_factor * optimizer.lr == pytest.approx(RECIPE['warmup_lr'])
    assert (cosine.type, cosine.end) == ('CosineAnnealingLR', RECIPE['epochs'])
    assert cosine.begin == warmup.end and cosine.T_max == cosine.end - cosine.begin
    assert cosine.eta_min == RECIPE['min_lr']
    assert loader.sampler.type == 'RepeatAugSampler'
    assert loader.sampler.num_repeats == RECIPE['repeated_augmentation']
    crop, _, augment, erase = pipeline[1:5]
    assert (crop.scale, crop.interpolation) == (RECIPE['image_size'], RECIPE['interpolation'])
    magnitude = f'rand-m{augment.magnitude_level}-mstd{augment.magnitude_std}-inc1'
    assert magnitude == RECIPE['rand_augment'] and augment.policies == 'timm_increasing'
    assert (augment.num_policies, augment.total_level) == (2, 10)
    assert (erase.erase_prob, erase.mode) == (RECIPE['random_erasing'], 'rand')
    mixup, cutmix = cfg.model.train_cfg.augments
    assert (mixup.alpha, cutmix.alpha) == (RECIPE['mixup'], RECIPE['cutmix'])
    assert 'probs' not in cfg.model.train_cfg, 'each half of the time'
    assert cfg.model.head.label_smoothing == RECIPE['label_smoothing']
    resize, center = cfg.test_dataloader.dataset.pipeline[1:3]
    assert (resize.scale, resize.edge) == (RECIPE['test_resize'], 'short')
    assert (center.crop_size, resize.interpolation) == (224, RECIPE['interpolation'])


def test_what_decays_in_the_recipe():
    """As in the reference: no norm, no bias, not the class token; position embeddings do."""
    model, cfg = built('pvt_s_8xb128_in1k.py')
    init_default_scope('mmengine')
    wrapper = copy.deepcopy(cfg.optim_wrapper)
    wrapper.update(type='OptimWrapper')  # mixed precision asks for a GPU
    wrapper.pop('loss_scale')
    optimizer = build_optim_wrapper(model, wrapper).optimizer
    decays = {p: group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    for name, parameter in model.named_parameters():
        free = parameter.ndim == 1 or name.endswith('.cls_token')
        assert decays[parameter] == (0.0 if free else 0.05), name


@pytest.mark.skipif(importlib.util.find_spec('mmpretrain') is not None, reason='it is there')
@pytest.mark.parametrize('tool', ['train', 'test'])
def test_without_mmpretrain_the_tools_say_so(tool, run_tool, tmp_path, capsys):
    """One sentence with the command that installs it."""
    (tmp_path / 'w.pth').write_bytes(b'x')
    config = REPO / 'configs' / 'pvt_s_8xb128_in1k.py'
    with pytest.raises(SystemExit) as stopped:
        run_tool(tool, config, *([tmp_path / 'w.pth'] if tool == 'test' else []))
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("needs mmpretrain and torchvision: pip install 'pvt-mm[classification]'.")
