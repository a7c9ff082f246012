# Mask R-CNN, PVTv2-B1. Reference: box AP 41.8, mask AP 38.8.
_base_ = ['_base_/recipes/mask_rcnn_fpn_1x_coco.py', '_base_/backbones/pvt_v2_b1.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
