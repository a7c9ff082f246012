# RetinaNet, PVTv2-B0. Reference: box AP 37.2.
_base_ = ['_base_/recipes/retinanet_fpn_1x_coco.py', '_base_/backbones/pvt_v2_b0.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
