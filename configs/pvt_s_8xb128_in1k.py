# Classification on ImageNet-1k, PVT-Small. Reference: top-1 79.8.
_base_ = ['_base_/recipes/classifier_300ep_in1k.py', '_base_/backbones/pvt_s.py']
model = dict(
    backbone=dict(_base_.backbone, init_cfg=None, with_cls_token=True),
    head=dict(in_channels=_base_.out_channels[-1]))
