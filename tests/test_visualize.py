"""What a PVT looks at: attention written out, pictures, and the page one clicks in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import VARIANTS, small

from pvt_mm import attention_maps


def lively(variant, **kwargs):
    """Build a small backbone whose weights are so large that attention is far from uniform."""
    backbone = small(variant, **kwargs).eval()
    for name, weight in backbone.named_parameters():
        if weight.ndim > 1 and 'pos_embed' not in name:
            torch.nn.init.normal_(weight, std=1.5 * weight[0].numel() ** -0.5)
    return backbone


def attention_outputs(backbone, image):
    """Run the backbone as it is and return what the last attention of each stage gives."""
    outputs = []
    hooks = [
        stage.blocks[-1].attn.register_forward_hook(lambda *args: outputs.append(args[2].clone()))
        for stage in backbone.stages
    ]
    with torch.no_grad():
        backbone(image)
    for hook in hooks:
        hook.remove()
    return outputs


def check_attention(variant, height, width):
    torch.manual_seed(height * 1000 + width)
    backbone, image = lively(variant), torch.randn(1, 3, height, width)
    outputs = attention_outputs(backbone, image)
    with torch.no_grad():
        for trace, output in zip(attention_maps.trace_stages(backbone, image), outputs):
            attention = attention_maps.explicit_attention(trace.attn, trace.tokens)
            weights, (rows, columns) = attention.weights, attention.key_grid
            queries = output[0, ..., 0].numel()
            assert weights.shape[1:] == (trace.attn.num_heads, queries, rows * columns)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
            if rows * columns > 1:
                assert weights.max() * rows * columns > 1.2, 'not uniform, so that a mix-up shows'
            again = attention_maps.attention_output(trace.attn, attention)
            torch.testing.assert_close(again, output.flatten(1, 2), atol=1e-5, rtol=1e-5)
            some = attention_maps.explicit_attention(trace.attn, trace.tokens, [0])
            torch.testing.assert_close(some.weights, weights[:, :, :1])


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(sorted(VARIANTS)), st.integers(64, 150), st.integers(64, 150))
def test_attention_reproduces_its_block(variant, height, width):
    """Rows sum to 1, and weights x values, projected, are the block's own output."""
    check_attention(variant, height, width)


@pytest.mark.parametrize('variant', ['v1', 'v2', 'v2_li'])
def test_attention_reproduces_the_kernels(variant):
    """The same where the backbone attends in pieces, on a size that no ratio divides."""
    check_attention(variant, 234, 398)


def test_a_backbone_in_bf16_is_traced_in_fp32():
    """Attention is written out in the weights' dtype, near what the block computes in bf16."""
    backbone, image = lively('v2', compute_dtype='bfloat16'), torch.randn(1, 3, 64, 96)
    traces = attention_maps.trace_stages(backbone, image)
    with torch.no_grad():
        for trace, output in zip(traces, attention_outputs(backbone, image)):
            attention = attention_maps.explicit_attention(trace.attn, trace.tokens)
            again = attention_maps.attention_output(trace.attn, attention)
            error = (again - output.flatten(1, 2)).abs().mean() / output.abs().mean()
            assert again.dtype == torch.float32 and error < 0.05


@pytest.mark.parametrize(('variant', 'keyed'), [('v1', (8, 16)), ('v2_li', (15, 19))])
def test_keys_cover_whole_cells(variant, keyed):
    """Tokens beyond the last whole cell are in no key; pooled keys leave none out."""
    attn = small(variant).stages[0].blocks[-1].attn
    assert attention_maps.keyed_tokens(attn, 15, 19) == keyed
    x = torch.randn(1, 15, 19, 16)
    changed = x.clone()
    changed[:, keyed[0] :] = 9.0
    changed[:, :, keyed[1] :] = 9.0
    assert torch.equal(attn.reduce(x), attn.reduce(changed))
    changed[:, keyed[0] - 1, keyed[1] - 1] += 1.0
    assert not torch.equal(attn.reduce(x), attn.reduce(changed))
