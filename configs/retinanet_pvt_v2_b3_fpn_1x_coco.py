# RetinaNet, PVTv2-B3. Reference: box AP 45.9.
_base_ = ['_base_/recipes/retinanet_fpn_1x_coco.py', '_base_/backbones/pvt_v2_b3.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
