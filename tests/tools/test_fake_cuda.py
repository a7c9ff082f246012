"""tests/stress/check_fake_cuda.py: it sees a wrong device or dtype; the network has neither."""

from unittest import mock

import pytest
import torch
from conftest import load_tool
from torch import nn

from pvt_mm.models import layers


@pytest.fixture(scope='module')
def tool():
    return load_tool('check_fake_cuda')


def test_faults_are_seen(tool):
    """Of an operation on another device, and in another precision."""
    with tool.Watch(torch.bfloat16) as watch:
        nn.LayerNorm(4)(nn.Linear(3, 4)(torch.ones(2, 3)))
    assert watch.counts['matmul'] == watch.counts['norm'] == 1
    assert {'addmm on cpu', 'addmm of torch.float32'} <= set(watch.faults)
    assert 'native_layer_norm of torch.float32' not in watch.faults


@pytest.mark.skipif(torch.version.cuda is None, reason='PyTorch was built without CUDA')
@pytest.mark.parametrize('arch', ['tiny', 'b0', 'b2_li'])
def test_network_on_a_fake_gpu(tool, arch):
    for precision in tool.PRECISIONS.values():
        counts, faults = tool.check(arch, precision, 64)
        assert not faults and counts['matmul'] > 40

    def in_low_precision(self, x):
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).half()

    with mock.patch.object(layers.PatchEmbed, 'forward', in_low_precision):
        _, faults = tool.check(arch, tool.PRECISIONS['fp16 autocast'], 64)
    assert 'stages.0.patch_embed returns torch.float16' in faults


def test_says_what_is_missing(tool, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, 'cuda', None)
    monkeypatch.setattr('sys.argv', ['check_fake_cuda.py'])
    with pytest.raises(SystemExit) as end:
        tool.main()
    assert end.value.code == 1
    assert 'built without CUDA' in capsys.readouterr().err
