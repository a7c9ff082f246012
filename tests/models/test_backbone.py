"""PVT and PVTv2 as modules: shapes, arguments, training, tracing, and errors for bad input."""

import copy
import io
import lzma
import pickle

import pytest
import torch
from mmengine.registry import MODELS
from reference import ARCHS, DATA, SMALL, VARIANTS, backbone_class, load_json, small
from torch import nn

import pvt_mm
from pvt_mm import PVT, PVTv2
from pvt_mm.models.context import is_autocast

IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
every_variant = pytest.mark.parametrize('variant', VARIANTS)


def outputs(model, image=IMAGE):
    with torch.no_grad():
        return model(image)


def assert_equal(outs, others, tolerance=0.0):
    assert len(outs) == len(others)
    for out, other in zip(outs, others):
        torch.testing.assert_close(out, other, rtol=0, atol=tolerance)


# Building


@pytest.mark.parametrize('arch', ARCHS)
def test_parameters_are_the_published_ones(arch):
    """Parameters are the published count less what only classification has."""
    with torch.device('meta'):
        model = backbone_class(arch)(arch)
    count = sum(p.numel() for p in model.parameters())
    dim = model.out_channels[-1]
    classifier = 1000 * dim + 1000
    # v1 also has a final norm, a class token and the token's position.
    only_classification = classifier if arch in PVTv2.ARCHS else classifier + 4 * dim
    published = load_json('published.json')['params_millions'][arch]
    assert (count + only_classification) / 1e6 == pytest.approx(published, abs=0.051)


def test_registered_in_root_for_every_codebase():
    """The scopes mmdet and mmseg find the same classes, and the defaults are PVT-S and PVTv2-B2."""
    for scope in ('mmengine', 'mmdet', 'mmseg'):
        with torch.device('meta'):
            v1 = MODELS.build(dict(type='PVT', _scope_=scope))
            v2 = MODELS.build(dict(type='PVTv2', arch='b2', _scope_=scope))
        assert isinstance(v1, PVT) and isinstance(v2, PVTv2)
        assert [len(stage.blocks) for stage in v1.stages] == [3, 4, 6, 3]
    assert pvt_mm.__version__


@every_variant
def test_builds_on_the_meta_device_and_initialises_later(variant):
    """A backbone built without memory gets the reference's initialisation from init_weights."""
    cls, arguments = VARIANTS[variant]
    with torch.device('meta'):
        model = cls(**arguments)
    model.to_empty(device='cpu')
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    model.init_weights()
    check_initialisation(model)


@every_variant
def test_initialised_as_the_reference(variant):
    """Linears and positions are normal of 0.02, norms 1 and 0, v2's convolutions by fan-out."""
    check_initialisation(small(variant))


def check_initialisation(model):
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.25), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
        elif isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0] ** 2
            if isinstance(model, PVTv2):
                std = (2 / (kernel * module.out_channels / module.groups)) ** 0.5
                assert not module.bias.any(), name
            else:  # PyTorch's own: uniform up to 1 / sqrt(fan-in)
                std = (3 * kernel * module.in_channels) ** -0.5
            assert module.weight.std().item() == pytest.approx(std, rel=0.25), name
    for stage in model.stages:
        if stage.pos_embed is not None:
            assert stage.pos_embed.std().item() == pytest.approx(0.02, rel=0.25)


def test_layer_norm_eps_is_mixed_as_in_the_reference():
    """1e-6 in blocks and v2's stage norm, 1e-5 in patch embeddings and attention."""
    for variant in VARIANTS:
        for name, module in small(variant).named_modules():
            if isinstance(module, nn.LayerNorm):
                inner = name.endswith(('patch_embed.norm', 'attn.norm'))
                assert module.eps == (1e-5 if inner else 1e-6), name


def test_drop_path_rises_over_all_blocks_built_or_not():
    """Rates rise linearly to the last block, and do not depend on out_indices."""
    rates = [b.drop_path.rate for s in small('v1', drop_path_rate=0.4).stages for b in s.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    fewer = small('v1', drop_path_rate=0.4, out_indices=(0, 1))
    assert [b.drop_path.rate for s in fewer.stages for b in s.blocks] == rates[:3]


# Shapes


@every_variant
@pytest.mark.parametrize('size', [(64, 64), (65, 97), (96, 160), (90, 33), (448, 448), (224, 896)])
def test_any_size_gives_the_documented_shapes(variant, size):
    """Rectangles, sizes that 32 does not divide, and those where the reference crashes."""
    model = small(variant).eval()
    outs = outputs(model, torch.randn(1, 3, *size))
    height, width = size
    for stride, dim, out in zip((4, 2, 2, 2), SMALL['dims'], outs):
        if variant.startswith('v1'):
            height, width = height // stride, width // stride
        else:
            height, width = -(-height // stride), -(-width // stride)
        assert out.shape == (1, dim, height, width)
        assert out.is_contiguous() and out.isfinite().all()


@pytest.mark.parametrize(
    ('variant', 'smallest'), [('v1', 32), ('v1_max', 32), ('v2', 29), ('v2_li', 1)]
)
def test_smallest_size_works_and_one_less_is_refused(variant, smallest):
    """min_size is exact: it works, and a pixel less raises a sentence with both sizes."""
    model = small(variant).eval()
    assert model.min_size == smallest
    assert all(
        out.isfinite().all() for out in outputs(model, torch.randn(1, 3, smallest, smallest))
    )
    if smallest > 1:
        with pytest.raises(
            ValueError, match=f'at least {smallest} x {smallest}.*got {smallest - 1} x 64'
        ):
            model(torch.randn(1, 3, smallest - 1, 64))


@every_variant
def test_out_indices_choose_stages_and_later_ones_are_not_built(variant):
    """A chosen stage has the same values as in the full model."""
    full = small(variant).eval()
    some = small(variant, out_indices=(1, 2)).eval()
    assert len(some.stages) == 3 and some.out_channels == SMALL['dims'][1:3]
    some.load_state_dict({k: v for k, v in full.state_dict().items() if 'stages.3' not in k})
    assert_equal(outputs(some), outputs(full)[1:3])


def test_in_channels():
    """Another number of input channels builds and runs."""
    assert outputs(small('v2', in_channels=6), torch.randn(1, 6, 64, 64))[0].shape[1] == 16


@every_variant
def test_channels_last_input_gives_the_same(variant):
    """The memory format of the image changes nothing."""
    model = small(variant).eval()
    image = IMAGE.contiguous(memory_format=torch.channels_last)
    outs = outputs(model, image)
    assert all(out.is_contiguous() for out in outs)
    assert_equal(outs, outputs(model), 1e-5)


@every_variant
def test_an_image_does_not_depend_on_its_batch(variant):
    """Evaluation of a batch equals its images one by one."""
    model = small(variant).eval()
    singles = [outputs(model, image[None]) for image in IMAGE]
    assert_equal(outputs(model), [torch.cat(stage) for stage in zip(*singles)], 1e-5)


# Training


@every_variant
@pytest.mark.parametrize('with_cp', [False, True])
def test_every_parameter_gets_a_gradient(variant, with_cp):
    """No parameter is left out of the graph, recomputed or not."""
    model = small(variant, with_cp=with_cp, drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1)
    sum(out.square().mean() for out in model(IMAGE)).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@every_variant
def test_recomputation_changes_no_number(variant):
    """with_cp gives the same features and gradients, with dropout drawn the same."""
    results = []
    for with_cp in (False, True):
        model = small(variant, with_cp=with_cp, drop_rate=0.1, drop_path_rate=0.3).train()
        torch.manual_seed(5)
        outs = model(IMAGE)
        sum(out.square().mean() for out in outs).backward()
        results.append([*outs, *(p.grad for p in model.parameters())])
    assert_equal(*results)


def test_drop_path_zeroes_whole_samples_and_keeps_the_mean():
    """A dropped branch is zero for a sample, scaled by 1 / keep for others, and off in eval."""
    drop = pvt_mm.layers.DropPath(0.25).train()
    torch.manual_seed(0)
    out = drop(torch.ones(4000, 2, 3))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (out == out[:, :1, :1]).all()
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert (drop.eval()(torch.ones(5, 2)) == 1).all()


@pytest.mark.parametrize('rate', ['drop_rate', 'attn_drop_rate', 'drop_path_rate'])
def test_dropout_acts_in_training_only(rate):
    """Each rate makes training random and leaves evaluation alone."""
    model = small('v1', **{rate: 0.5})
    torch.manual_seed(0)
    first, second = outputs(model.train()), outputs(model)
    assert not torch.equal(first[-1], second[-1])
    assert_equal(outputs(model.eval()), outputs(small('v1').eval()))


@every_variant
@pytest.mark.parametrize('frozen', [-1, 0, 1, 3, 4])
def test_frozen_stages_stay_whole_through_training(variant, frozen):
    """The first k stages have no gradient and stay in evaluation; the others train."""
    model = small(variant, frozen_stages=frozen, drop_path_rate=0.5).train()
    for i, stage in enumerate(model.stages):
        is_frozen = i < max(frozen, 0)
        assert all(module.training != is_frozen for module in stage.modules())
        assert all(p.requires_grad != is_frozen for p in stage.parameters())
    if frozen == 4:
        return
    sum(out.sum() for out in model(IMAGE)).backward()
    for i, stage in enumerate(model.stages):
        assert all((p.grad is None) == (i < frozen) for p in stage.parameters())


# Living in a program


@every_variant
def test_copies_pickles_and_state_dicts_are_the_same_model(variant):
    """deepcopy, pickle and a state dict carry everything."""
    model = small(variant).eval()
    expected = outputs(model)
    assert_equal(outputs(copy.deepcopy(model)), expected)
    assert_equal(outputs(pickle.loads(pickle.dumps(model))), expected)
    cls, arguments = VARIANTS[variant]
    other = cls(**arguments).eval()
    other.load_state_dict(model.state_dict())
    assert_equal(outputs(other), expected)


@pytest.mark.parametrize('variant', ['v1', 'v1_avg', 'v2', 'v2_linear'])
def test_whole_model_pickles_of_0_1_0_load(variant):
    """They name classes by modules that have moved; their dropout rates, too, are modules now."""
    content = lzma.decompress((DATA / 'models_0_1_0.pt.xz').read_bytes())
    stored = torch.load(io.BytesIO(content), weights_only=False)
    model = stored['models'][variant]
    rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    assert rates == ({0.1} if variant == 'v1' else {0.0})
    frozen = variant == 'v2_linear'  # its first stage
    for i, stage in enumerate(model.stages):
        assert all(m.training == (i > 0 or not frozen) for m in stage.modules())
    for out, expected in zip(outputs(model.eval(), stored['image']), stored['outputs'][variant]):
        assert (out - expected).abs().max() < 2e-3 * expected.float().std() + 2e-3
    assert_equal(outputs(copy.deepcopy(model), stored['image']), outputs(model, stored['image']))


@every_variant
def test_autocast_bf16_is_near_fp32(variant):
    """Under autocast the features are close to fp32's, and gradients flow."""
    model = small(variant)
    with torch.autocast('cpu', torch.bfloat16):
        outs = model(IMAGE)
    sum(out.float().square().mean() for out in outs).backward()
    assert all(p.grad is not None for p in model.parameters())
    for out, full in zip(outs, outputs(model)):
        assert (out.float() - full).abs().max() < 0.05 * full.std()


@every_variant
def test_compiles_whole(variant):
    """torch.compile takes the backbone as one graph and gives the same numbers."""
    model = small(variant).eval()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    assert_equal(outputs(compiled), outputs(model), 1e-5)
    torch._dynamo.reset()


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='needs PyTorch 2.7')
@every_variant
def test_exports_with_dynamic_sizes(variant):
    """An exported program runs at sizes that it was not exported with."""
    model = small(variant).eval()
    side = torch.export.Dim.AUTO
    program = torch.export.export(
        model, (torch.randn(2, 3, 256, 320),), dynamic_shapes=({0: side, 2: side, 3: side},)
    )
    for size in ((1, 3, 64, 96), (3, 3, 224, 224), (2, 3, 160, 128)):
        image = torch.randn(size)
        assert_equal(outputs(program.module(), image), outputs(model, image), 1e-5)


# Bad input


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'arch': 'huge'}, "no arch 'huge'; choose one of tiny, small, medium, large"),
        ({'arch': {'dims': (1, 2, 3, 4)}}, 'needs the keys depths, dims'),
        ({'arch': {**SMALL, 'linear': True}}, 'needs the keys'),
        ({'arch': {**SMALL, 'depths': (1, 1)}}, 'must have 4 values'),
        ({'arch': {**SMALL, 'depths': (1, 0, 1, 1)}}, 'positive whole numbers, got .1, 0, 1, 1.'),
        ({'arch': {**SMALL, 'sr_ratios': (8, 4, 2.5, 1)}}, 'positive whole numbers'),
        ({'arch': {**SMALL, 'num_heads': (3, 2, 5, 8)}}, 'width of 16 does not split into 3'),
        ({'out_indices': ()}, 'must name stages 0 to 3'),
        ({'out_indices': (1, 4)}, 'must name stages 0 to 3'),
        ({'out_indices': (2, 1)}, 'must ascend'),
        ({'out_indices': (1, 1)}, 'must ascend'),
        ({'frozen_stages': 5}, 'give -1 .* to 4'),
        ({'frozen_stages': 2, 'out_indices': (0,)}, '1 stages are built'),
        ({'sr_mode': 'linear'}, "no sr_mode 'linear'"),
        ({'pretrain_img_size': 16}, 'at least 32 pixels'),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(arguments, message):
    """Each message says what is wrong and what would do."""
    with pytest.raises(ValueError, match=message):
        PVT(**arguments)


def test_v2_refuses_pooled_reduction():
    """sr_mode belongs to v1."""
    with pytest.raises(ValueError, match="only sr_mode='conv'"):
        PVTv2('b0', sr_mode='avg')


@pytest.mark.parametrize(
    ('image', 'error', 'message'),
    [
        (torch.zeros(3, 64, 64), ValueError, r'takes images of shape \(B, 3, H, W\)'),
        (torch.zeros(1, 4, 64, 64), ValueError, 'set in_channels=4'),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, 'image is torch.uint8'),
        (torch.zeros(1, 3, 64, 64, dtype=torch.float64), TypeError, 'image is torch.float64'),
        (torch.zeros(1, 3, 31, 64), ValueError, 'at least 32 x 32'),
    ],
)
def test_bad_images_are_refused_in_a_sentence(image, error, message):
    """Rank, channels, dtype and size are checked before anything runs."""
    with pytest.raises(error, match=message):
        small('v1')(image)


# Precision


@every_variant
def test_compute_dtype_is_for_the_backbone_alone(variant):
    """Features and gradients stay fp32 and near fp32's own, and nothing is left switched on."""
    torch.manual_seed(0)
    model = small(variant, compute_dtype='bfloat16')
    exact = small(variant)
    exact.load_state_dict(model.state_dict())
    results = []
    for backbone in (model.eval(), exact.eval()):
        outs = backbone(IMAGE)
        assert all(out.dtype == torch.float32 for out in outs)
        sum(out.sin().sum() for out in outs).backward()
        results.append([*(out.detach() for out in outs), *(p.grad for p in backbone.parameters())])
    assert not is_autocast('cpu')
    for rough, plain in zip(*results):
        assert rough.dtype == torch.float32
        assert 0 < (rough - plain).norm() < 0.1 * plain.norm() + 1e-3


def test_compute_dtype_that_does_not_exist():
    """The error lists those that do."""
    with pytest.raises(ValueError, match='bfloat16'):
        small('v1', compute_dtype='float16')
