# RetinaNet, PVT-Small. Reference: box AP 40.4.
_base_ = ['_base_/recipes/retinanet_fpn_1x_coco.py', '_base_/backbones/pvt_s.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
