# RetinaNet 3x, PVT-Medium. The reference has no such recipe.
_base_ = ['_base_/recipes/retinanet_fpn_3x_coco.py', '_base_/backbones/pvt_m.py']
model = dict(
    backbone=dict(_base_.backbone, drop_path_rate=0.0),
    neck=dict(in_channels=_base_.out_channels))
