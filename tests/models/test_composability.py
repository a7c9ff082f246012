"""The backbones in the hands of PyTorch's tools: each use of an nn.Module gives the right numbers.

The reference of most tests is the same model in float64, which never takes the CPU fast path. Where
a wrong textbook could hide, the numbers are computed by hand.
"""

import contextlib
import copy
import functools
import math
import statistics
import threading
import time
import types
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from reference import SMALL, small
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint as recompute

from pvt_mm import PVT, PVTv2
from pvt_mm.apis.complexity import multiply_adds
from pvt_mm.models import fast
from pvt_mm.models.layers import SpatialReductionAttention

attention = pytest.importorskip('torch.nn.attention', reason='PyTorch < 2.3')
pytestmark = [
    # Of older ways that PyTorch keeps: weight_norm, spectral_norm, quantize_dynamic, jit.trace.
    pytest.mark.filterwarnings('ignore:.*is deprecated'),
    pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning'),
]

VARIANTS = ('v1', 'v2', 'v2_li')
BLOCK = 'stages.1.blocks.1'
#: Enough tokens that the fast path cuts them into chunks, and few.
IMAGES = {
    'large': torch.randn(1, 3, 256, 320, generator=torch.Generator().manual_seed(1)),
    'small': torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2)),
}
IMAGE = IMAGES['small']
FP32, BF16 = 1e-4, 6e-2

every_variant = pytest.mark.parametrize('variant', VARIANTS)
both_versions = pytest.mark.parametrize('variant', ['v1', 'v2'])
both_modes = pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])


# Models, and what they are compared with


def build(variant='v2', training=False, **kwargs):
    """A small model whose every weight matters: fresh ones are too small to be seen."""
    model = small(variant, **kwargs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith('bias'):
                parameter.copy_(0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * noise)
            elif name.endswith('pos_embed'):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    return model.train(training)


def exact(model):
    """The same model in float64."""
    return copy.deepcopy(model).double()


def near(out, expected, tolerance=FP32):
    """Whether a tensor is near another, by the largest value of that one."""
    out, expected = out.detach().double(), expected.detach().double()
    if out.shape != expected.shape:
        return False
    return bool((out - expected).abs().max() <= tolerance * expected.abs().max())


def assert_near(outs, expected, tolerance=FP32):
    assert len(outs) == len(expected)
    for out, other in zip(outs, expected):
        assert near(out, other, tolerance), (out.detach().double() - other).abs().max()


def assert_right(model, image=IMAGE, tolerance=FP32):
    """The model computes what its copy in float64 does."""
    assert_near(model(image), exact(model)(image.double()), tolerance)


@functools.cache
def expected_of(variant, size='small'):
    """The features of a model as it was built, in float64."""
    with torch.no_grad():
        return exact(build(variant))(IMAGES[size].double())


@functools.cache
def gradients_of(variant):
    """The gradients of a model as it was built, in float64."""
    return gradients(exact(build(variant)))


def loss_of(outs):
    return sum(out.sin().mean() for out in outs)


def gradients(model, image=IMAGE):
    """The gradient of every parameter that needs one, by its name."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    image = image.to(parameters[0].dtype)
    return dict(zip(names, torch.autograd.grad(loss_of(model(image)), parameters)))


def assert_right_gradients(model, image=IMAGE, tolerance=1e-3, expected=None):
    found, expected = gradients(model, image), expected or gradients(exact(model), image)
    wrong = [name for name in expected if not near(found[name], expected[name], tolerance)]
    assert not wrong


def block_of(model):
    return model.get_submodule(BLOCK)


#: The modules of a block and of the stage around it, by their names there.
IN_BLOCK = (
    '', 'norm1', 'attn', 'attn.q', 'attn.kv', 'attn.sr', 'attn.norm', 'attn.proj',
    'norm2', 'mlp', 'mlp.fc1', 'mlp.dwconv', 'mlp.act', 'mlp.fc2',
)  # fmt: skip
IN_STAGE = ('', 'patch_embed', 'patch_embed.proj', 'patch_embed.norm', 'norm')
#: All of them in v2; elsewhere those that differ from v2's.
LAYERS = [
    *[('v2', f'{BLOCK}.{name}'.rstrip('.')) for name in IN_BLOCK],
    *[('v2', f'stages.1.{name}'.rstrip('.')) for name in IN_STAGE],
    *[('v1', f'{BLOCK}.{name}') for name in ('attn.q', 'attn.sr', 'mlp.fc1', 'mlp.act')],
    ('v1', 'stages.1.patch_embed.proj'),
    *[('v1_avg', f'{BLOCK}.attn.{name}') for name in ('pool', 'sr')],
    *[('v2_li', f'{BLOCK}.attn.{name}') for name in ('pool', 'sr', 'act')],
    *[('v2_li', f'{BLOCK}.mlp.{name}') for name in ('relu', 'dwconv')],
]
every_layer = pytest.mark.parametrize(('variant', 'layer'), LAYERS)
#: Those with a weight that is multiplied.
WEIGHTED = [
    (variant, layer)
    for variant, layer in LAYERS
    if layer.endswith(('.q', '.kv', '.sr', 'attn.proj', 'embed.proj', '.fc1', '.dwconv', '.fc2'))
]
every_weighted_layer = pytest.mark.parametrize(('variant', 'layer'), WEIGHTED)


def swap(model, layer, new):
    """Put another module in the place of a layer."""
    parent, _, name = layer.rpartition('.')
    setattr(model.get_submodule(parent), name, new)


def questions(model, image=IMAGE):
    """What a forward pass asks for the fast path: what of, and the answers."""
    asked, ask = [], fast.applies

    def remember(*args):
        asked.append((args, ask(*args)))
        return asked[-1][1]

    with mock.patch.object(fast, 'applies', remember):
        model(image)
    return asked


def answers(model, image=IMAGE):
    return [answer for _, answer in questions(model, image)]


@pytest.mark.parametrize('variant', ['v1', 'v1_avg', 'v1_max', 'v2', 'v2_li'])
@both_modes
def test_the_fast_path_is_taken(variant, training):
    """Where nothing is in the way: otherwise the other tests would not see it."""
    for compute_dtype in (None, 'bfloat16'):
        model = build(variant, training, compute_dtype=compute_dtype)
        with torch.set_grad_enabled(training):
            for image in IMAGES.values():
                taken = answers(model, image)
                assert taken and all(taken)
                assert_right(model, image, BF16 if compute_dtype else FP32)
    assert not any(answers(exact(model), IMAGE.double()))


# Hooks


RUNS = {
    'eval': (False, FP32, torch.no_grad),
    'inference mode': (False, FP32, torch.inference_mode),
    'train': (True, FP32, contextlib.nullcontext),
    'compute_dtype': (False, BF16, torch.no_grad),
    'compute_dtype train': (True, BF16, contextlib.nullcontext),
    'autocast': (False, BF16, lambda: torch.autocast('cpu', torch.bfloat16)),
}


def watch(model, layer, image=IMAGE):
    """Run the model and return what each call of a layer was given, and what it returned."""
    before, after = [], []
    module = model.get_submodule(layer)
    handles = [
        module.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0])),
        module.register_forward_hook(lambda _, inputs, out: after.append((inputs[0], out))),
    ]
    model(image)
    for handle in handles:
        handle.remove()
    assert [id(x) for x in before] == [id(x) for x, _ in after]
    return after


@pytest.mark.parametrize('run', RUNS)
@every_layer
def test_hooks_fire_once_and_see_the_tensors(variant, layer, run):
    """A hook on one layer, while the fast path may be taken elsewhere."""
    training, tolerance, context = RUNS[run]
    compute_dtype = 'bfloat16' if run.startswith('compute') else None
    model = build(variant, training, compute_dtype=compute_dtype)
    (expected,) = watch(exact(build(variant)), layer, IMAGE.double())
    with context():
        (seen,) = watch(model, layer)
    assert_near(seen, expected, tolerance)


def mixed(x):
    """Another tensor of the same shape; no layer takes it for the same."""
    return x + x.flip(-1) / 2


@every_layer
def test_hook_changes_the_output(variant, layer):
    """What a hook returns is used, and what a pre-hook returns is taken."""
    for changes in ('register_forward_hook', 'register_forward_pre_hook'):
        model = build(variant)
        plain = expected_of(variant)
        module = model.get_submodule(layer)
        if changes == 'register_forward_hook':
            module.register_forward_hook(lambda _, inputs, out: mixed(out))
        else:
            module.register_forward_pre_hook(lambda _, inputs: mixed(inputs[0]))
        with torch.no_grad():
            assert_right(model)
            assert not near(model(IMAGE)[1], plain[1], 1e-3)


@both_versions
def test_hook_writes_into_its_output(variant):
    """A hook may change an output in place, also where the blocks around it are fast."""
    for name in ('stages.1.patch_embed', BLOCK, 'stages.0.blocks.0.attn.proj'):
        model = build(variant)
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, out: out.add_(out.flip(-1) / 2)
        )
        assert_right(model)
        assert_right_gradients(model)
        with torch.inference_mode():
            assert not near(model(IMAGE)[1], expected_of(variant)[1], 1e-3)


@both_versions
def test_blocks_called_by_hand(variant):
    """A block on tokens that lie in any way; they stay as they are."""
    block = build(variant).stages[0].blocks[0]
    reference = exact(block)
    tokens = torch.randn(2, 32, 40, 16, generator=torch.Generator().manual_seed(8))
    layouts = {
        'contiguous': tokens,
        'permuted': tokens.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        'strided': tokens.repeat_interleave(2, -1)[..., ::2],
        'expanded': tokens[:1].expand(2, -1, -1, -1),
    }
    for x in layouts.values():
        before = x.clone()
        for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with context():
                out = block(x)
            assert x.equal(before)
            assert near(out, reference(before.double()))


@every_layer
def test_backward_hooks(variant, layer):
    """They see the gradients, once, and may change them."""

    def run(model, image, factor):
        seen = []
        module = model.get_submodule(layer)
        module.register_full_backward_pre_hook(lambda _, grads: seen.append(grads[0]))
        module.register_full_backward_hook(
            lambda _, grads, outs: (seen.extend((grads[0], outs[0])), (factor * grads[0],))[1]
        )
        found = gradients(model, image)
        assert len(seen) == 3
        return [*seen, found['stages.0.patch_embed.proj.weight']]

    model = build(variant, training=True)
    for factor in (1, 3):
        found = run(copy.deepcopy(model), IMAGE, factor)
        assert_near(found, run(exact(model), IMAGE.double(), factor), 1e-3)


GLOBAL_HOOKS = (
    'register_module_forward_pre_hook',
    'register_module_forward_hook',
    'register_module_full_backward_pre_hook',
    'register_module_full_backward_hook',
)


@pytest.mark.parametrize('register', GLOBAL_HOOKS)
@every_variant
def test_global_hooks_see_every_layer(variant, register):
    """Once each."""
    model = build(variant, training=True)
    names = {module: name for name, module in model.named_modules()}
    called = []
    handle = getattr(nn.modules.module, register)(lambda m, *_: called.append(names.get(m)))
    try:
        image = IMAGE.clone().requires_grad_()
        loss_of(model(image)).backward()
    finally:
        handle.remove()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GELU)):
            assert called.count(name) == 1, name


def test_hooks_are_copied():
    """A deep copy has its own hooks, and the original keeps its own."""
    model = build()
    model.get_submodule(f'{BLOCK}.mlp.fc1').register_forward_hook(lambda m, _, out: 2 * out)
    other = copy.deepcopy(model)
    plain = build()
    block_of(plain).mlp.fc1.weight.data.mul_(2)
    block_of(plain).mlp.fc1.bias.data.mul_(2)
    for changed in (model, other):
        assert_near(changed(IMAGE), exact(plain)(IMAGE.double()))


# What is kept by a hook


@pytest.mark.parametrize('size', IMAGES)
@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode, torch.enable_grad])
@every_variant
def test_kept_tensors_stay(variant, context, size):
    """Inputs and outputs of stages, embeddings and blocks are not overwritten by later layers."""
    model = build(variant)
    kept, copies = [], []

    def keep(_, inputs, out):
        for x in (*inputs, *(out if isinstance(out, tuple) else (out,))):
            kept.append(x)
            copies.append(x.detach().clone())

    for name, module in model.named_modules():
        if name.count('.') in (1, 2, 3) and not name.endswith(('blocks', 'attn', 'mlp')):
            module.register_forward_hook(keep)
    with context():
        outs = model(IMAGES[size])
    assert len(kept) > 30
    assert all(x.equal(y) for x, y in zip(kept, copies))
    assert_near(outs, expected_of(variant, size))


@pytest.mark.parametrize('kept', ['patch_embed', 'blocks.0'])
@pytest.mark.parametrize('size', IMAGES)
@every_variant
def test_one_kept_tensor_stays(variant, kept, size):
    """Also where only one module is hooked, so that the blocks behind it are fast."""
    model = build(variant)
    seen, copies = [], []

    def keep(_, inputs, out):
        seen.append(out)
        copies.append(out.clone())

    for stage in model.stages:
        stage.get_submodule(kept).register_forward_hook(keep)
    with torch.inference_mode():
        model(IMAGES[size])
    assert len(seen) == 4 and all(x.equal(y) for x, y in zip(seen, copies))


@every_layer
def test_gradient_of_a_kept_output(variant, layer):
    """Grad-CAM: the gradient with respect to a hooked layer's output, by retain_grad and hooks."""

    def run(model, image):
        kept, hooked = [], []

        def keep(_, inputs, out):
            out.retain_grad()
            out.register_hook(hooked.append)
            kept.append(out)

        model.get_submodule(layer).register_forward_hook(keep)
        loss_of(model(image)[-1:]).backward()
        return [kept[0].grad, hooked[0], kept[0]]

    model = build(variant)
    assert_near(run(copy.deepcopy(model), IMAGE), run(exact(model), IMAGE.double()), 1e-3)


# Low-rank adapters


LORA = ('q', 'kv', 'fc1')


def adapted(variant, **kwargs):
    """A model with LoRA that is not zero, and the plain one that it stands for."""
    peft = pytest.importorskip('peft')
    plain, model = build(variant), build(variant)
    config = peft.LoraConfig(r=4, lora_alpha=8, **kwargs)
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if 'lora_' in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model, plain


@both_modes
@every_variant
def test_lora(variant, training):
    """Every adapter gets a gradient; the output is that of the weights plus B A alpha / r."""
    model, plain = adapted(variant, target_modules=list(LORA))
    weights = model.base_model.model.state_dict()
    count = 0
    for name, module in plain.named_modules():
        if name.endswith(LORA):
            lora = [weights[f'{name}.lora_{side}.default.weight'] for side in 'BA']
            module.weight.data += 8 / 4 * lora[0] @ lora[1]
            count += 1
    assert count == 3 * 5
    model.train(training)
    assert_near(model(IMAGE), exact(plain)(IMAGE.double()))
    loss_of(model(IMAGE)).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * count and all('lora_' in name for name in trained)
    assert all(p.grad.abs().max() > 0 for p in trained.values())
    assert_near(model.merge_and_unload()(IMAGE), exact(plain)(IMAGE.double()))


@pytest.mark.parametrize('kind', [{'use_dora': True}, {'use_rslora': True}, {'lora_bias': True}])
@both_versions
def test_other_adapters_on_every_layer(variant, kind):
    """Kinds of LoRA, on convolutions too; merged into the weights they give the same."""
    layers = ['q', 'kv', 'sr', 'attn.proj', 'fc1', 'fc2', 'patch_embed.proj']
    model, plain = adapted(variant, target_modules=layers, **kind)
    found = model(IMAGE)
    assert_near(found, exact(model)(IMAGE.double()))
    assert not near(found[-1], plain(IMAGE)[-1], 1e-2)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(grad.abs().max() > 0 for grad in gradients(model).values()) and names
    assert_near(model.merge_and_unload()(IMAGE), found)


# Quantisation


@pytest.mark.skipif(not hasattr(torch.ao, 'quantization'), reason='moved to torchao')
@every_variant
def test_dynamic_quantisation(variant):
    """quantize_dynamic over nn.Linear: every one is quantised, and used."""
    model = build(variant)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    layers = [m for m in quantised.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(layers) == sum(isinstance(m, nn.Linear) for m in model.modules())
    with torch.no_grad():
        found, expected = quantised(IMAGE), model(IMAGE)
    assert_near(found, expected, 0.1)
    assert not near(found[-1], expected[-1], 1e-4), 'int8 rounds'


@pytest.mark.skipif(not hasattr(torch.ao, 'quantization'), reason='moved to torchao')
@both_versions
def test_quantisation_observers(variant):
    """Observers of static quantisation see what goes through each layer."""
    model = build(variant)
    model.qconfig = torch.ao.quantization.default_qconfig
    observed = torch.ao.quantization.prepare(model)
    observed(IMAGE)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            ((_, out),) = watch(exact(model), name, IMAGE.double())
            observer = observed.get_submodule(name).activation_post_process
            assert float(observer.min_val) == pytest.approx(float(out.min()), rel=1e-3)
            assert float(observer.max_val) == pytest.approx(float(out.max()), rel=1e-3)


@pytest.mark.skipif(not hasattr(torch.ao, 'quantization'), reason='moved to torchao')
@both_versions
def test_quantisation_aware_training(variant):
    """prepare_qat puts layers that round their weights in place of the linear ones."""
    model = build(variant, training=True)
    plain = copy.deepcopy(model)
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig('fbgemm')
    model = torch.ao.quantization.prepare_qat(model)
    assert type(block_of(model).attn.q) is torch.ao.nn.qat.Linear
    found = model(IMAGE)
    assert_near(found, plain(IMAGE), 0.2)
    assert not near(found[-1], plain(IMAGE)[-1], 1e-3)
    assert all(grad.isfinite().all() for grad in gradients(model).values())


# Counters


def layer_macs(model, image, bias=False):
    """Multiply-adds of the linear layers and convolutions, by hooks on the model in float64."""
    counts = []

    def count(module, _, out):
        counts.append(out.numel() * module.weight[0].numel())
        if bias:
            counts.append(out.numel())

    model = exact(model)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(count)
    model(image.double())
    return sum(counts)


def all_macs(model, image=IMAGE[:1]):
    """What tools/analysis_tools/get_flops.py counts."""
    return multiply_adds(copy.deepcopy(model).to('meta'), tuple(image.shape[2:]))


@every_variant
def test_flop_counter_mode(variant):
    """PyTorch's counter sees every matmul, whichever kernel attends."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build(variant)
    for kernel in (attention.SDPBackend.MATH, attention.SDPBackend.FLASH_ATTENTION):
        counter = FlopCounterMode(display=False)
        with counter, attention.sdpa_kernel(kernel), torch.no_grad():
            model(IMAGE[:1])
        assert counter.get_total_flops() == pytest.approx(2 * all_macs(model), rel=0.01)


@every_variant
def test_flops_of_a_training_step(variant):
    """PyTorch's counter sees as many in fp32 as in float64."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(model, image):
        counter = FlopCounterMode(display=False)
        with counter, plain_attention():
            loss_of(model(image)).backward()
        return counter.get_total_flops()

    model = build(variant, training=True)
    assert count(model, IMAGE) == count(exact(model), IMAGE.double()) > 4 * layer_macs(model, IMAGE)


@pytest.mark.parametrize('package', ['fvcore.nn', 'mmengine.analysis'])
@every_variant
def test_tracing_counters(variant, package):
    """fvcore's and mmengine's counters see matmuls and convolutions in a trace."""
    module = pytest.importorskip(package)
    model = build(variant)
    cls = module.FlopCountAnalysis if package == 'fvcore.nn' else module.FlopAnalyzer
    counts = cls(model, IMAGE[:1]).by_operator()
    seen = [counts[name] for name in ('conv', 'linear', 'matmul', 'bmm', 'addmm')]
    assert sum(seen) == pytest.approx(all_macs(model), rel=0.01)


@every_variant
def test_mmengine_complexity(variant):
    """What mmdet's and mmseg's get_flops.py call."""
    from mmengine.analysis import FlopAnalyzer, get_model_complexity_info

    model = build(variant)
    counts = get_model_complexity_info(model, tuple(IMAGE.shape[1:]))
    assert counts['params'] == sum(p.numel() for p in model.parameters())
    by_layer = FlopAnalyzer(model, IMAGE[:1]).by_module()
    assert counts['flops'] == by_layer[''] >= 0.99 * all_macs(model)
    fc1 = block_of(model).mlp.fc1
    assert by_layer[f'{BLOCK}.mlp.fc1'] == fc1.weight.numel() * (64 // 8) * (96 // 8)


@every_variant
def test_thop(variant):
    """It counts module by module."""
    thop = pytest.importorskip('thop')
    model = build(variant)
    nothing = dict.fromkeys((nn.LayerNorm, nn.ReLU), thop.vision.basic_hooks.zero_ops)
    macs, _ = thop.profile(copy.deepcopy(model), (IMAGE[:1],), custom_ops=nothing, verbose=False)
    pooled = 0.01 if variant == 'v2_li' else 1e-9  # thop also counts pooling layers
    assert macs == pytest.approx(layer_macs(model, IMAGE[:1]), rel=pooled)


@every_variant
def test_ptflops(variant):
    """It counts module by module, biases included, and operations outside of modules."""
    ptflops = pytest.importorskip('ptflops')
    model = build(variant)
    ignored = [nn.LayerNorm, nn.GELU, nn.ReLU, nn.AdaptiveAvgPool2d]
    macs, _ = ptflops.get_model_complexity_info(
        copy.deepcopy(model),
        tuple(IMAGE.shape[1:]),
        backend='pytorch',
        as_strings=False,
        print_per_layer_stat=False,
        ignore_modules=ignored,
    )
    layers = layer_macs(model, IMAGE[:1], bias=True)
    assert 0.99 * layers <= macs <= 1.01 * max(layers, layers + all_macs(model))


@every_variant
def test_torchinfo(variant):
    """It sees every layer, with the size of what it returns."""
    torchinfo = pytest.importorskip('torchinfo')
    model = build(variant)
    summary = torchinfo.summary(model, input_data=IMAGE[:1], verbose=0)
    sizes = [
        (info.class_name, tuple(info.output_size))
        for info in summary.summary_list
        if isinstance(info.module, (nn.Linear, nn.Conv2d, nn.LayerNorm))
    ]
    expected = []
    reference = exact(model)
    for module in reference.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
            module.register_forward_hook(
                lambda m, _, out: expected.append((type(m).__name__, tuple(out.shape)))
            )
    reference(IMAGE[:1].double())
    assert sorted(sizes) == sorted(expected)


# Transforms


@every_variant
def test_vmap(variant):
    """Over images, and over several models."""
    model = build(variant)
    reference = exact(model)(IMAGE.double())
    found = torch.func.vmap(model)(IMAGE[:, None])
    assert_near([out.flatten(0, 1) for out in found], reference)
    models = [build(variant), build(variant)]
    for parameter in models[1].parameters():
        parameter.data.mul_(1.1)
    parameters, buffers = torch.func.stack_module_state(models)

    def run(parameters, buffers, image):
        return torch.func.functional_call(model, (parameters, buffers), image)

    found = torch.func.vmap(run, (0, 0, None))(parameters, buffers, IMAGE)
    for i, one in enumerate(models):
        assert_near([out[i] for out in found], exact(one)(IMAGE.double()))


@both_modes
@every_variant
def test_func_grad(variant, training):
    """torch.func.grad of functional_call is autograd's gradient; vmap of it, each image's own."""
    model = build(variant, training)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, image):
        return loss_of(torch.func.functional_call(model, parameters, image))

    found = torch.func.grad(loss)(parameters, IMAGE)
    expected = gradients(exact(model), IMAGE)
    assert all(near(found[name], expected[name], 1e-3) for name in expected)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, IMAGE[:, None])
    alone = gradients(exact(model), IMAGE[1:])
    assert all(near(each[name][1], alone[name], 1e-3) for name in alone)


@both_versions
def test_functional_call(variant):
    """Other parameters, given for one call."""
    model, other = build(variant), build(variant)
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    given = {name: p.detach() for name, p in other.named_parameters()}
    with torch.no_grad():
        found = torch.func.functional_call(model, given, IMAGE)
    assert_near(found, exact(other)(IMAGE.double()))
    assert_near(model(IMAGE), expected_of(variant))


def plain_attention():
    return attention.sdpa_kernel(attention.SDPBackend.MATH)


def along(model, image, step, direction):
    """The loss in float64 a step along a direction of image and parameters."""
    moved = exact(model)
    for parameter, part in zip(moved.parameters(), direction[1:]):
        parameter.data.add_(part, alpha=step)
    return moved, image.double() + step * direction[0]


def directions(model, image):
    generator = torch.Generator().manual_seed(5)
    tensors = (image, *model.parameters())
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in tensors]


def slope(function, model, image, direction, step=1e-7):
    """The derivative of a function of a model and an image along a direction, in float64."""
    ahead, behind = (function(*along(model, image, s, direction)) for s in (step, -step))
    return float(ahead - behind) / (2 * step)


@every_variant
def test_forward_mode(variant):
    """Forward-mode AD: torch.func.jvp and dual tensors equal finite differences."""
    model = build(variant)
    direction = directions(model, IMAGE)
    expected = slope(lambda m, image: loss_of(m(image)).detach(), model, IMAGE, direction)
    names = [name for name, _ in model.named_parameters()]
    given = dict(model.named_parameters())
    tangents = {name: part.float() for name, part in zip(names, direction[1:])}

    def loss(parameters, image):
        return loss_of(torch.func.functional_call(model, parameters, image))

    with plain_attention():
        _, found = torch.func.jvp(loss, (given, IMAGE), (tangents, direction[0].float()))
    assert float(found) == pytest.approx(expected, rel=1e-3)
    fwd = torch.autograd.forward_ad
    with plain_attention(), fwd.dual_level():
        duals = {name: fwd.make_dual(p, tangents[name]) for name, p in given.items()}
        out = loss(duals, fwd.make_dual(IMAGE, direction[0].float()))
        assert float(fwd.unpack_dual(out).tangent) == pytest.approx(expected, rel=1e-3)


def penalty(model, image, inside=contextlib.nullcontext):
    """A gradient penalty: the square of the gradient with respect to the image."""
    image = image.detach().requires_grad_()
    with inside():
        loss = loss_of(model(image))
    (grad,) = torch.autograd.grad(loss, image, create_graph=True)
    return (1e3 * grad.square()).sum()


@pytest.mark.parametrize('exits', [False, True], ids=['within', 'forward only'])
@pytest.mark.parametrize('size', IMAGES)
@every_variant
def test_double_backward(variant, size, exits):
    """The gradient of a gradient penalty equals finite differences in float64.

    Also where PyTorch's plain attention was asked for in the forward pass alone.
    """
    model, image = build(variant), IMAGES[size]
    direction = directions(model, image)
    direction[0].zero_()
    expected = slope(lambda m, x: penalty(m, x).detach(), model, image, direction)
    if exits:
        found = penalty(model, image, plain_attention)
        found.backward()
    else:
        with plain_attention():
            found = penalty(model, image)
            found.backward()
    total = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), direction[1:]))
    assert total == pytest.approx(expected, rel=2e-3)


@both_versions
def test_double_backward_with_fused_attention(variant):
    """Without asking for plain attention it is right too, or PyTorch says that it has none."""
    model = build(variant, training=True)
    direction = directions(model, IMAGE)
    direction[0].zero_()
    try:
        penalty(model, IMAGE).backward()
    except RuntimeError as error:
        assert 'derivative' in str(error) and 'not implemented' in str(error)
        return
    expected = slope(lambda m, x: penalty(m, x).detach(), model, IMAGE, direction)
    total = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), direction[1:]))
    assert total == pytest.approx(expected, rel=2e-3)


@both_versions
def test_hessian_vector_products(variant):
    """Reverse over reverse and forward over reverse, with respect to the image."""
    model = build(variant)
    reference = exact(model)
    image, vector = IMAGE[:1, :, :32, :32], IMAGE[1:, :, 32:, :32]

    def product(model, image, vector):
        return torch.autograd.functional.hvp(lambda x: loss_of(model(x)), image, vector)[1]

    def forward_over_reverse(model, image, vector):
        grad = torch.func.grad(lambda x: loss_of(model(x)))
        return torch.func.jvp(grad, (image,), (vector,))[1]

    with plain_attention():
        expected = product(reference, image.double(), vector.double())
        assert near(product(model, image, vector), expected, 1e-3)
        assert near(forward_over_reverse(model, image, vector), expected, 1e-3)


# Weights that are computed


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight):
        return 2 * weight


def pruned(layer):
    prune.l1_unstructured(layer, 'weight', amount=0.5)


PARAMETRISED = {
    'weight_norm': nn.utils.weight_norm,
    'spectral_norm': nn.utils.spectral_norm,
    'prune': pruned,
    'parametrizations.weight_norm': parametrizations.weight_norm,
    'parametrizations.spectral_norm': parametrizations.spectral_norm,
    'parametrizations.orthogonal': parametrizations.orthogonal,
    'own parametrisation': lambda layer: parametrize.register_parametrization(
        layer, 'weight', Doubled()
    ),
}


def weight_now(layer):
    """The weight of a layer, made anew from its parameters."""
    for hook in layer._forward_pre_hooks.values():
        hook(layer, ())
    return layer.weight.detach()


@pytest.mark.parametrize(
    ('variant', 'layer', 'kind'),
    [
        (variant, layer, kind)
        for variant, layer in WEIGHTED
        for kind in PARAMETRISED
        # Small kernels cannot be orthogonal.
        if not kind.endswith('orthogonal') or layer.endswith(('.q', '.kv', '.fc1'))
    ],
)
def test_computed_weights(variant, layer, kind):
    """The weight is made from its parameters in each pass, and they get gradients."""
    model, plain = build(variant), build(variant)
    module = model.get_submodule(layer)
    PARAMETRISED[kind](module)
    module.eval()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    model(IMAGE)
    if 'orthogonal' not in kind:
        for name, parameter in trained.items():
            if name != 'bias':
                parameter.data.add_(0.3 * parameter.data.roll(1, 0))
    with torch.no_grad():
        found = model(IMAGE)
    plain.get_submodule(layer).weight.data.copy_(weight_now(module))
    expected = exact(plain)(IMAGE.double())
    assert_near(found, expected)
    loss_of(model(IMAGE)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    if kind == 'prune':
        prune.remove(module, 'weight')
        assert_near(model(IMAGE), expected)


def test_cached_parametrisations():
    """parametrize.cached computes each weight once."""
    model, plain = build(), build()
    for one in (model, plain):
        parametrize.register_parametrization(block_of(one).attn.q, 'weight', Doubled())
    with parametrize.cached(), torch.no_grad():
        assert_near(model(IMAGE), exact(plain)(IMAGE.double()))


# Layers of other classes


class HalfLinear(nn.Linear):
    """A subclass with a forward pass of its own."""

    def forward(self, x):
        return super().forward(x) / 2


class HalfConv2d(nn.Conv2d):
    """A subclass with a forward pass of its own."""

    def forward(self, x):
        return super().forward(x) / 2


class Int8Layer(nn.Module):
    """A layer whose weight is int8 in a buffer, as bitsandbytes has."""

    def __init__(self, layer):
        super().__init__()
        weight = layer.weight.detach()
        scale = weight.abs().flatten(1).amax(1) / 127
        self.register_buffer('scale', scale)
        self.register_buffer('int8', (weight / scale.view(-1, *(1,) * (weight.ndim - 1))).round())
        self.int8 = self.int8.to(torch.int8)
        self.kind = copy.deepcopy(layer).to('meta').requires_grad_(False)
        self.register_buffer('offset', layer.bias.detach().clone())

    def forward(self, x):
        weight = self.int8.to(x.dtype) * self.scale.view(-1, *(1,) * (self.int8.ndim - 1))
        call = {'weight': weight, 'bias': self.offset}
        return torch.func.functional_call(self.kind, call, x)


def half(layer):
    """The same layer as a subclass that halves its output."""
    other = copy.deepcopy(layer)
    other.__class__ = HalfLinear if isinstance(layer, nn.Linear) else HalfConv2d
    return other


@every_weighted_layer
def test_subclass_with_its_own_forward(variant, layer):
    model, plain = build(variant), build(variant)
    swap(model, layer, half(model.get_submodule(layer)))
    for tensor in plain.get_submodule(layer).parameters():
        tensor.data.div_(2)
    assert_near(model(IMAGE), exact(plain)(IMAGE.double()))
    assert_right_gradients(model)


@every_weighted_layer
def test_layer_of_another_class(variant, layer):
    model, plain = build(variant), build(variant)
    module = model.get_submodule(layer)
    swap(model, layer, Int8Layer(module))
    new = model.get_submodule(layer)
    weight = new.int8 * new.scale.view(-1, *(1,) * (new.int8.ndim - 1))
    plain.get_submodule(layer).weight.data.copy_(weight)
    assert_near(model(IMAGE), exact(plain)(IMAGE.double()))
    assert layer + '.weight' not in gradients(model)


@every_variant
def test_apply_replaces_layers(variant):
    """nn.Module.apply with a function that puts others in place of all linear layers."""
    model, plain = build(variant), build(variant)

    def replace(module):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, half(child))

    model.apply(replace)
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            for tensor in module.parameters():
                tensor.data.div_(2)
    assert_near(model(IMAGE), exact(plain)(IMAGE.double()))


@every_layer
def test_forward_of_an_instance(variant, layer):
    """module.forward replaced on one instance, as accelerate does."""
    model, plain = build(variant), build(variant)
    module = model.get_submodule(layer)
    calls = []
    forward = module.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return mixed(forward(*args, **kwargs))

    module.forward = counted
    found = model(IMAGE)
    assert len(calls) == 1
    plain.get_submodule(layer).register_forward_hook(lambda m, _, out: mixed(out))
    assert_near(found, exact(plain)(IMAGE.double()))


@pytest.mark.parametrize('layer', ['attn.q', 'mlp.fc1', ''])
def test_accelerate_hooks(layer):
    """accelerate's hooks, which keep weights elsewhere until a layer runs."""
    accelerate = pytest.importorskip('accelerate')
    model = build()
    name = f'{BLOCK}.{layer}'.rstrip('.')
    accelerate.cpu_offload(model.get_submodule(name), execution_device=torch.device('cpu'))
    assert all(p.is_meta for p in model.get_submodule(name).parameters())
    with torch.no_grad():
        assert_near(model(IMAGE), expected_of('v2'))


PATCHED = {
    'linear': nn.Linear,
    'conv2d': nn.Conv2d,
    'layer_norm': nn.LayerNorm,
    'gelu': nn.GELU,
    'relu': nn.ReLU,
    'dropout': nn.Dropout,
    'adaptive_avg_pool2d': nn.AdaptiveAvgPool2d,
    'scaled_dot_product_attention': SpatialReductionAttention,
}


@pytest.mark.parametrize('name', PATCHED)
@both_modes
def test_patched_function(name, training):
    """A function of torch.nn.functional that somebody patched is called, as often as always."""
    model = build('v2_li', training)
    original, counts = getattr(F, name), []

    def counted(*args, **kwargs):
        counts.append(1)
        return original(*args, **kwargs)

    with mock.patch.object(F, name, counted):
        found = model(IMAGE)
    assert_near(found, expected_of('v2_li'))
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda m, *_: calls.append(isinstance(m, PATCHED[name])))
    model(IMAGE)
    assert len(counts) == sum(calls) > 0


@pytest.mark.parametrize('cls', [nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GELU])
def test_patched_class(cls):
    """A stock class whose forward somebody patched."""
    model, calls = build(), []
    original = cls.forward

    def counted(self, x):
        calls.append(self)
        return original(self, x)

    with mock.patch.object(cls, 'forward', counted):
        model(IMAGE)
    assert len(calls) == sum(isinstance(m, cls) for m in model.modules())


# Stock layers of other shapes


def conv_like(layer, kernel=None, **kwargs):
    """A fresh convolution as a layer, but for some arguments."""
    torch.manual_seed(7)
    same = dict(stride=layer.stride, padding=layer.padding, groups=layer.groups)
    kernel = kernel or layer.kernel_size
    return nn.Conv2d(layer.in_channels, layer.out_channels, kernel, **{**same, **kwargs})


def linear_like(layer, bias=True):
    torch.manual_seed(7)
    return nn.Linear(layer.in_features, layer.out_features, bias)


def thinner(model):
    """Prune hidden units away, whole ones."""
    mlp = block_of(model).mlp
    kept = torch.arange(0, mlp.fc1.out_features, 3)
    fc1 = nn.Linear(mlp.fc1.in_features, len(kept))
    fc1.weight.data, fc1.bias.data = mlp.fc1.weight.data[kept], mlp.fc1.bias.data[kept]
    fc2 = nn.Linear(len(kept), mlp.fc2.out_features)
    fc2.weight.data, fc2.bias.data = mlp.fc2.weight.data[:, kept], mlp.fc2.bias.data
    if mlp.dwconv is not None:
        dwconv = nn.Conv2d(len(kept), len(kept), 3, padding=1, groups=len(kept))
        dwconv.weight.data, dwconv.bias.data = mlp.dwconv.weight[kept], mlp.dwconv.bias[kept]
        mlp.dwconv = dwconv
    mlp.fc1, mlp.fc2 = fc1, fc2


def replaced(layer, make):
    """A change that puts a new layer, made of the old one, into the block."""
    name = f'{BLOCK}.{layer}'
    return lambda model: swap(model, name, make(model.get_submodule(name)))


def tanh_gelu(model):
    """Another GELU, which differs so little that the MLP must be made to matter more."""
    mlp = block_of(model).mlp
    mlp.act = nn.GELU('tanh')
    mlp.fc2.weight.data.mul_(30)


def set_on_dropouts(model):
    for module in block_of(model).modules():
        if isinstance(module, nn.Dropout):
            module.p = 1.0
            module.train()


def in_place(name, **attributes):
    """A change of a module's attributes."""

    def change(model):
        for key, value in attributes.items():
            assert hasattr(block_of(model).get_submodule(name), key)
            setattr(block_of(model).get_submodule(name), key, value)

    return change


def dropped_path(model):
    """Drop both branches of a block, nearly surely, in evaluation."""
    block_of(model).drop_path.rate = 1 - 1e-6
    block_of(model).drop_path.train()


def doubled_reduction(model):
    """Put another method on an instance."""
    attn = block_of(model).attn
    reduce = type(attn).reduce
    attn.reduce = types.MethodType(lambda self, x: 2 * reduce(self, x), attn)


CHANGES = {
    'eps of norm1': in_place('norm1', eps=0.5),
    'eps of norm2': in_place('norm2', eps=0.5),
    'eps of the attention norm': in_place('attn.norm', eps=0.5),
    'another number of heads': in_place('attn', num_heads=1),
    'stride of sr': in_place('attn.sr', stride=(2, 2)),
    'padding of sr': in_place('attn.sr', padding=(2, 2)),
    'drop path of an eval model': dropped_path,
    'another reduce': doubled_reduction,
    'fewer hidden units': thinner,
    'q without bias': replaced('attn.q', lambda m: linear_like(m, bias=False)),
    'kv without bias': replaced('attn.kv', lambda m: linear_like(m, bias=False)),
    'proj without bias': replaced('attn.proj', lambda m: linear_like(m, bias=False)),
    'fc1 without bias': replaced('mlp.fc1', lambda m: linear_like(m, bias=False)),
    'fc2 without bias': replaced('mlp.fc2', lambda m: linear_like(m, bias=False)),
    'q as two layers': replaced('attn.q', lambda m: nn.Sequential(linear_like(m), nn.GELU())),
    'norm1 of another eps': replaced('norm1', lambda m: nn.LayerNorm(m.normalized_shape, eps=0.1)),
    'norm1 without weights': replaced(
        'norm1', lambda m: nn.LayerNorm(m.normalized_shape, elementwise_affine=False)
    ),
    'norm2 without bias': replaced('norm2', lambda m: nn.LayerNorm(m.normalized_shape, bias=False)),
    'norm2 as identity': replaced('norm2', lambda m: nn.Identity()),
    'norm1 as RMSNorm': replaced('norm1', lambda m: nn.RMSNorm(m.normalized_shape)),
    'attention norm of another eps': replaced(
        'attn.norm', lambda m: nn.LayerNorm(m.normalized_shape, eps=0.1)
    ),
    'act as ReLU': replaced('mlp.act', lambda m: nn.ReLU()),
    'act as tanh GELU': tanh_gelu,
    'attention as identity': replaced('attn', lambda m: nn.Identity()),
    'MLP as identity': replaced('mlp', lambda m: nn.Identity()),
    'block as identity': lambda model: swap(model, BLOCK, nn.Identity()),
    'one block twice': lambda model: swap(model, 'stages.1.blocks.0', block_of(model)),
    'one layer twice': lambda model: swap(
        model, 'stages.1.blocks.0.attn.q', block_of(model).attn.q
    ),
    'a shared weight': lambda model: setattr(
        block_of(model).attn.q, 'weight', model.stages[1].blocks[0].attn.q.weight
    ),
    'dropout of everything': set_on_dropouts,
    'patch embedding with padding': lambda model: swap(
        model,
        'stages.1.patch_embed.proj',
        conv_like(model.stages[1].patch_embed.proj, padding=2, padding_mode='reflect'),
    ),
}
SR_CHANGES = {
    'sr of another kernel': dict(kernel=2),
    'sr with padding': dict(padding=2),
    'sr with dilation': dict(kernel=2, dilation=2),
    'sr with reflected padding': dict(padding=2, padding_mode='reflect'),
    'sr in groups': dict(groups=4),
    'sr without bias': dict(bias=False),
}
DWCONV_CHANGES = {
    'dwconv of 5 x 5': dict(kernel=5, padding=2),
    'dwconv with dilation': dict(padding=2, dilation=2),
    'dwconv with circular padding': dict(padding_mode='circular'),
    'dwconv without groups': dict(groups=1),
    'dwconv without bias': dict(bias=False),
}


def changes_of(variant):
    changes = dict(CHANGES)
    for name, kwargs in SR_CHANGES.items():
        changes[name] = replaced('attn.sr', lambda m, kwargs=kwargs: conv_like(m, **kwargs))
    if variant != 'v1':
        changes['dilation of dwconv'] = in_place('mlp.dwconv', padding=(2, 2), dilation=(2, 2))
        for name, kwargs in DWCONV_CHANGES.items():
            changes[name] = replaced('mlp.dwconv', lambda m, kwargs=kwargs: conv_like(m, **kwargs))
    if variant == 'v2_li':  # its convolution is 1 x 1
        del changes['sr of another kernel'], changes['sr with dilation']
        changes['another grid'] = in_place('attn.pool', output_size=3)
    return changes


@pytest.mark.parametrize(
    ('variant', 'change'), [(v, change) for v in VARIANTS for change in changes_of(v)]
)
def test_changed_layers(variant, change):
    """Layers that somebody swapped for other stock ones, or changed in place."""
    if change == 'norm1 as RMSNorm' and not hasattr(nn, 'RMSNorm'):
        pytest.skip('PyTorch < 2.4')
    drops = dict(drop_rate=0.1, attn_drop_rate=0.1) if 'dropout' in change else {}
    model = build(variant, **drops)
    changes_of(variant)[change](model)
    with torch.no_grad():
        assert_right(model)
        assert not near(model(IMAGE)[1], expected_of(variant)[1], 2 * FP32)
    assert_right_gradients(model)


def test_dropout_of_an_eval_model():
    """MC dropout: nn.Dropout in training in a model in evaluation draws each time."""
    model = build(drop_rate=0.3)
    with torch.no_grad():
        still = model(IMAGE)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        draws = [model(IMAGE)[0] for _ in range(2)]
    assert_near(still, expected_of('v2'))
    assert not near(*draws, 1e-3) and not near(draws[0], still[0], 1e-3)


# Parameters


@both_versions
def test_averaged_weights_are_seen_at_once(variant):
    """EMA writes into the weights' data, which no counter of versions sees: nothing is cached."""
    model = build(variant)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    with torch.no_grad():
        model(IMAGE), averaged(IMAGE)
        for _ in range(2):
            for parameter in model.parameters():
                parameter.data.copy_(parameter * 1.1)
            averaged.update_parameters(model)
            assert_right(model)
            assert_near(averaged(IMAGE), exact(averaged.module)(IMAGE.double()))
        for parameter in model.parameters():
            parameter.data = parameter.data.roll(1, 0)
        assert_right(model)
        weights = {name: 1.2 * p for name, p in model.state_dict().items()}
        model.load_state_dict(weights, assign=True)
        assert_right(model)


@pytest.mark.parametrize('frozen', ['attn', 'mlp', 'mlp.fc1', 'attn.q', 'attn.kv', 'norm1', ''])
@every_variant
def test_frozen_parameters(variant, frozen):
    """They get no gradient, and all the others the right one."""
    model = build(variant, training=True)
    block_of(model).get_submodule(frozen).requires_grad_(False)
    loss_of(model(IMAGE)).backward()
    expected = gradients(exact(model))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad
        assert parameter.grad is None or near(parameter.grad, expected[name], 1e-3), name


@both_versions
def test_frozen_model_and_trained_image(variant):
    """The gradient of an image, where nothing else needs one."""
    model = build(variant).requires_grad_(False)

    def run(model, image):
        image = image.clone().requires_grad_()
        return torch.autograd.grad(loss_of(model(image)), image)

    assert_near(run(model, IMAGE), run(exact(model), IMAGE.double()), 1e-3)


@both_versions
def test_hooks_of_parameters(variant):
    """Hooks on parameters see and change gradients; those after accumulation fire once."""
    model = build(variant, training=True)
    expected, done = gradients(exact(model)), []
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: 2 * grad)
        parameter.register_post_accumulate_grad_hook(done.append)
    loss_of(model(IMAGE)).backward()
    assert len(done) == len({id(p) for p in done}) == len(expected)
    for name, parameter in model.named_parameters():
        assert near(parameter.grad / 2, expected[name], 1e-3)


@both_versions
def test_gradients_add_up(variant):
    """Two backward passes through one graph, and two into the same gradients."""
    model = build(variant, training=True)
    expected = gradients(exact(model))
    loss = loss_of(model(IMAGE))
    loss.backward(retain_graph=True)
    loss.backward()
    loss_of(model(IMAGE)).backward()
    for name, parameter in model.named_parameters():
        assert near(parameter.grad, 3 * expected[name], 1e-3)


@both_versions
def test_weight_changed_before_backward(variant):
    """A weight that is changed in place between the passes is an error, as PyTorch has it."""
    model = build(variant, training=True)
    loss = loss_of(model(IMAGE))
    with torch.no_grad():
        block_of(model).mlp.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


LOSSES = {
    'sum': lambda outs: sum(out.sum() for out in outs),
    'one image': lambda outs: outs[1][0].square().sum(),
    'a view': lambda outs: outs[0][..., 0].sum() + outs[3][..., ::2].square().sum(),
}


@pytest.mark.parametrize('loss', LOSSES)
@every_variant
def test_gradients_of_views(variant, loss):
    """Gradients that come expanded, strided or not at all."""
    model = build(variant, training=True)

    def run(model, image):
        given = list(model.parameters())
        return torch.autograd.grad(LOSSES[loss](model(image)), given, allow_unused=True)

    for found, expected in zip(run(model, IMAGE), run(exact(model), IMAGE.double())):
        assert (found is None) == (expected is None)
        zero = expected is None or expected.abs().max() < 1e-6  # the sum of a norm's output
        assert zero or near(found, expected, 2e-3)


@every_variant
def test_gradients_of_some(variant):
    """A backward pass for one parameter alone, and hooks that wait for all."""
    model = build(variant, training=True)
    done = []
    torch.autograd.graph.register_multi_grad_hook(list(model.parameters()), done.append)
    loss_of(model(IMAGE)).backward()
    assert len(done) == 1 and len(done[0]) == len(gradients_of(variant))
    for name in ('attn.q.weight', 'attn.kv.bias', 'norm1.weight', 'mlp.fc1.weight', 'mlp.fc2.bias'):
        model.zero_grad()
        parameter = block_of(model).get_parameter(name)
        loss_of(model(IMAGE)).backward(inputs=[parameter])
        assert near(parameter.grad, gradients_of(variant)[f'{BLOCK}.{name}'], 1e-3)
        assert sum(p.grad is not None for p in model.parameters()) == 1


@every_variant
def test_many_gradients_at_once(variant):
    """is_grads_batched, which vectorised Jacobians and Hessians use."""

    def run(model, image):
        out = model(image)[-1].flatten()[:5]
        layers = [block_of(model).mlp.fc1.weight, block_of(model).attn.kv.weight]
        rows = torch.eye(5, dtype=image.dtype)
        return torch.autograd.grad(out, layers, rows, is_grads_batched=True)

    model = build(variant)
    assert_near(run(model, IMAGE), run(exact(model), IMAGE.double()), 1e-3)


@every_variant
def test_layout_of_weights(variant):
    """Weights whose memory lies another way, as .t() and expand leave it."""
    model = build(variant)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            weight = module.weight.data
            module.weight.data = weight.transpose(0, 1).contiguous().transpose(0, 1)
    assert_right(model)
    assert_right_gradients(model)
    fc1 = block_of(model).mlp.fc1
    fc1.weight.data = fc1.weight.data[:1].expand_as(fc1.weight)
    fc1.bias.data = fc1.bias.data[:1].expand_as(fc1.bias)
    assert_right(model)


# Tensors of other classes


class Scaled(torch.Tensor):
    """A weight of another class: F.linear with it halves the result."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        if function in (F.linear, F.conv2d, torch.conv2d):
            return out.as_subclass(torch.Tensor) / 2
        return out


class Tagged(torch.Tensor):
    """An image of another class."""


@both_modes
@every_weighted_layer
def test_weight_of_another_tensor_class(variant, layer, training):
    model, plain = build(variant, training), build(variant)
    module = model.get_submodule(layer)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Scaled))
    assert type(module.weight) is not nn.Parameter
    for tensor in plain.get_submodule(layer).parameters():
        tensor.data.div_(2)
    with torch.set_grad_enabled(training):
        assert_near(model(IMAGE), exact(plain)(IMAGE.double()))


@every_variant
def test_image_of_another_tensor_class(variant):
    """Operations keep the class of a tensor, as PyTorch has it."""
    with torch.no_grad():
        found = build(variant)(IMAGE.as_subclass(Tagged))
    assert {type(out) for out in found} == {Tagged}
    plain = [out.as_subclass(torch.Tensor) for out in found]
    assert_near(plain, expected_of(variant))


# Modes


class Functions(torch.overrides.TorchFunctionMode):
    """Counts the calls of functions."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, '__name__', ''))
        return function(*args, **(kwargs or {}))


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the calls of operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function.overloadpacket))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('mode', [Functions, Operations])
@both_modes
@every_variant
def test_modes_see_the_textbook(variant, training, mode):
    """What a mode sees in fp32 is what it sees in float64."""
    model = build(variant, training)
    reference, image = exact(model), IMAGE.double()
    with torch.set_grad_enabled(training):
        with mode() as seen:
            found = model(IMAGE)
        with mode() as expected:
            outs = reference(image)
    assert_near(found, outs)
    assert seen.names and operations(seen) == operations(expected)


def operations(mode):
    """What a mode saw, but for reading attributes and casting."""
    return [name for name in mode.names if name not in ('__get__', 'to', 'aten._to_copy')]


@both_versions
def test_default_device(variant):
    """torch.set_default_device and torch.device as a context, which are modes too."""
    with torch.device('cpu'):
        assert_right(build(variant))
    torch.set_default_device('cpu')
    try:
        assert_right(build(variant))
        assert_right_gradients(build(variant, training=True))
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    """PyTorch then fills fresh memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS = {
    'deterministic': deterministic,
    'default dtype float64': lambda: default_dtype(torch.float64),
    'default dtype bfloat16': lambda: default_dtype(torch.bfloat16),
    'without oneDNN': lambda: torch.backends.mkldnn.flags(enabled=False),
}


@pytest.mark.parametrize('setting', SETTINGS)
@every_variant
def test_settings(variant, setting):
    """Global settings of PyTorch's."""
    model, expected = build(variant), gradients_of(variant)
    with SETTINGS[setting]():
        for size, image in IMAGES.items():
            with torch.no_grad():
                outs = model(image)
            assert_near(outs, expected_of(variant, size))
            assert {out.dtype for out in outs} == {torch.float32}
        assert_right_gradients(model, expected=expected)


@pytest.mark.parametrize('with_cp', [False, True])
@both_versions
def test_random_numbers(variant, with_cp):
    """With the same seed, a model that is watched drops the same paths as one that is not."""
    model = build(variant, training=True, drop_path_rate=0.6, with_cp=with_cp)
    watched = copy.deepcopy(model)
    for module in watched.modules():
        module.register_forward_hook(lambda *_: None)
    torch.manual_seed(0)
    found = gradients(model)
    torch.manual_seed(0)
    expected = gradients(watched)
    assert all(near(found[name], expected[name], 1e-3) for name in expected)
    assert not near(found[f'{BLOCK}.norm2.bias'], gradients_of(variant)[f'{BLOCK}.norm2.bias'])


@both_versions
def test_images_that_are_not_finite(variant):
    """A bad image spoils its own features only."""
    model = build(variant)
    for bad in (math.nan, math.inf):
        image = IMAGE.clone()
        image[0, 0, 0, 0] = bad
        for context in (torch.no_grad, torch.enable_grad):
            with context():
                outs = model(image)
            assert not any(out[0].isfinite().all() for out in outs)
            assert_near([out[1] for out in outs], [out[1] for out in expected_of(variant)])


@every_variant
def test_no_images(variant):
    """A batch of none."""
    model = build(variant)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            outs = model(IMAGE[:0])
        assert [out.shape[1:] for out in outs] == [out.shape[1:] for out in expected_of(variant)]


@pytest.mark.parametrize('backend', ['MATH', 'FLASH_ATTENTION'])
@both_modes
@every_variant
def test_chosen_attention_kernel(variant, training, backend):
    """A kernel that the user chooses for F.scaled_dot_product_attention."""
    with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
        assert_right(build(variant, training))
        assert_right_gradients(build(variant, training))


@both_modes
@every_variant
def test_memory_formats(variant, training):
    """Channels-last images and weights, and strided views."""
    model = build(variant, training)
    expected = exact(model)(IMAGE.double())
    assert_near(model(IMAGE.contiguous(memory_format=torch.channels_last)), expected)
    assert_near(model(IMAGE.transpose(2, 3).contiguous().transpose(2, 3)), expected)
    assert_near(model(IMAGE.repeat_interleave(2, 3)[..., ::2]), expected)
    outs = model.to(memory_format=torch.channels_last)(IMAGE)
    assert_near(outs, expected)
    assert all(out.is_contiguous() for out in outs)
    assert_right_gradients(model)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
@every_variant
def test_dtypes(variant, dtype):
    """Whole models of other dtypes; also without memory."""
    model = build(variant).to(dtype)
    outs = model(IMAGE.to(dtype))
    assert {out.dtype for out in outs} == {dtype}
    assert_near(outs, expected_of(variant), BF16)
    found = copy.deepcopy(model).to('meta')(IMAGE.to('meta', dtype))
    assert [out.shape for out in found] == [out.shape for out in outs]
    assert {out.dtype for out in found} == {dtype}


@both_modes
@every_variant
def test_autocast(variant, training):
    """bf16 and fp16 autocast: features near those of float64, gradients near theirs."""
    for dtype in (torch.bfloat16, torch.float16):
        model = build(variant, training)
        expected = gradients(exact(model))
        with torch.autocast('cpu', dtype):
            outs = model(IMAGE)
        assert_near(outs, exact(model)(IMAGE.double()), BF16)
        loss_of([out.float() for out in outs]).backward()
        for name, parameter in model.named_parameters():
            apart = (parameter.grad - expected[name]).norm() / expected[name].norm()
            assert apart < 0.2, name


# Tracing


@pytest.mark.parametrize('size', IMAGES)
@every_variant
def test_jit_trace(variant, size):
    """The same numbers, in later calls too, and for images of other sizes."""
    model = build(variant)
    traced = torch.jit.trace(model, IMAGES[size])
    for image in (IMAGES[size].flip(3), *IMAGES.values(), torch.ones(3, 3, 72, 100)):
        assert_near(traced(image), exact(model)(image.double()))


@every_variant
def test_make_fx(variant):
    """A graph of PyTorch's own operations."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model = build(variant)
    graph = make_fx(model)(IMAGE)
    assert_near(graph(IMAGE.flip(3)), exact(model)(IMAGE.flip(3).double()))
    called = [node.target for node in graph.graph.nodes if node.op == 'call_function']
    assert called.count(torch.ops.aten.convolution.default) == sum(
        isinstance(m, nn.Conv2d) for m in model.modules()
    )
    assert all('aten' in str(target) or 'getitem' in str(target) for target in called)


@every_variant
def test_symbolic_trace(variant):
    """torch.fx.symbolic_trace works, or says in a sentence what to use."""
    model = build(variant)
    try:
        graph = torch.fx.symbolic_trace(model)
    except Exception as error:
        text = str(error)
        assert 'torch.export' in text or 'make_fx' in text
        assert '\n' not in text and text.endswith('.')
    else:
        assert_near(graph(IMAGE), exact(model)(IMAGE.double()))


@both_modes
@every_variant
def test_compile(variant, training):
    """torch.compile makes one graph."""
    model = build(variant, training)
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    assert_near(compiled(IMAGE), exact(model)(IMAGE.double()))
    loss_of(compiled(IMAGE)).backward()
    expected = gradients(exact(model))
    assert all(near(p.grad, expected[n], 1e-3) for n, p in model.named_parameters())
    torch._dynamo.reset()


@both_versions
def test_compiled_block(variant):
    """One compiled block among others that run as they are."""
    model = build(variant)
    block_of(model).compile(backend='eager', fullgraph=True)
    assert_near(model(IMAGE), expected_of(variant))
    torch._dynamo.reset()


@every_variant
def test_export(variant):
    """torch.export with a fixed size."""
    model = build(variant)
    program = torch.export.export(model, (IMAGE,))
    assert_near(program.module()(IMAGE), exact(model)(IMAGE.double()))


def made_fx(model, image):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(model)(image)(image)


def compiled(model, image):
    outs = torch.compile(model, backend='eager', fullgraph=True)(image)
    torch._dynamo.reset()
    return outs


def called_with_parameters(model, image):
    given = {name: p.detach().clone() for name, p in model.named_parameters()}
    return torch.func.functional_call(model, given, image)


def called_by_vmap(model, image):
    return [out.flatten(0, 1) for out in torch.func.vmap(model)(image[:, None])]


WAYS = {
    'torch.jit.trace': lambda model, image: torch.jit.trace(model, image)(image),
    'torch.export': lambda model, image: torch.export.export(model, (image,)).module()(image),
    'torch.compile': compiled,
    'make_fx': made_fx,
    'functional_call': called_with_parameters,
    'vmap': called_by_vmap,
}


@pytest.mark.parametrize('way', WAYS)
@both_versions
def test_ways_in_bf16(variant, way):
    """Ways to call a model that computes in bf16 by itself."""
    model = build(variant, compute_dtype='bfloat16')
    assert_near(WAYS[way](model, IMAGE), expected_of(variant), BF16)


def test_class_token():
    """The stage with a class token: hooks, gradients, tracing and vmap."""
    model = PVT(SMALL, out_indices=(2, 3), with_cls_token=True).eval()
    generator = torch.Generator().manual_seed(6)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    assert all(answers(model))
    assert_right(model)
    assert_right_gradients(model)
    reference = exact(model)
    for layer in ('', '.norm1', '.attn.q', '.attn.kv', '.mlp.fc1'):
        layer = f'stages.3.blocks.0{layer}'
        (seen,) = watch(model, layer)
        (expected,) = watch(reference, layer, IMAGE.double())
        assert_near(seen, expected)
    large = reference(IMAGES['large'].double())
    assert_near(torch.jit.trace(model, IMAGE)(IMAGES['large']), large)
    assert_near(called_by_vmap(model, IMAGE), reference(IMAGE.double()))


# Autograd


@contextlib.contextmanager
def offloaded():
    """Saved tensors packed as copies in float64, as offloading does elsewhere."""
    packed = []

    def pack(x):
        packed.append(1)
        return x.detach().double() if x.is_floating_point() else x, x.dtype

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda pair: pair[0].to(pair[1])):
        yield
    assert packed


AUTOGRAD = {
    'saved_tensors_hooks': offloaded,
    'save_on_cpu': torch.autograd.graph.save_on_cpu,
    'anomaly mode': torch.autograd.detect_anomaly,
    'profiler': lambda: torch.profiler.profile(with_modules=True, record_shapes=True),
    'one thread': lambda: torch.autograd.set_multithreading_enabled(False),
}


@pytest.mark.filterwarnings('ignore:Anomaly Detection')
@pytest.mark.parametrize('context', AUTOGRAD)
@every_variant
def test_gradients_under(variant, context):
    """Gradients under what watches or changes how autograd works."""
    model = build(variant, training=True)
    with AUTOGRAD[context]():
        found = gradients(model)
    assert all(near(grad, found[name], 1e-3) for name, grad in gradients_of(variant).items())


@both_versions
def test_saved_tensors_hooks_decide(variant):
    """What the hooks give back is what gradients are made from."""
    model = build(variant, training=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, torch.zeros_like):
        found = gradients(model)
    assert not found['stages.0.patch_embed.proj.weight'].any()


@pytest.mark.filterwarnings('ignore:Anomaly Detection')
def test_anomaly_mode_finds_a_nan():
    """It names a function where a gradient is not a number."""
    model = build(training=True)
    block_of(model).register_full_backward_hook(lambda *_: (torch.full((2, 8, 12, 32), math.nan),))
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match='nan values'):
        gradients(model)


def wrapped(**kwargs):
    """Put every block into PyTorch's wrapper for activation checkpointing."""
    wrapper = pytest.importorskip(
        'torch.distributed.algorithms._checkpoint.checkpoint_wrapper', exc_type=ImportError
    )

    def change(model):
        for stage in model.stages:
            for i, block in enumerate(stage.blocks):
                stage.blocks[i] = wrapper.checkpoint_wrapper(block, **kwargs)

    return change


def reentrant(model):
    for stage in model.stages:
        for block in stage.blocks:
            forward = block.forward
            block.forward = lambda x, forward=forward: recompute(forward, x, use_reentrant=True)


def selective(model):
    """Save the results of matmuls only."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    saved = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    wrapped(context_fn=lambda: create_selective_checkpoint_contexts(saved))(model)


CHECKPOINTED = {'wrapper': wrapped(), 'reentrant': reentrant, 'selective': selective}


@pytest.mark.parametrize('kind', CHECKPOINTED)
@every_variant
def test_checkpointed_blocks(variant, kind):
    """Activations that are computed again in the backward pass."""
    if kind == 'selective':
        pytest.importorskip('torch.distributed.tensor', reason='PyTorch < 2.5')
    model = build(variant, training=True)
    expected = list(gradients(exact(model)).values())
    CHECKPOINTED[kind](model)
    loss_of(model(IMAGE)).backward()
    found = [p.grad for p in model.parameters()]
    assert all(near(x, y, 1e-3) for x, y in zip(found, expected))


@both_modes
@every_variant
def test_with_cp(variant, training):
    """The backbone's own option, with hooks that fire in both forward passes."""
    model = build(variant, training, with_cp=True)
    assert_right_gradients(model, expected=gradients_of(variant))
    calls = []
    block_of(model).mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    assert_right_gradients(model, expected=gradients_of(variant))
    assert len(calls) == 2


@both_versions
def test_threads(variant):
    """Passes in several threads at a time."""
    model = build(variant)
    expected = exact(model)(IMAGE.double())
    found = []

    def run():
        with torch.no_grad():
            for _ in range(3):
                found.append(model(IMAGE))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    for outs in found:
        assert_near(outs, expected)


def test_profiler_names_modules():
    """Each layer's operation is in the profile."""
    model = build()
    with torch.profiler.profile(with_modules=True, with_stack=True) as profile, torch.no_grad():
        found = model(IMAGE)
    assert_near(found, exact(model)(IMAGE.double()))
    assert len(profile.key_averages())


# Several processes; here there is one


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip('PyTorch was built without gloo')
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh('cpu', (1,))
    dist.destroy_process_group()


@both_versions
def test_fully_shard(variant, group):
    """FSDP2 on every block."""
    fsdp = pytest.importorskip('torch.distributed.fsdp')
    if not hasattr(fsdp, 'fully_shard'):
        pytest.skip('PyTorch < 2.6')
    model = build(variant, training=True)
    reference = exact(model)
    expected, grads = reference(IMAGE.double()), gradients(reference)
    for stage in model.stages:
        for block in stage.blocks:
            fsdp.fully_shard(block, mesh=group)
    assert_near(model(IMAGE), expected)
    loss_of(model(IMAGE)).backward()
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if 'blocks' in name else parameter.grad
        assert near(grad, grads[name], 1e-3), name
    with torch.no_grad():
        assert_near(model.eval()(IMAGE), expected)


@both_modes
def test_tensor_parallel(group, training):
    """DTensor weights: an MLP whose layers are split over processes."""
    parallel = pytest.importorskip('torch.distributed.tensor.parallel')
    model = build('v1', training)
    reference = exact(model)
    expected, grads = reference(IMAGE.double()), gradients(reference)
    plan = {'fc1': parallel.ColwiseParallel(), 'fc2': parallel.RowwiseParallel()}
    for stage in model.stages:
        for block in stage.blocks:
            parallel.parallelize_module(block.mlp, group, plan)
    assert type(block_of(model).mlp.fc1.weight) is not nn.Parameter
    assert_near(model(IMAGE), expected)
    loss_of(model(IMAGE)).backward()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, 'full_tensor') else grad
        assert near(grad, grads[name], 1e-3), name


@both_versions
def test_replicated_dtensors(variant, group):
    """Every parameter and the image as DTensors."""
    tensor = pytest.importorskip('torch.distributed.tensor')
    model = build(variant)
    expected = exact(model)(IMAGE.double())
    tensor.distribute_module(model, group)
    image = tensor.distribute_tensor(IMAGE, group)
    with torch.no_grad(), plain_attention():
        found = model(image)
    assert all(isinstance(out, tensor.DTensor) for out in found)
    assert_near([out.full_tensor() for out in found], expected)


@both_versions
def test_distributed_data_parallel(variant, group):
    """DDP, whose hooks sit on parameters."""
    model = build(variant, training=True)
    expected = gradients(exact(model))
    parallel = nn.parallel.DistributedDataParallel(model)
    loss_of(parallel(IMAGE)).backward()
    assert all(near(p.grad, expected[n], 1e-3) for n, p in model.named_parameters())


# The cost of the question


@pytest.mark.parametrize(('cls', 'arch'), [(PVT, 'small'), (PVTv2, 'b2')])
@both_modes
def test_the_question_is_cheap(cls, arch, training):
    """Whether the fast path applies is answered in far less time than a block takes.

    tests/stress/question_cost.py prints the share of a block; here the bound is wide, since other
    processes may be busy.
    """
    model = cls(arch).train(training)
    side = 224
    with torch.set_grad_enabled(training):
        for stage, stride in zip(model.stages, (4, 8, 16, 32)):
            block = stage.blocks[0]
            x = torch.randn(1, side // stride, side // stride, stage.dim)
            ((args, _),) = questions(block, x)
            times = []
            for _ in range(200):
                start = time.perf_counter()
                assert fast.applies(*args)
                times.append(time.perf_counter() - start)
            assert statistics.median(times) < 100e-6
