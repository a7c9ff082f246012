# Mask R-CNN 3x, PVT-Large. The reference has no such recipe.
_base_ = ['_base_/recipes/mask_rcnn_fpn_3x_coco.py', '_base_/backbones/pvt_l.py']
model = dict(
    backbone=dict(_base_.backbone, drop_path_rate=0.0),
    neck=dict(in_channels=_base_.out_channels))
optim_wrapper = dict(optimizer=dict(lr=2e-4 / 1.4))
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8)
