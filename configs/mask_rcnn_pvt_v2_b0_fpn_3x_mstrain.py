# Mask R-CNN 3x, PVTv2-B0. Reference: box AP 41.6, mask AP 38.2.
_base_ = ['_base_/recipes/mask_rcnn_fpn_3x_crop_coco.py', '_base_/backbones/pvt_v2_b0.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
