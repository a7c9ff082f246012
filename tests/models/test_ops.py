"""The fast CPU kernels give what PyTorch's plain operations give, gradients included."""

import functools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import SMALL
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pvt_mm import PVT, PVTv2
from pvt_mm.models import ops
from pvt_mm.models.fast import kernels

few = settings(max_examples=25, deadline=None)


#: What is true of each kind of CPU; the other roads are not, and how it does bf16 stays as here.
CPUS = {
    'avx2': [
        'MKL_IS_FASTER', 'FUSED_ATTENTION_IS_FASTER', 'FUSED_TRAINING_IS_FASTER', 'BF16_IS_SLOW'
    ],
    'intel': ['FUSED_ATTENTION_IS_FASTER', 'FUSED_TRAINING_IS_FASTER'],
    'zen4': ['FUSED_TRAINING_IS_FASTER'],
    'zen5': ['MKL_IS_NARROW'],
}  # fmt: skip
ROADS = ('MKL_IS_FASTER', 'FUSED_ATTENTION_IS_FASTER', 'FUSED_TRAINING_IS_FASTER', 'MKL_IS_NARROW')


@pytest.fixture(autouse=True, params=CPUS.values(), ids=CPUS)
def small_pieces(monkeypatch, request):
    """Pieces of a few rows, so that small tensors are cut as large ones are; all kinds of CPU."""
    for name in {*ROADS, *request.param}:
        monkeypatch.setattr(kernels, name, name in request.param)
    monkeypatch.setattr(kernels, 'PIECE', 2**9)
    monkeypatch.setattr(kernels, 'KEPT', 2**9)
    monkeypatch.setattr(kernels, 'BLOCK', 16)
    monkeypatch.setattr(ops, 'PIECED_SCORES', 1)


def draw(*shape, seed, dtype=torch.float32, grad=False):
    """Standard normal values that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)


def mlp_inputs(seed, batch, height, width, dim, hidden, depthwise, **kwargs):
    """Tokens and the layers of a perceptron, weights of about unit gain."""
    x = draw(batch, height, width, dim, seed=seed, **kwargs)
    fc1 = (
        draw(hidden, dim, seed=seed + 1, **kwargs),
        draw(hidden, seed=seed + 2, **kwargs),
    )
    fc2 = (draw(dim, hidden, seed=seed + 3, **kwargs), draw(dim, seed=seed + 4, **kwargs))
    dwconv = None
    if depthwise:
        dwconv = (
            draw(hidden, 1, 3, 3, seed=seed + 5, **kwargs),
            draw(hidden, seed=seed + 6, **kwargs),
        )
    return x, fc1, fc2, dwconv


def leaves(inputs):
    """The tensors of mlp_inputs, flat."""
    x, fc1, fc2, dwconv = inputs
    return [x, *fc1, *fc2, *(dwconv or ())]


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


perceptrons = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 10**6),
        batch=st.integers(1, 3),
        height=st.integers(1, 12),
        width=st.integers(1, 12),
        dim=st.sampled_from([1, 8, 20]),
        hidden=st.sampled_from([1, 16, 40]),
        depthwise=st.booleans(),
    )
)


@few
@given(perceptrons, st.booleans())
def test_mlp_in_pieces_is_the_plain_one(shape, relu):
    """Bands, halos and blocks of hidden channels leave no seam."""
    x, fc1, fc2, dwconv = mlp_inputs(**shape)
    relu = relu and dwconv is not None
    assert ops.on_cpu_kernels(x)
    close(ops.mlp(x, fc1, fc2, dwconv, relu), ops.plain_mlp(x, fc1, fc2, dwconv, relu))


@few
@given(perceptrons, st.booleans(), st.booleans())
def test_mlp_added_in_place_is_the_plain_branch(shape, relu, rows_first):
    """Bands read the rows that the band before has yet to write; strides change nothing."""
    x, fc1, fc2, dwconv = mlp_inputs(**shape)
    relu = relu and dwconv is not None
    norm = nn.LayerNorm(shape['dim'])
    tokens = x.clone() if rows_first else x.transpose(1, 2).contiguous().transpose(1, 2)
    with torch.no_grad():
        plain = x + ops.plain_mlp(norm(x), fc1, fc2, dwconv, relu)
        close(ops.add_mlp(tokens, norm, fc1, fc2, dwconv, relu), plain)


@pytest.mark.parametrize(('side', 'together'), [(2, [4, 4, 1]), (4, [1] * 9), (8, [1] * 36)])
def test_small_images_go_together(monkeypatch, side, together):
    """As many as half a piece holds; one alone where it holds less, in bands where need be."""
    seen = []
    run = kernels._depthwise_gelu
    monkeypatch.setattr(
        kernels, '_depthwise_gelu', lambda x, *args: seen.append(len(x)) or run(x, *args)
    )
    x, fc1, fc2, dwconv = mlp_inputs(0, 9, side, side, 8, 16, depthwise=True)
    ops.mlp(x, fc1, fc2, dwconv)
    assert seen == together


@pytest.mark.parametrize('kernel', ['product', '_activated'])
def test_one_piece_is_held_at_a_time(monkeypatch, kernel):
    """Scores and hidden layers are let go before the next ones are made."""
    made, run = [], getattr(kernels, kernel)

    def watched(x, *args):
        if kernel == '_activated' or args[0].shape[0] == 40:  # a product with 40 keys
            assert all(piece.expired() for piece in made)
            out = run(x, *args)
            made.append(StorageWeakRef(out.untyped_storage()))
            return out
        return run(x, *args)

    monkeypatch.setattr(kernels, kernel, watched)
    x, fc1, fc2, dwconv = mlp_inputs(0, 1, 6, 6, 8, 40, depthwise=True)
    kernels.mlp(x, fc1, fc2, dwconv, False, torch.float32)
    query, both = attention_inputs(0, 1, 36, 40, 2, 8)
    kernels.attention(query, *both.chunk(2, -1), 2)
    assert len(made) > 2


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@few
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 40), sides=st.sampled_from([1, 8, 70]))
def test_weight_gradients_sum_over_the_tokens(dtype, tolerance, seed, tokens, sides):
    """By a product or by a convolution."""
    grad, x = draw(tokens, sides, seed=seed), draw(tokens, 24, seed=seed + 1)
    grad, x = grad.to(dtype), x.to(dtype)
    close(kernels.weight_grad(grad, x).float(), grad.float().t() @ x.float(), tolerance)


@pytest.mark.parametrize('threads', [1, 2, 3, 64])
@pytest.mark.parametrize('heads', [1, 2, 5])
def test_queries_are_spread_over_threads(monkeypatch, threads, heads):
    """However many threads share the queries of a batch, results and gradients are the same."""
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    inputs = [draw(2, n, 20, seed=n, grad=True) for n in (36, 7, 8)]
    inputs[2] = draw(2, 7, 20, seed=9, grad=True)
    grad = draw(2, 36, 20, seed=3)
    ours = kernels.spread_attention(*inputs, heads)
    plain = ops.plain_attention(*inputs, heads)
    close(ours, plain)
    pairs = (torch.autograd.grad(out, inputs, grad) for out in (ours, plain))
    for a, b in zip(*pairs):
        close(a, b)


def test_one_head_is_shared_by_all_threads(monkeypatch):
    """PyTorch's backward pass gets as many images as there are threads."""
    calls = []
    fused = kernels.fused_attention
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
    monkeypatch.setattr(
        kernels, 'fused_attention', lambda *args: calls.append(args[0].shape) or fused(*args)
    )
    x = draw(1, 36, 8, seed=0, grad=True)
    kernels.spread_attention(x, x, x, 1)
    kernels.spread_attention(x, x, x, 4)
    assert calls == [(4, 9, 8), (1, 36, 8)]


@pytest.mark.parametrize('depthwise', [False, True])
def test_a_small_hidden_layer_is_kept(monkeypatch, depthwise):
    """Up to KEPT elements it is not made again; above, nothing but the input is kept."""
    x, fc1, fc2, dwconv = mlp_inputs(0, 1, 4, 4, 8, 32, depthwise=depthwise, grad=True)
    elements = 4 * 4 * 32 * (2 if depthwise else 1)
    made = []
    hidden = kernels._hidden
    monkeypatch.setattr(kernels, '_hidden', lambda *args: made.append(1) or hidden(*args))
    grads = []
    for kept in (elements, elements - 1):
        monkeypatch.setattr(kernels, 'KEPT', kept)
        out = ops.mlp(x, fc1, fc2, dwconv)
        sizes = [t.numel() for t in out.grad_fn.saved_tensors if t is not None]
        assert (sizes.count(4 * 4 * 32) == 2) == (kept == elements)
        before = len(made)
        grads.append(torch.autograd.grad(out.square().sum(), leaves((x, fc1, fc2, dwconv))))
        assert (len(made) == before) == (kept == elements)
    for a, b in zip(*grads):
        close(a, b)


@pytest.mark.parametrize('channels', [3, 4, 5, 8, 16, 24, 31, 32, 64])
@pytest.mark.parametrize('patches', [1, 2, 5])
@pytest.mark.parametrize(
    ('kernel', 'stride', 'padding'), [(2, 2, 0), (4, 4, 0), (8, 8, 0), (3, 2, 1), (7, 4, 3)]
)
def test_convolutions_in_bf16_are_right(channels, patches, kernel, stride, padding):
    """With AMX, oneDNN's own are off by as much as their results in some of these."""
    width = stride * patches + (stride - 1 if not padding else 0)  # the last ones are no patch
    x = draw(1, 33, width, channels, seed=0)
    weight, bias = draw(16, channels, kernel, kernel, seed=1), draw(16, seed=2)
    plain = ops.convolution(x, weight, bias, stride, padding)
    with torch.autocast('cpu', torch.bfloat16):
        rough = ops.convolution(x, weight, bias, stride, padding).float()
    assert 0 < (rough - plain).norm() < 0.02 * plain.norm()


@few
@given(perceptrons, st.booleans())
def test_mlp_gradients_are_the_plain_ones(shape, relu):
    """Activations made again in the backward pass give autograd's own gradients."""
    inputs = leaves(mlp_inputs(**shape))
    weights = draw(*inputs[0].shape, seed=9)

    def gradients(mlp, weights, *inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        x, weight1, bias1, weight2, bias2, *dwconv = inputs
        out = mlp(x, (weight1, bias1), (weight2, bias2), dwconv or None, relu and bool(dwconv))
        return torch.autograd.grad((out * weights).sum(), inputs)

    plain = functools.partial(gradients, ops.plain_mlp)
    exact = exact_and_rounding(plain, weights, *inputs)
    for a, b, rounding in zip(gradients(ops.mlp, weights, *inputs), *exact):
        close(a, b, absolute=1e-5 + rounding)


@pytest.mark.parametrize('depthwise', [False, True])
def test_mlp_gradients_against_finite_differences(depthwise):
    """PyTorch's gradcheck in double precision, over several blocks and with the ReLU."""
    inputs = mlp_inputs(3, 2, 3, 4, 3, 70, depthwise, dtype=torch.float64, grad=True)

    def function(x, weight1, bias1, weight2, bias2, dw_weight=None, dw_bias=None):
        return kernels.MlpFunction.apply(
            x, weight1, bias1, weight2, bias2, dw_weight, dw_bias, depthwise, torch.float64
        )

    torch.autograd.gradcheck(function, leaves(inputs), fast_mode=True)


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


def attention_inputs(seed, batch, queries, keys, heads, dim, **kwargs):
    """Queries, and keys and values as the two halves of one tensor, as the layers give them."""
    query = draw(batch, queries, heads * dim, seed=seed, **kwargs)
    both = draw(batch, keys, 2 * heads * dim, seed=seed + 1, **kwargs)
    return query, both


@pytest.mark.parametrize(('dtype', 'sizes'), [(torch.float32, [12, 12, 3]), (torch.bfloat16, [27])])
def test_pieces_in_bf16_are_three_times_as_large(monkeypatch, dtype, sizes):
    """12 queries of 40 keys are a piece of 2**9 elements."""
    seen, run = [], kernels.product
    monkeypatch.setattr(kernels, 'product', lambda x, *args: seen.append(len(x)) or run(x, *args))
    query, both = attention_inputs(0, 1, 27, 40, 1, 8, dtype=dtype)
    kernels.attention(query, *both.chunk(2, -1), 1)
    assert seen[::2] == sizes  # every other one is with the values


def test_the_weights_of_many_keys_sum_to_one_in_bf16():
    """Their total is gathered in fp32: in bf16 it would stand still at 256 times the largest."""
    query, both = attention_inputs(0, 1, 5, 5000, 2, 8, dtype=torch.bfloat16)
    ones = torch.ones(1, 5000, 16, dtype=torch.bfloat16)
    out = kernels.attention(query / 8, both.chunk(2, -1)[0], ones, 2)
    close(out.float(), torch.ones_like(out, dtype=torch.float32), 0.01)


@few
@given(attentions, st.sampled_from([0.0, 1.0, 30.0, 1e4]))
def test_attention_in_pieces_is_the_plain_one(shape, sharpness):
    """Also where all weights are equal, nearly one-hot, or scores beyond the powers of fp32."""
    query, both = attention_inputs(**shape)
    query = query * sharpness
    key, value = both.chunk(2, -1)
    heads = shape['heads']
    (exact,), (rounding,) = exact_and_rounding(
        lambda *tensors: [ops.plain_attention(*tensors, heads)], query, key, value
    )
    close(ops.attention(query, key, value, heads), exact, 3e-5, rounding)


@pytest.mark.parametrize('faster', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_training_in_fp32_may_take_the_fused_attention(monkeypatch, dtype, faster):
    """Where the CPU makes it the faster one for that alone; in bf16 and inference pieces stay."""
    monkeypatch.setattr(kernels, 'FUSED_ATTENTION_IS_FASTER', False)
    monkeypatch.setattr(kernels, 'FUSED_TRAINING_IS_FASTER', faster)
    query, both = attention_inputs(0, 1, 12, 10, 2, 8, dtype=dtype, grad=True)
    out = ops.attention(query, *both.chunk(2, -1), 2)
    in_pieces = 'AttentionFunction' in out.grad_fn.name()
    assert in_pieces == (not faster or dtype == torch.bfloat16)
    monkeypatch.setattr(kernels, 'fused_attention', None)  # to be called by nobody
    with torch.no_grad():
        ops.attention(query, *both.chunk(2, -1), 2)


@few
@given(attentions)
def test_attention_gradients_are_the_plain_ones(shape):
    """Attention weights made again in the backward pass give autograd's own gradients."""
    inputs = attention_inputs(**shape, grad=True)
    grads = []
    for attention in (ops.attention, ops.plain_attention):
        out = attention(inputs[0], *inputs[1].chunk(2, -1), shape['heads'])
        weights = draw(*out.shape, seed=9)
        grads.append(torch.autograd.grad((out * weights).sum(), inputs))
    for ours, plain in zip(*grads):
        # Gradients of the scores nearly cancel where there are few keys.
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


def test_attention_gradients_against_finite_differences():
    """PyTorch's gradcheck in double precision, over several pieces."""
    query, both = attention_inputs(3, 2, 30, 40, 2, 3, dtype=torch.float64, grad=True)

    def function(query, both):
        return kernels.AttentionFunction.apply(query, *both.chunk(2, -1), 2)

    torch.autograd.gradcheck(function, (query, both), fast_mode=True)


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
    weight = draw(outer, inner, seed=seed + 1, grad=grad)
    bias = draw(outer, seed=seed + 2, grad=grad)
    ours, plain = ops.linear(x, weight, bias), nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    if grad:
        ours = torch.autograd.grad(ours.square().sum(), (x, weight, bias))
        plain = torch.autograd.grad(plain.square().sum(), (x, weight, bias))
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@few
@given(attentions, st.booleans())
def test_projected_attention_is_linear_attention_linear(shape, normalised):
    """With projections and norm run piece by piece, as without."""
    seed, heads = shape['seed'], shape['heads']
    dim = heads * shape['dim']
    x = draw(shape['batch'], shape['queries'], dim, seed=seed)
    key, value = (draw(shape['batch'], shape['keys'], dim, seed=seed + i) for i in (1, 2))
    query, proj = (
        (draw(dim, dim, seed=seed + i) / dim**0.5, draw(dim, seed=seed + i + 1)) for i in (3, 5)
    )
    norm = nn.LayerNorm(dim) if normalised else None
    with torch.no_grad():
        out = nn.functional.linear(norm(x) if norm else x, *query)
        plain = nn.functional.linear(ops.plain_attention(out, key, value, heads), *proj)
        close(ops.projected_attention(x, query, key, value, proj, heads, norm=norm), plain)


@few
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(2, 24),
    width=st.integers(2, 24),
    stride=st.sampled_from([1, 2]),
)
def test_reduction_in_bands_is_the_whole_one(seed, height, width, stride):
    """Rows and columns that fill no patch are left out, band by band as at once."""
    x = draw(2, height, width, 16, seed=seed)
    weight, bias = draw(16, 16, stride, stride, seed=seed + 1), draw(16, seed=seed + 2)
    norm = nn.LayerNorm(16)
    with torch.no_grad():
        plain = ops.convolution(norm(x), weight, bias, stride)
        close(ops.convolution(x, weight, bias, stride, norm=norm), plain)


@pytest.mark.parametrize('backbone', [PVT, PVTv2])
def test_inference_is_training_without_autograd(backbone):
    """Whole blocks in pieces give the features that the recorded forms give."""
    torch.manual_seed(0)
    model = backbone(arch=SMALL).eval()
    x = draw(2, 3, 96, 128, seed=1)
    assert ops.normalises_in_pieces(x) is False, 'autograd is on'
    recorded = model(x)
    with torch.no_grad():
        assert ops.normalises_in_pieces(x)
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
        with torch.autocast('cpu', torch.bfloat16):
            rough = model(x)
    for ours, plain in zip(rough, exact):
        close(ours.detach().float(), plain.detach(), 0.05)


class Products(TorchDispatchMode):
    """Notes the products and convolutions that run, with the dtype of their first tensor."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if re.search('mm$|linear|convolution', name):
            dtypes = [arg.dtype for arg in args if isinstance(arg, torch.Tensor)]
            self.seen.setdefault(dtypes[0], set()).add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('backbone', [PVT, PVTv2])
@pytest.mark.parametrize('grad', [False, True])
def test_nothing_multiplies_bf16_where_that_is_slow(backbone, grad, monkeypatch):
    """Forward and backward, products run in fp32 and their results are rounded to bf16."""
    monkeypatch.setattr(kernels, 'BF16_IS_SLOW', True)
    model = backbone(arch=SMALL, compute_dtype='bfloat16').train(grad)
    with torch.set_grad_enabled(grad), Products() as products:
        outs = model(draw(2, 3, 96, 64, seed=1))
        if grad:
            sum(out.square().mean() for out in outs).backward()
    assert set(products.seen) == {torch.float32}, products.seen


@pytest.mark.parametrize('slow', [False, True])
def test_bf16_results_are_rounded_once(slow, monkeypatch):
    """A kernel in fp32 gives bf16 again, also under autocast and where it returns several."""
    monkeypatch.setattr(kernels, 'BF16_IS_SLOW', slow)
    inside = torch.float32 if slow else torch.bfloat16

    @kernels.rounded
    def kernel(x, y, factor=1.0):
        assert x.dtype == y.dtype == inside
        assert ops.is_autocast('cpu') != slow
        return x * factor + y, y

    x, y = draw(8, seed=0).bfloat16(), draw(8, seed=1).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        total, same = kernel(x, y, factor=3.0)
    assert total.dtype == torch.bfloat16 and torch.equal(same, y)
    if slow:
        assert torch.equal(total, (x.float() * 3 + y.float()).bfloat16())


@pytest.mark.parametrize('backbone', [PVT, PVTv2])
def test_public_operations_stand_in(backbone, monkeypatch):
    """Without Inductor's operations the public ones give the same features."""
    assert kernels._linear is not None and kernels._convolution is not None, 'gone from PyTorch'
    model = backbone(arch=SMALL).eval()
    x = draw(1, 3, 96, 64, seed=1)
    with torch.no_grad():
        fast = model(x)
        monkeypatch.setattr(kernels, '_linear', None)
        monkeypatch.setattr(kernels, '_convolution', None)
        public = model(x)
    for ours, plain in zip(public, fast):
        close(ours, plain)


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


def test_the_rule():
    """Kernels for fp32 and bf16 on a CPU with oneDNN; the plain form for all else."""
    x = torch.zeros(1, 2, 2, 4)
    assert ops.on_cpu_kernels(x) and ops.on_cpu_kernels(x.bfloat16())
    assert not ops.on_cpu_kernels(x.double()) and not ops.on_cpu_kernels(x.half())
    assert not ops.on_cpu_kernels(x.to('meta'))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not ops.on_cpu_kernels(x)
