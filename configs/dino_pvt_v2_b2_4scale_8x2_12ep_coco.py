# DINO, PVTv2-B2. The reference publishes no figure.
_base_ = ['_base_/recipes/dino_4scale_12ep_coco.py', '_base_/backbones/pvt_v2_b2.py']
model = dict(
    backbone=dict(_base_.backbone, out_indices=(1, 2, 3)),
    neck=dict(in_channels=_base_.out_channels[1:]))
