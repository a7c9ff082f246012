# Mask R-CNN, PVTv2-B2. Reference: box AP 45.3, mask AP 41.2.
_base_ = ['_base_/recipes/mask_rcnn_fpn_1x_coco.py', '_base_/backbones/pvt_v2_b2.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
