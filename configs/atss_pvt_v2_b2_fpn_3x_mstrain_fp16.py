# ATSS 3x, PVTv2-B2. Reference: box AP 49.9.
_base_ = ['_base_/recipes/atss_fpn_3x_coco.py', '_base_/backbones/pvt_v2_b2.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
