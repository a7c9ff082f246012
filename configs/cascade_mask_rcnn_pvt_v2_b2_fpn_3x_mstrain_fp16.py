# Cascade Mask R-CNN 3x, PVTv2-B2. Reference: box AP 51.1, mask AP 44.4.
_base_ = ['_base_/recipes/cascade_mask_rcnn_fpn_3x_coco.py', '_base_/backbones/pvt_v2_b2.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
