"""The fast path gives what the textbook gives, gradients included, for every kind of CPU."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import SMALL
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pvt_mm import PVT, PVTv2
from pvt_mm.models import fast
from pvt_mm.models.context import is_autocast
from pvt_mm.models.fast import attention, branches, cpu, gemm, mlp
from pvt_mm.models.layers import Block, Mlp, PatchEmbed, SpatialReductionAttention

few = settings(max_examples=25, deadline=None)

FP32, BF16 = torch.float32, torch.bfloat16
#: What is true of each kind of CPU, and false of the others; how bf16 is multiplied stays as here.
CPUS = {
    'avx2': ['mkl_is_faster', 'fused_attention', 'fused_attention_backward', 'bf16_is_slow'],
    'intel': ['fused_attention', 'fused_attention_backward'],
    'zen4': ['fused_attention_backward'],
    'zen5': ['mkl_is_narrow'],
}
CHOICES = ('mkl_is_faster', 'mkl_is_narrow', 'fused_attention', 'fused_attention_backward')


@pytest.fixture(autouse=True, params=CPUS.values(), ids=CPUS)
def this_cpu(monkeypatch, request):
    """All kinds of CPU, with chunks of a few rows, so that small tensors are cut as large ones."""
    choices = {name: name in request.param for name in {*CHOICES, *request.param}}
    pretend(monkeypatch, chunk=2**9, **choices)
    monkeypatch.setattr(mlp, 'SAVED', 2**9)
    monkeypatch.setattr(mlp, 'CHANNELS', 16)
    monkeypatch.setattr(attention, 'MANY_SCORES', 1)


def pretend(monkeypatch, **traits):
    """Have the kernels see a CPU with other traits."""
    changed = cpu.traits()._replace(**traits)
    monkeypatch.setattr(cpu, 'traits', lambda: changed)


def draw(*shape, seed, dtype=FP32, grad=False):
    """Standard normal values that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)


def drawn(module, seed):
    """A module whose parameters are standard normal."""
    for i, parameter in enumerate(module.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed + i + 1)
    return module


def mlp_case(seed, batch, height, width, dim, hidden, depthwise, relu=False):
    """Tokens and an MLP, weights of about unit gain."""
    x = draw(batch, height, width, dim, seed=seed)
    return x, drawn(Mlp(dim, hidden, depthwise, relu and depthwise), seed)


def close(ours, plain, relative=1e-5, absolute=1e-5):
    """Compare relative to the root mean square of the plain values, or where they nearly cancel."""
    scale = plain.detach().square().mean().sqrt().item()
    assert ours.shape == plain.shape
    assert (ours - plain).abs().max().item() < relative * scale + absolute


def exact_and_rounding(function, *tensors):
    """Results of doubles, and how far rounding of the tensors to six digits moves each of them.

    So much a kernel in fp32 may lose, which is little unless sums nearly cancel.
    """
    doubles = [t.detach().double() for t in tensors]
    exact = function(*doubles)
    largest = [0.0] * len(exact)
    for seed in range(4):
        noise = (1 + 1e-6 * draw(*t.shape, seed=seed + 4 * i) for i, t in enumerate(doubles))
        moved = function(*(t * n for t, n in zip(doubles, noise)))
        moves = ((a - b).abs().max().item() for a, b in zip(moved, exact))
        largest = list(map(max, largest, moves))
    return exact, largest


def plain_attention(query, key, value, num_heads):
    """Attention by PyTorch's own operation."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


mlps = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 10**6),
        batch=st.integers(1, 3),
        height=st.integers(1, 12),
        width=st.integers(1, 12),
        dim=st.sampled_from([1, 8, 20]),
        hidden=st.sampled_from([1, 16, 40]),
        depthwise=st.booleans(),
        relu=st.booleans(),
    )
)


# The MLP


@few
@given(mlps)
def test_mlp_in_chunks_is_the_plain_one(shape):
    """Row tiles, their halos and groups of hidden channels leave no seam."""
    x, module = mlp_case(**shape)
    with torch.no_grad():
        close(mlp.mlp_branch(x, module, FP32), module(x))


@few
@given(mlps, st.booleans())
def test_mlp_added_in_place_is_the_plain_branch(shape, rows_first):
    """Tiles read the rows that the tile before has yet to write."""
    x, module = mlp_case(**shape)
    norm = nn.LayerNorm(shape['dim'])
    with torch.no_grad():
        plain = x + module(norm(x))
        close(mlp.add_mlp(x.clone(), norm, module, FP32), plain)


@pytest.mark.parametrize(('side', 'together'), [(2, [4, 4, 1]), (4, [1] * 9), (8, [1] * 36)])
def test_small_images_go_together(monkeypatch, side, together):
    """As many as half a chunk holds; one alone where it holds less, in tiles where need be."""
    seen = []
    run = mlp.depthwise_gelu
    monkeypatch.setattr(
        mlp, 'depthwise_gelu', lambda x, *args: seen.append(len(x)) or run(x, *args)
    )
    x, module = mlp_case(0, 9, side, side, 8, 16, depthwise=True)
    with torch.no_grad():
        mlp.mlp_branch(x, module, FP32)
    assert seen == together


@pytest.mark.parametrize('kernel', ['gemm', '_activated'])
def test_one_chunk_is_held_at_a_time(monkeypatch, kernel):
    """Scores and hidden layers are freed before the next ones are made."""
    made, room = [], attention if kernel == 'gemm' else mlp
    run = getattr(room, kernel)

    def watched(x, *args):
        if kernel == '_activated' or args[0].shape[0] == 40:  # a GEMM with 40 keys
            assert all(chunk.expired() for chunk in made)
            out = run(x, *args)
            made.append(StorageWeakRef(out.untyped_storage()))
            return out
        return run(x, *args)

    monkeypatch.setattr(room, kernel, watched)
    x, module = mlp_case(0, 1, 6, 6, 8, 40, depthwise=True)
    with torch.no_grad():
        mlp.mlp_branch(x, module, FP32)
    query, both = attention_case(0, 1, 36, 40, 2, 8)
    attention.chunked_attention(query, *both.chunk(2, -1), 2)
    assert len(made) > 2


@pytest.mark.parametrize('depthwise', [False, True])
def test_a_small_hidden_layer_is_saved(monkeypatch, depthwise):
    """Up to SAVED elements it is not recomputed; above, nothing but the input is saved."""
    x, module = mlp_case(0, 1, 4, 4, 8, 32, depthwise=depthwise)
    elements = 4 * 4 * 32 * (2 if depthwise else 1)
    made = []
    hidden = mlp._hidden
    monkeypatch.setattr(mlp, '_hidden', lambda *args: made.append(1) or hidden(*args))
    grads = []
    for saved in (elements, elements - 1):
        monkeypatch.setattr(mlp, 'SAVED', saved)
        out = mlp.mlp_branch(x, module, FP32)
        sizes = [t.numel() for t in out.grad_fn.saved_tensors if t is not None]
        assert (sizes.count(4 * 4 * 32) == 2) == (saved == elements)
        before = len(made)
        grads.append(torch.autograd.grad(out.square().sum(), list(module.parameters())))
        assert (len(made) == before) == (saved == elements)
    for a, b in zip(*grads):
        close(a, b)


@few
@given(mlps)
def test_mlp_gradients_are_the_plain_ones(shape):
    """Activations recomputed in the backward pass give autograd's own gradients."""
    x, module = mlp_case(**shape)
    names = [name for name, _ in module.named_parameters()]
    weights = draw(*x.shape, seed=9)

    def gradients(function, weights, x, *parameters):
        inputs = [t.detach().requires_grad_() for t in (x, *parameters)]
        out = function(inputs[0], dict(zip(names, inputs[1:])))
        return torch.autograd.grad((out * weights).sum(), inputs)

    def plain(x, parameters):
        return torch.func.functional_call(module, parameters, (x,))

    def ours(x, parameters):
        relu = shape['relu'] and shape['depthwise']
        copied = Mlp(shape['dim'], shape['hidden'], shape['depthwise'], relu)
        for name, parameter in parameters.items():
            layer, leaf = name.split('.')
            del copied.get_submodule(layer)._parameters[leaf]
            setattr(copied.get_submodule(layer), leaf, parameter)
        return mlp.mlp_branch(x, copied, FP32)

    parameters = list(module.parameters())
    exact = exact_and_rounding(lambda *tensors: gradients(plain, *tensors), weights, x, *parameters)
    for a, b, rounding in zip(gradients(ours, weights, x, *parameters), *exact):
        close(a, b, absolute=1e-5 + rounding)


@pytest.mark.parametrize('depthwise', [False, True])
@pytest.mark.parametrize('saved', [0, 2**20])
def test_mlp_gradients_against_finite_differences(depthwise, saved, monkeypatch):
    """First and second derivatives in double precision, over several chunks and with the ReLU."""
    monkeypatch.setattr(mlp, 'SAVED', saved)
    x, module = mlp_case(3, 2, 3, 4, 3, 70, depthwise, relu=True)
    inputs = [t.detach().double().requires_grad_() for t in (x, *module.parameters())]
    x, *parameters = inputs
    fc1, dwconv, fc2 = parameters[:2], parameters[2:-2], parameters[-2:]

    def function(x, weight1, bias1, weight2, bias2, dw_weight=None, dw_bias=None):
        return mlp.MlpFunction.apply(
            x, weight1, bias1, weight2, bias2, dw_weight, dw_bias, depthwise, torch.float64
        )

    tensors = (x, *fc1, *fc2, *dwconv)
    torch.autograd.gradcheck(function, tensors, fast_mode=True)
    torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


# Matrix multiplications and convolutions


@pytest.mark.parametrize(('dtype', 'tolerance'), [(FP32, 1e-4), (BF16, 0.05)])
@few
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 40), sides=st.sampled_from([1, 8, 70]))
def test_weight_gradients_sum_over_the_tokens(dtype, tolerance, seed, tokens, sides):
    """By a GEMM or by a convolution."""
    grad, x = draw(tokens, sides, seed=seed), draw(tokens, 24, seed=seed + 1)
    grad, x = grad.to(dtype), x.to(dtype)
    close(gemm.weight_grad(grad, x).float(), grad.float().t() @ x.float(), tolerance)


@pytest.mark.parametrize('channels', [3, 4, 5, 8, 16, 24, 31, 32, 64])
@pytest.mark.parametrize('patches', [1, 2, 5])
@pytest.mark.parametrize(
    ('kernel', 'stride', 'padding'), [(2, 2, 0), (4, 4, 0), (8, 8, 0), (3, 2, 1), (7, 4, 3)]
)
def test_convolutions_in_bf16_are_right(channels, patches, kernel, stride, padding):
    """With AMX, oneDNN's own are off by as much as their results in some of these."""
    width = stride * patches + (stride - 1 if not padding else 0)  # the last ones are no patch
    x = draw(1, 33, width, channels, seed=0)
    conv = drawn(nn.Conv2d(channels, 16, kernel, stride, padding), 1)
    with torch.no_grad():
        plain = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        rough = gemm.convolution(x, conv, BF16).float()
    assert 0 < (rough - plain).norm() < 0.02 * plain.norm()


@few
@given(
    st.integers(0, 10**6),
    st.sampled_from([(5,), (2, 3), (2, 3, 4), (1, 1)]),
    st.sampled_from([1, 8, 20]),
    st.sampled_from([1, 16, 40]),
    st.booleans(),
)
def test_linear_is_the_plain_one(seed, lead, inner, outer, grad):
    """With and without autograd, values and gradients."""
    x = draw(*lead, inner, seed=seed, grad=grad)
    layer = drawn(nn.Linear(inner, outer), seed).requires_grad_(grad)
    ours, plain = gemm.linear(x, layer, FP32), layer(x)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    if grad:
        inputs = (x, *layer.parameters())
        ours = torch.autograd.grad(ours.square().sum(), inputs)
        plain = torch.autograd.grad(plain.square().sum(), inputs)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_linear_can_be_differentiated_twice():
    """PyTorch's gradgradcheck in double precision."""
    inputs = [draw(*shape, seed=1, dtype=torch.float64, grad=True) for shape in ((5, 3), (4, 3))]
    bias = draw(4, seed=2, dtype=torch.float64, grad=True)
    torch.autograd.gradgradcheck(gemm.LinearFunction.apply, (*inputs, bias))


# Attention

attentions = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 10**6),
        batch=st.integers(1, 3),
        queries=st.integers(1, 70),
        keys=st.integers(1, 40),
        heads=st.integers(1, 4),
        dim=st.sampled_from([1, 8, 20]),
    )
)


def attention_case(seed, batch, queries, keys, heads, dim, **kwargs):
    """Queries, and keys and values as the two halves of one tensor, as the layers give them."""
    query = draw(batch, queries, heads * dim, seed=seed, **kwargs)
    both = draw(batch, keys, 2 * heads * dim, seed=seed + 1, **kwargs)
    return query, both


@pytest.mark.parametrize('threads', [1, 2, 3, 64])
@pytest.mark.parametrize('heads', [1, 2, 5])
def test_queries_are_split_over_threads(monkeypatch, threads, heads):
    """However many threads share the queries of a batch, results and gradients are the same."""
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    inputs = [draw(2, n, 20, seed=n, grad=True) for n in (36, 7, 8)]
    inputs[2] = draw(2, 7, 20, seed=9, grad=True)
    grad = draw(2, 36, 20, seed=3)
    ours = attention.split_fused_attention(*inputs, heads)
    plain = plain_attention(*inputs, heads)
    close(ours, plain)
    pairs = (torch.autograd.grad(out, inputs, grad) for out in (ours, plain))
    for a, b in zip(*pairs):
        close(a, b)


def test_one_head_is_shared_by_all_threads(monkeypatch):
    """PyTorch's backward pass gets as many images as there are threads."""
    calls = []
    fused = attention.fused_attention
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
    monkeypatch.setattr(
        attention, 'fused_attention', lambda *args: calls.append(args[0].shape) or fused(*args)
    )
    x = draw(1, 36, 8, seed=0, grad=True)
    attention.split_fused_attention(x, x, x, 1)
    attention.split_fused_attention(x, x, x, 4)
    assert calls == [(4, 9, 8), (1, 36, 8)]


@pytest.mark.parametrize(('dtype', 'sizes'), [(FP32, [12, 12, 3]), (BF16, [27])])
def test_chunks_in_bf16_are_three_times_as_large(monkeypatch, dtype, sizes):
    """12 queries of 40 keys are a chunk of 2**9 elements."""
    seen, run = [], attention.gemm
    monkeypatch.setattr(attention, 'gemm', lambda x, *args: seen.append(len(x)) or run(x, *args))
    query, both = attention_case(0, 1, 27, 40, 1, 8, dtype=dtype)
    attention.chunked_attention(query, *both.chunk(2, -1), 1)
    assert seen[::2] == sizes  # every other one is with the values


def test_the_weights_of_many_keys_sum_to_one_in_bf16():
    """Their total is summed in fp32: in bf16 it would stop growing at 256 times the largest."""
    query, both = attention_case(0, 1, 5, 5000, 2, 8, dtype=BF16)
    ones = torch.ones(1, 5000, 16, dtype=BF16)
    out = attention.chunked_attention(query / 8, both.chunk(2, -1)[0], ones, 2)
    close(out.float(), torch.ones_like(out, dtype=FP32), 0.01)


@few
@given(attentions, st.sampled_from([0.0, 1.0, 30.0, 1e4]))
def test_attention_in_chunks_is_the_plain_one(shape, sharpness):
    """Also where all weights are equal, nearly one-hot, or scores beyond the range of fp32."""
    query, both = attention_case(**shape)
    query = query * sharpness
    key, value = both.chunk(2, -1)
    heads = shape['heads']
    (exact,), (rounding,) = exact_and_rounding(
        lambda *tensors: [plain_attention(*tensors, heads)], query, key, value
    )
    close(attention.attention(query, key, value, heads), exact, 3e-5, rounding)


@pytest.mark.parametrize('faster', [False, True])
@pytest.mark.parametrize('dtype', [FP32, BF16])
def test_training_in_fp32_may_take_the_fused_attention(monkeypatch, dtype, faster):
    """Where the CPU makes it the faster one for that alone; in bf16 and inference chunks stay."""
    pretend(monkeypatch, fused_attention=False, fused_attention_backward=faster)
    query, both = attention_case(0, 1, 12, 10, 2, 8, dtype=dtype, grad=True)
    out = attention.attention(query, *both.chunk(2, -1), 2)
    in_chunks = 'ChunkedAttention' in out.grad_fn.name()
    assert in_chunks == (not faster or dtype == BF16)
    monkeypatch.setattr(attention, 'fused_attention', None)  # to be called by nobody
    with torch.no_grad():
        attention.attention(query, *both.chunk(2, -1), 2)


@few
@given(attentions)
def test_attention_gradients_are_the_plain_ones(shape):
    """Attention weights recomputed in the backward pass give autograd's own gradients."""
    inputs = attention_case(**shape, grad=True)
    grads = []
    for attend in (attention.attention, plain_attention):
        out = attend(inputs[0], *inputs[1].chunk(2, -1), shape['heads'])
        weights = draw(*out.shape, seed=9)
        grads.append(torch.autograd.grad((out * weights).sum(), inputs))
    for ours, plain in zip(*grads):
        # Gradients of the scores nearly cancel where there are few keys.
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('attend', ['chunked', 'fused'])
def test_attention_gradients_against_finite_differences(attend):
    """First and second derivatives in double precision, over several chunks."""
    query, both = attention_case(3, 2, 30, 40, 2, 3, dtype=torch.float64, grad=True)
    apply = attention.ChunkedAttention.apply if attend == 'chunked' else attention.fused_attention

    def function(query, both):
        return apply(query, *both.chunk(2, -1), 2)

    torch.autograd.gradcheck(function, (query, both), fast_mode=True)
    torch.autograd.gradgradcheck(function, (query, both), fast_mode=True)


@few
@given(attentions, st.booleans())
def test_projected_attention_is_linear_attention_linear(shape, normalised):
    """With projections and norm run chunk by chunk, as without."""
    seed, heads = shape['seed'], shape['heads']
    dim = heads * shape['dim']
    x = draw(shape['batch'], shape['queries'], dim, seed=seed)
    key, value = (draw(shape['batch'], shape['keys'], dim, seed=seed + i) for i in (1, 2))
    module = drawn(SpatialReductionAttention(dim, heads), seed)
    for layer in (module.q, module.proj):
        layer.weight.data /= dim**0.5
    norm = nn.LayerNorm(dim) if normalised else None
    with torch.no_grad():
        query = module.q(norm(x) if norm else x)
        plain = module.proj(plain_attention(query, key, value, heads))
        close(attention.projected_attention(x, norm, module, key, value, FP32), plain)


# Whole blocks


@few
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(2, 24),
    width=st.integers(2, 24),
    stride=st.sampled_from([1, 2]),
)
def test_reduction_by_rows_is_the_whole_one(seed, height, width, stride):
    """Rows and columns that fill no patch are left out, tile by tile as at once."""
    x = draw(2, height, width, 16, seed=seed)
    conv, norm = drawn(nn.Conv2d(16, 16, stride, stride), seed), nn.LayerNorm(16)
    with torch.no_grad():
        plain = conv(norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        close(branches._convolve_by_rows(x, norm, conv, FP32), plain)


def block(kind, dim=16, drop_path_rate=0.0):
    """A block of v1, v2, linear attention or pooled reduction."""
    mode = {'linear': 'linear', 'avg': 'avg', 'max': 'max'}.get(kind, 'conv')
    ratio = 1 if kind == 'whole' else 2
    attn = SpatialReductionAttention(dim, 2, ratio, mode)
    layers = Mlp(dim, 40, dwconv=kind in ('v2', 'linear'), relu=kind == 'linear')
    return drawn(Block(dim, attn, layers, drop_path_rate), 1)


KINDS = ('v1', 'whole', 'v2', 'linear', 'avg', 'max')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('grad', [False, True])
def test_a_block_is_the_textbook_one(kind, grad):
    """Values, and gradients of tokens and all parameters; the tokens keep their values."""
    ours = block(kind)
    x = draw(2, 10, 12, 16, seed=3, grad=grad)
    before, textbook = x.detach().clone(), block(kind).double()
    with torch.set_grad_enabled(grad):
        assert fast.applies(ours, x, fast.is_known_block)
        out, plain = ours(x), textbook(x.detach().double().requires_grad_(grad))
    assert torch.equal(x, before)
    close(out, plain, 1e-4)
    if grad:
        gradients = (
            torch.autograd.grad((y * y).sum(), list(module.parameters()))
            for y, module in ((out, ours), (plain, textbook))
        )
        for a, b in zip(*gradients):
            close(a, b, 1e-3, 1e-3)


@pytest.mark.parametrize('kind', KINDS)
def test_drop_path_drops_the_same_samples(kind):
    """Training draws the same random numbers in the same order."""
    ours = block(kind, drop_path_rate=0.5).train()
    x = draw(8, 10, 12, 16, seed=3)
    outs = []
    for textbook in (False, True):
        torch.manual_seed(1)
        handle = ours.mlp.register_forward_hook(lambda *_: None) if textbook else None
        assert fast.applies(ours, x) is not textbook
        outs.append(ours(x))
    handle.remove()
    close(*outs, 1e-4)


@pytest.mark.parametrize('backbone', [PVT, PVTv2])
def test_inference_is_training_without_autograd(backbone):
    """Whole blocks in chunks give the features that the recorded forms give."""
    torch.manual_seed(0)
    model = backbone(arch=SMALL).eval()
    x = draw(2, 3, 96, 128, seed=1)
    recorded = model(x)
    with torch.no_grad():
        for ours, plain in zip(model(x), recorded):
            close(ours, plain)


@pytest.mark.parametrize('backbone', [PVT, PVTv2])
@pytest.mark.parametrize('grad', [False, True])
def test_bf16_error_is_small(backbone, grad):
    """Under autocast the features differ from fp32's by at most 5% of their size."""
    torch.manual_seed(0)
    model = backbone(arch=SMALL).eval()
    x = draw(2, 3, 96, 64, seed=1)
    with torch.set_grad_enabled(grad):
        exact = model(x)
        with torch.autocast('cpu', BF16):
            rough = model(x)
    for ours, plain in zip(rough, exact):
        close(ours.detach().float(), plain.detach(), 0.05)


def seen_dtypes(monkeypatch):
    """Note the matmuls and convolutions that run, by the dtype of their first tensor."""
    seen = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if re.search('mm$|linear|convolution', name):
                dtypes = [arg.dtype for arg in args if isinstance(arg, torch.Tensor)]
                seen.setdefault(dtypes[0], set()).add(name)
            return func(*args, **(kwargs or {}))

    from pvt_mm.models.fast import autograd, conditions

    # The fast path is not taken where a mode watches; here it shall be watched all the same.
    monkeypatch.setattr(conditions, 'is_observed', lambda: False)
    monkeypatch.setattr(autograd, 'is_observed', lambda: False)
    return Watch(), seen


@pytest.mark.parametrize('backbone', [PVT, PVTv2])
@pytest.mark.parametrize('grad', [False, True])
def test_nothing_multiplies_bf16_where_that_is_slow(backbone, grad, monkeypatch):
    """Forward and backward, matmuls run in fp32 and their results are rounded to bf16."""
    pretend(monkeypatch, bf16_is_slow=True)
    model = backbone(arch=SMALL, compute_dtype='bfloat16').train(grad)
    watch, seen = seen_dtypes(monkeypatch)
    with torch.set_grad_enabled(grad), watch:
        outs = model(draw(2, 3, 96, 64, seed=1))
        if grad:
            sum(out.square().mean() for out in outs).backward()
    assert set(seen) == {FP32}, seen


@pytest.mark.parametrize('slow', [False, True])
def test_bf16_results_are_rounded_once(slow, monkeypatch):
    """A kernel in fp32 gives bf16 again, also under autocast and where it returns several."""
    pretend(monkeypatch, bf16_is_slow=slow)
    inside = FP32 if slow else BF16

    @gemm.fp32_fallback
    def kernel(x, y, factor=1.0):
        assert x.dtype == y.dtype == inside
        assert is_autocast('cpu') != slow
        return x * factor + y, y

    x, y = draw(8, seed=0).bfloat16(), draw(8, seed=1).bfloat16()
    with torch.autocast('cpu', BF16):
        total, same = kernel(x, y, factor=3.0)
    assert total.dtype == BF16 and torch.equal(same, y)
    if slow:
        assert torch.equal(total, (x.float() * 3 + y.float()).bfloat16())


@pytest.mark.parametrize('backbone', [PVT, PVTv2])
@pytest.mark.parametrize('grad', [False, True])
def test_public_operations_take_the_place_of_private_ones(backbone, grad, monkeypatch):
    """Without Inductor's operations and the private fused attention: the same features."""
    assert None not in (gemm._linear, gemm._convolution, attention._fused), 'gone from PyTorch'
    model = backbone(arch=SMALL).eval()
    x = draw(1, 3, 96, 64, seed=1)
    with torch.set_grad_enabled(grad):
        ours = model(x)
        monkeypatch.setattr(gemm, '_linear', None)
        monkeypatch.setattr(gemm, '_convolution', None)
        monkeypatch.setattr(attention, '_fused', None)
        public = model(x)
    for a, b in zip(public, ours):
        close(a, b)


def test_weights_swapped_in_place_are_used_at_once():
    """An EMA hook copies into p.data, which raises no version counter; nothing may be stale."""
    torch.manual_seed(0)
    model, other = PVT(arch=SMALL).eval(), PVT(arch=SMALL).eval()
    x = draw(1, 3, 64, 64, seed=1)
    with torch.no_grad():
        model(x)
        for ours, theirs in zip(model.parameters(), other.parameters()):
            ours.data.copy_(theirs.data)
        for ours, theirs in zip(model(x), other(x)):
            assert torch.equal(ours, theirs)


# When it applies


def test_it_applies_to_fp32_and_bf16_on_a_cpu_with_onednn():
    """The textbook for every other dtype and device, and where autocast computes in fp16."""
    module, x = block('v1'), draw(1, 10, 12, 16, seed=3)
    assert fast.applies(module, x)
    assert not fast.applies(module, x.bfloat16()), 'its layers are fp32'
    assert fast.applies(block('v1').bfloat16(), x.bfloat16())
    assert not fast.applies(block('v1').double(), x.double())
    assert not fast.applies(block('v1').half(), x.half())
    assert not fast.applies(block('v1').to('meta'), x.to('meta'))
    assert not fast.applies(block('v1').to('meta'), x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not fast.applies(module, x)
    with torch.autocast('cpu', BF16):
        assert fast.applies(module, x)
    with torch.autocast('cpu', torch.float16):
        assert not fast.applies(module, x)


def replaced(name, layer):
    """A change of a block: another layer in the place of one."""
    return lambda module: module.set_submodule(name, layer)


CHANGES = {
    'norm1 is no norm': replaced('norm1', nn.Identity()),
    'norm2 without weights': replaced('norm2', nn.LayerNorm(16, elementwise_affine=False)),
    'norm over two dimensions': replaced('norm1', nn.LayerNorm((12, 16))),
    'q without bias': replaced('attn.q', nn.Linear(16, 16, bias=False)),
    'q is wider': replaced('attn.q', nn.Linear(16, 32)),
    'q is no layer': replaced('attn.q', nn.Identity()),
    'proj is a convolution': replaced('attn.proj', nn.Conv2d(16, 16, 1)),
    'sr overlaps': replaced('attn.sr', nn.Conv2d(16, 16, 3, 2, 1)),
    'sr is dilated': replaced('attn.sr', nn.Conv2d(16, 16, 2, 2, dilation=2)),
    'sr has groups': replaced('attn.sr', nn.Conv2d(16, 16, 2, 2, groups=2)),
    'sr pads by reflection': replaced(
        'attn.sr', nn.Conv2d(16, 16, 2, 2, 1, padding_mode='reflect')
    ),
    'dropout of the output': replaced('attn.proj_drop', nn.Dropout(0.1)),
    'dropout of the weights': replaced('attn.attn_drop', nn.Dropout(0.1)),
    'a GELU behind the projection': replaced('attn.proj_drop', nn.GELU()),
    'another activation': replaced('mlp.act', nn.SiLU()),
    'a ReLU as activation': replaced('mlp.act', nn.ReLU()),
    'an approximate GELU': replaced('mlp.act', nn.GELU('tanh')),
    'a GELU before the convolution': replaced('mlp.relu', nn.GELU()),
    'dwconv of 5x5': replaced('mlp.dwconv', nn.Conv2d(40, 40, 5, 1, 2, groups=40)),
    'dwconv with two groups': replaced('mlp.dwconv', nn.Conv2d(40, 40, 3, 1, 1, groups=2)),
    'dwconv is dilated': replaced('mlp.dwconv', nn.Conv2d(40, 40, 3, 1, 2, 2, groups=40)),
    'dwconv pads circularly': replaced(
        'mlp.dwconv', nn.Conv2d(40, 40, 3, 1, 1, groups=40, padding_mode='circular')
    ),
    'attn is another module': replaced('attn', nn.Sequential()),
    'mlp is another module': replaced('mlp', nn.Linear(16, 16)),
    'drop path is another module': replaced('drop_path', nn.Sequential()),
}  # fmt: skip


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_it_does_not_apply_to_other_layers(change):
    """Where a layer was replaced, the textbook runs, or fails as PyTorch does."""
    module, x = block('v2').train(), draw(1, 10, 12, 16, seed=3)
    assert fast.applies(module, x, fast.is_known_block)
    change(module)
    assert not fast.applies(module, x, fast.is_known_block)


def test_a_narrower_hidden_layer_stays_on_the_fast_path():
    """Pruned by structure, it is a stock layer still, and the results are the textbook's."""
    module, x = block('v1'), draw(1, 10, 12, 16, seed=3)
    module.mlp.fc1, module.mlp.fc2 = drawn(nn.Linear(16, 24), 5), drawn(nn.Linear(24, 16), 7)
    assert fast.applies(module, x, fast.is_known_block)
    with torch.no_grad():
        ours = module(x)
        close(ours, module.double()(x.double()), 1e-4)


def test_a_patch_embedding_is_the_textbook_one():
    """With overlap and without, as the layer's own stride and padding say."""
    for overlap in (False, True):
        module = drawn(PatchEmbed(3, 16, 4, overlap), 1)
        x = draw(2, 33, 47, 3, seed=3)
        with torch.no_grad():
            assert fast.applies(module, x)
            ours = module(x)
            close(ours, module.double()(x.double()), 1e-4)


@pytest.mark.parametrize('watched', ['nothing', 'patch_embed', 'patch_embed.norm'])
def test_a_position_is_added_in_place_where_nobody_looks(watched):
    """Outside of autograd; a hooked patch embedding keeps its values."""
    model = PVT(arch=SMALL).eval()
    stage, kept = model.stages[0], []
    if watched != 'nothing':
        stage.get_submodule(watched).register_forward_hook(lambda *args: kept.append(args[2]))
    tokens = draw(1, 8, 8, 16, seed=1)
    with torch.no_grad():
        assert (stage.add_position(tokens) is tokens) == (watched == 'nothing')
        model(draw(1, 3, 64, 64, seed=2))
    assert stage.add_position(tokens) is not tokens, 'autograd is on'
    if kept:
        image = draw(1, 3, 64, 64, seed=2).permute(0, 2, 3, 1)
        close(kept[0], stage.patch_embed(image))
