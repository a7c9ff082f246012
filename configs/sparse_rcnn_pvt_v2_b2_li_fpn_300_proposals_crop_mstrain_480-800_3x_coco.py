# Sparse R-CNN 3x, PVTv2-B2-Linear. Reference: box AP 48.9.
_base_ = ['_base_/recipes/sparse_rcnn_fpn_3x_coco.py', '_base_/backbones/pvt_v2_b2_li.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
