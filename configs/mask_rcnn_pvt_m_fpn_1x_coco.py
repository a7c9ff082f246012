# Mask R-CNN, PVT-Medium. Reference: box AP 42.0, mask AP 39.0.
_base_ = ['_base_/recipes/mask_rcnn_fpn_1x_coco.py', '_base_/backbones/pvt_m.py']
model = dict(
    backbone=dict(_base_.backbone, drop_path_rate=0.0),
    neck=dict(in_channels=_base_.out_channels))
