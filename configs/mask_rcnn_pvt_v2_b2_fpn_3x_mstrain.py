# Mask R-CNN 3x, PVTv2-B2. Reference: box AP 47.8, mask AP 43.1.
_base_ = ['_base_/recipes/mask_rcnn_fpn_3x_crop_coco.py', '_base_/backbones/pvt_v2_b2.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
