# Mask R-CNN, PVT-Tiny. Reference: box AP 36.7, mask AP 35.1.
_base_ = ['_base_/recipes/mask_rcnn_fpn_1x_coco.py', '_base_/backbones/pvt_t.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
