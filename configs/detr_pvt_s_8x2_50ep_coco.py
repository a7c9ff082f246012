# DETR, PVT-Small. Reference: box AP 34.7.
_base_ = ['_base_/recipes/detr_50ep_coco.py', '_base_/backbones/pvt_s.py']
model = dict(
    backbone=dict(_base_.backbone, out_indices=(3,)),
    neck=dict(in_channels=_base_.out_channels[3:]))
