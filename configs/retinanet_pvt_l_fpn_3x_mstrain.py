# RetinaNet 3x, PVT-Large. The reference has no such recipe.
_base_ = ['_base_/recipes/retinanet_fpn_3x_coco.py', '_base_/backbones/pvt_l.py']
model = dict(
    backbone=dict(_base_.backbone, drop_path_rate=0.0),
    neck=dict(in_channels=_base_.out_channels))
optim_wrapper = dict(type='AmpOptimWrapper')
