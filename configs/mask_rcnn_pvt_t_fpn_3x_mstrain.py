# Mask R-CNN 3x, PVT-Tiny. The reference has no such recipe.
_base_ = ['_base_/recipes/mask_rcnn_fpn_3x_coco.py', '_base_/backbones/pvt_t.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
