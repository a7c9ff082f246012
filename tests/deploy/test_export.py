"""Exported models give PyTorch's numbers at any size, or no file is written."""

import importlib.util

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import small
from torch import nn

from pvt_mm.deploy import export
from pvt_mm.errors import UserError
from pvt_mm.models import layers


class Bare(nn.Module):
    """A model that is a backbone and nothing else."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_pooling_while_exporting_is_the_adaptive_one(height, width):
    """Two matmuls with the cells' weights average as PyTorch does, whatever 7 leaves over."""
    image = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    ours = layers._pool_by_matmul(image, 7)
    torch.testing.assert_close(ours, F.adaptive_avg_pool2d(image, 7))


def test_linear_attention_in_onnx_and_int8():
    """The hardest backbone for ONNX: free sizes are named, fp32 agrees, int8 is near and small."""
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    part = export.part_of(Bare(small('v2_li')), 'backbone')
    content = export.export(part, 'onnx')
    graph = onnx.load_from_string(content).graph
    sizes = [size.dim_param for size in graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ['batch', '', 'height', 'width']
    assert [output.name for output in graph.output] == ['stage1', 'stage2', 'stage3', 'stage4']

    differences = export.compare(part, export.load(content, 'onnx'), export.random_images())
    assert len(differences) == 12 and export.agrees(differences)

    images = [torch.randn(1, 3, 96, 128), torch.randn(1, 3, 64, 101)]
    int8 = export.quantise(content, images)
    errors = export.compare(part, export.load(int8, 'onnx'), images)
    assert all(1e-4 < error.rms < 0.2 for error in errors), 'coarser, and no nonsense'
    assert len(int8) < 0.8 * len(content)


def test_segmentor_by_the_tool(trained, run_tool, tmp_path, demo_data, capsys):
    """Semantic FPN goes whole into ONNX, with logits of the image's size, and int8 beside it."""
    onnxruntime = pytest.importorskip('onnxruntime')
    config, _, _, checkpoint = trained('seg')
    images = demo_data / 'ade' / 'images' / 'validation'
    out = tmp_path / 'seg.onnx'
    more = ('--int8', '--calibration', images, '--benchmark', '64x96')
    run_tool('export', config, checkpoint, out, *more)
    printed = capsys.readouterr().out
    assert 'the whole segmentor' in printed and 'RGB, normalised by mean [123.675' in printed
    assert '| 2x3x165x237 |' in printed and 'of int8 beside fp32, over the std, of 2' in printed
    assert 'One image of 64x96' in printed and '| int8 ' in printed
    session = onnxruntime.InferenceSession(out)
    (logits,) = session.run(['logits'], {'image': np.zeros((1, 3, 70, 99), np.float32)})
    assert logits.shape == (1, 6, 70, 99)
    assert (tmp_path / 'seg_int8.onnx').stat().st_size < out.stat().st_size


def test_two_stages_by_the_tool_are_whole_or_nothing(
    trained, run_tool, failing, tmp_path, capsys, monkeypatch
):
    """Mask R-CNN goes to its RPN; a program with other numbers leaves the old file as it was."""
    config, _, _, checkpoint = trained('ins')
    out = tmp_path / 'ins.pt2'
    run_tool('export', config, checkpoint, out)
    printed = capsys.readouterr().out
    assert 'RoI heads are not in it' in printed and 'rpn_bbox_pred4' in printed
    program = torch.export.load(out).module()
    assert not [name for name, _ in program.named_parameters() if 'roi_head' in name]
    assert len(program(torch.randn(3, 3, 96, 131))) == 3 * 5

    before = out.read_bytes()

    def wrong(image):
        return [x * 1.001 for x in program(image)]

    monkeypatch.setattr(export, 'export', lambda part, file_format: before)
    monkeypatch.setattr(export, 'load', lambda content, file_format: wrong)
    assert 'nothing was written' in failing('export', config, checkpoint, out)
    assert out.read_bytes() == before and [*tmp_path.glob('*.pt2*')] == [out]
    assert not [*tmp_path.glob('.ins*')]


def test_a_backbones_own_weights_export_as_a_backbone(
    small_config, run_tool, failing, tmp_path, monkeypatch
):
    """A file without neck and heads is enough for --what backbone, and not for a whole model."""
    parts = []
    monkeypatch.setattr(export, 'export', lambda part, _: parts.append(part) or b'program')
    monkeypatch.setattr(export, 'load', lambda content, _: parts[0])
    monkeypatch.setattr(export, 'CHECKED', ((1, 64, 96),))
    config, state = small_config('seg'), small('v1').state_dict()
    for number, file in enumerate(
        (state, {'net': {f'encoder.{key}': value for key, value in state.items()}})
    ):
        parts.clear()
        torch.save(file, tmp_path / 'w.pth')
        out = tmp_path / f'{number}.pt2'
        run_tool('export', config, tmp_path / 'w.pth', out, '--what', 'backbone')
        assert out.read_bytes() == b'program'
        own = parts[0].model.backbone.state_dict()
        assert all(torch.equal(own[key], value) for key, value in state.items())
    line = failing('export', config, tmp_path / 'w.pth', tmp_path / 'whole.pt2')
    assert 'w.pth: These weights are of a backbone alone, without' in line


def test_head_of_one_stage(config, demo_data):
    """RetinaNet's head gives classes and boxes level by level, and nothing else."""
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope('mmdet')
    model = MODELS.build(config('det', demo_data / 'coco').model)
    part = export.part_of(model, 'model')
    with torch.no_grad():
        named = part.named(torch.randn(1, 3, 64, 64))
        scores, boxes = model(torch.randn(1, 3, 64, 64), mode='tensor')
    assert list(named) == [f'{kind}{i}' for kind in ('cls_score', 'bbox_pred') for i in range(5)]
    assert [x.shape for x in named.values()] == [x.shape for x in (*scores, *boxes)]


def test_the_part_is_fp32():
    """A backbone that computes in bf16 is exported in fp32."""
    part = export.part_of(Bare(small('v2', compute_dtype='bfloat16')), 'backbone')
    assert part.model.backbone.compute_dtype is None and not part.training


def test_a_nearly_constant_output_is_not_blamed_for_rounding():
    """Rounding of large, nearly equal values passes; a thousandth of their std does not."""

    class Scores(export.Part):
        def named(self, image):
            return {'score': image.double().mul(1e-3).sub(4.6).float()}

    part, image = Scores(nn.Module()), torch.randn(1, 3, 32, 32)
    scores = part(image)[0]
    assert export.agrees(export.compare(part, lambda _: [scores + 4e-6], [image]))
    assert not export.agrees(export.compare(part, lambda _: [scores + 1e-4], [image]))
    assert not export.agrees(export.compare(part, lambda _: [scores * float('nan')], [image]))


def test_what_does_not_export_is_named():
    """A model without anchors, and one that PyTorch cannot export, give the way out."""
    with pytest.raises(UserError, match='does not export; --what backbone does'):
        export.part_of(Bare(small('v1')), 'model')

    class ByValue(export.Part):
        def named(self, image):
            return {'x': image if image.sum() > 0 else -image}

    with pytest.raises(UserError, match=r'does not export \(.+\); --what backbone does'):
        export.export(ByValue(nn.Identity()), 'pt2')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['out.pth'], 'must end in .onnx or .pt2'),
        (['nowhere/out.pt2'], 'There is no folder nowhere'),
        (['folder.pt2'], 'folder.pt2 is a folder'),
        (['out.onnx', '--int8'], '--int8 and --calibration IMAGES go together'),
        (['out.pt2', '--int8', '--calibration', '.'], '--int8 is for ONNX'),
        (['out.pt2', '--benchmark', 'big'], 'big is no image size'),
        (['out.pt2'], 'none.pth'),
    ],
)
def test_bad_arguments(arguments, message, failing, small_config, tmp_path):
    """Each bad argument gives one sentence, and no file."""
    (tmp_path / 'folder.pt2').mkdir()
    assert message in failing('export', small_config('seg'), 'none.pth', *arguments)
    assert not (tmp_path / arguments[0]).is_file()


def test_calibration_needs_images(tmp_path):
    """A folder's images are found by their endings; a place without any is named."""
    cv2.imwrite(str(tmp_path / 'a.PNG'), np.zeros((4, 4, 3), np.uint8))
    (tmp_path / 'notes.txt').write_text('none')
    assert export.find_images([str(tmp_path)]) == [tmp_path / 'a.PNG']
    with pytest.raises(UserError, match='notes.txt is no image and no folder of images'):
        export.find_images([str(tmp_path / 'notes.txt')])


def test_missing_packages_are_named(monkeypatch):
    """Without onnxruntime one sentence tells what to install; .pt2 needs nothing."""
    found = importlib.util.find_spec
    monkeypatch.setattr(export, 'find_spec', lambda n: None if n == 'onnxruntime' else found('sys'))
    export.require('pt2')
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install 'pvt-mm\[export\]'"):
        export.require('onnx')
