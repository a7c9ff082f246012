# Mask R-CNN 3x, PVTv2-B2-Linear. The reference publishes no figure.
_base_ = ['_base_/recipes/mask_rcnn_fpn_3x_crop_coco.py', '_base_/backbones/pvt_v2_b2_li.py']
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.out_channels))
optim_wrapper = dict(type='AmpOptimWrapper')
