"""The same numbers as mmdet's own PVT, and a detector that reads the features as they are."""

import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from reference import REPO, SMALL, V1, backbone_class, official_weights, rule_image
from torch import nn

from pvt_mm import convert_checkpoint

ARCHS = {
    'tiny': dict(num_layers=[2, 2, 2, 2]),
    'small': dict(num_layers=[3, 4, 6, 3]),
    'b0': dict(embed_dims=32, num_layers=[2, 2, 2, 2]),
    'b2': dict(embed_dims=64, num_layers=[3, 4, 6, 3]),
}


def mmdet_backbone(arch):
    """Build mmdet's own class with the reference's eps, which is ours; its own is 1e-6."""
    name = 'PyramidVisionTransformer' if arch in V1 else 'PyramidVisionTransformerV2'
    model = MODELS.build(dict(type=f'mmdet.{name}', **ARCHS[arch]))
    for key, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            patch_norm = key.startswith('layers.') and key.endswith('.0.norm')
            module.eps = 1e-5 if patch_norm or key.endswith('attn.norm') else 1e-6
    model.load_state_dict(convert_checkpoint(official_weights(arch), to='mmdet'))
    return model.eval()


@pytest.mark.parametrize('arch', ARCHS)
def test_equals_mmdet(arch):
    """Features equal mmdet's to 1e-5 of each stage's std, gradients to 1e-9 in double precision."""
    theirs = mmdet_backbone(arch)
    ours = backbone_class(arch)(arch).eval()
    ours.load_state_dict(theirs.state_dict())
    image = rule_image(9, (1, 3, 128, 160))
    with torch.no_grad():
        for out, other in zip(ours(image), theirs(image)):
            assert (out - other).abs().max() < 1e-5 * other.std()
    gradients = []
    for model in (ours.double(), theirs.double()):
        leaf = image.double().requires_grad_()
        sum(out.square().mean() for out in model(leaf)).backward()
        gradients.append(leaf.grad)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-9 * gradients[1].std()


def mask_rcnn():
    """Build a small Mask R-CNN of mmdet on a small PVTv2."""
    init_default_scope('mmdet')
    cfg = Config.fromfile(REPO / 'configs' / 'mask_rcnn_pvt_v2_b0_fpn_1x_coco.py')
    cfg.model.backbone = dict(type='PVTv2', arch=SMALL)
    cfg.model.neck.update(in_channels=list(SMALL['dims']), out_channels=32)
    cfg.model.rpn_head.update(in_channels=32, feat_channels=32)
    cfg.model.roi_head.bbox_roi_extractor.out_channels = 32
    cfg.model.roi_head.bbox_head.update(in_channels=32, fc_out_channels=32)
    cfg.model.roi_head.mask_roi_extractor.out_channels = 32
    cfg.model.roi_head.mask_head.update(in_channels=32, conv_out_channels=32)
    cfg.model.test_cfg.rcnn.score_thr = 0.0
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model


class Contiguous(nn.Module):
    """A backbone whose features are copied into plain memory before anyone reads them."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return tuple(out.clone(memory_format=torch.contiguous_format) for out in self.backbone(x))


def samples():
    boxes = torch.tensor([[8.0, 8.0, 60.0, 50.0], [40.0, 20.0, 120.0, 90.0]])
    masks = torch.zeros(2, 96, 128, dtype=torch.uint8)
    masks[0, 8:50, 8:60] = masks[1, 20:90, 40:120] = 1
    sample = DetDataSample(
        metainfo=dict(
            img_shape=(96, 128),
            ori_shape=(96, 128),
            pad_shape=(96, 128),
            batch_input_shape=(96, 128),
            scale_factor=(1.0, 1.0),
        )
    )
    sample.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.tensor([1, 2]), masks=BitmapMasks(masks.numpy(), 96, 128)
    )
    return [sample]


def flatten(losses):
    for value in losses.values():
        yield from value if isinstance(value, list) else [value]


def test_mask_rcnn_reads_the_features_right():
    """Boxes, masks and losses equal those from features copied to plain memory.

    mmcv's RoIAlign reads raw memory: channels-last features would be silently wrong.
    """
    model = mask_rcnn()
    image = rule_image(4, (1, 3, 96, 128))
    results = []
    for wrapped in (False, True):
        if wrapped:
            model.backbone = Contiguous(model.backbone)
        model.eval()
        with torch.no_grad():
            instances = model.predict(image, samples())[0].pred_instances
        model.train()
        torch.manual_seed(3)
        losses = model.loss(image, samples())
        flat = [torch.as_tensor(loss).sum() for loss in flatten(losses)]
        assert len(instances) > 0
        results.append([instances.bboxes, instances.scores, instances.masks, *flat])
    for first, second in zip(*results):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
