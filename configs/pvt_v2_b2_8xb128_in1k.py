# Classification on ImageNet-1k, PVTv2-B2. Reference: top-1 82.0.
_base_ = ['_base_/recipes/classifier_300ep_in1k.py', '_base_/backbones/pvt_v2_b2.py']
model = dict(
    backbone=dict(_base_.backbone, init_cfg=None),
    head=dict(in_channels=_base_.out_channels[-1]))
